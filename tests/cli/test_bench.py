"""`flarec bench` and `benchmarks/kernels.py`: rows are listed, and nothing is timed without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flarec.bench.rows import ROWS
from flarec.bench.serving.rows import ROWS as SERVING_ROWS
from flarec.cli import main

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_rows_are_listed() -> None:
    done = CliRunner().invoke(main, ["bench", "kernels", "--list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [row.name for row in ROWS]
    some = CliRunner().invoke(main, ["bench", "kernels", "--list", "--only", "softmax"])
    assert [line.split()[0] for line in some.stdout.splitlines()] == ["softmax-128", "softmax-256", "softmax-flex-128"]


@pytest.mark.parametrize("name", ["kernels", "decode", "train"])
def test_a_list_is_no_result(name: str, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = CliRunner().invoke(main, ["bench", name, "--list", "--out", str(out)])
    assert (done.exit_code, done.stdout) == (2, "") and "leave one of them out" in done.stderr
    assert not out.exists()


@NO_GPU
def test_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = CliRunner().invoke(main, ["bench", "kernels", "--out", str(out)])
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: the kernels are timed on CUDA devices") and done.stdout == ""
    assert not out.exists()


def test_wrong_usage() -> None:
    for arguments in (["kernels", "--only", "nonsense"], ["kernels", "--time-limit", "-1"], ["plot"], ["nonsense"]):
        done = CliRunner().invoke(main, ["bench", *arguments])
        assert done.exit_code == 2, arguments
        assert "Traceback" not in done.output


@pytest.mark.parametrize("arguments", [
    ["train", "--shape", "tiny", "--device", "cpu", "--only", "stock-step", "--out"],
    ["decode", "--shape", "tiny", "--device", "cpu", "--only", "stock", "--out"],
    ["serve", "http://127.0.0.1:9/v1", "--prompts", "prompts.txt", "--out"],
    ["serve", "http://127.0.0.1:9/v1", "--prompts", "prompts.txt", "--plot"],
], ids=" ".join)
def test_no_place_for_results_is_told_before_anything_is_measured(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("Hello")
    done = CliRunner().invoke(main, ["bench", *arguments, "prompts.txt/results.svg"])
    assert done.exit_code == 2 and done.stdout == "", done.output
    assert done.stderr.startswith("Error: prompts.txt") and arguments[-1] in done.stderr


def test_a_picture_of_no_kind_is_told_before_load_is_put_on_a_server(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Hello")
    words = ["serve", "http://127.0.0.1:9/v1", "--prompts", tmp_path / "prompts.txt", "--plot", tmp_path / "a.nothing"]
    done = CliRunner().invoke(main, ["bench", *map(str, words)])
    assert done.exit_code == 2 and done.stdout == "" and "no picture 'nothing'" in done.stderr


def test_the_script_runs_the_same_rows() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--list", "--only", "linear-block"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        f"linear-block-{size}" for size in (1, 2, 3, 8, 16, 32)
    ]
    wrong = subprocess.run([sys.executable, str(SCRIPT), "--only", "nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("Error: unknown row 'nonsense'")


@pytest.mark.slow
def test_decode_at_tiny_size(tmp_path: Path) -> None:
    """Every row is measured and written, or says why not; bars are for GPUs."""
    out = tmp_path / "decode.json"
    arguments = ["--shape", "tiny", "--context", "12", "--steps", "2", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(main, ["bench", "decode", *arguments])
    assert done.exit_code in (0, 1) and "Traceback" not in done.output, done.output
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [row.name for row in SERVING_ROWS]
    missing = {name for name, row in rows.items() if row["status"] != "measured"}
    assert missing == {"waits", "first-token-cold", "first-token-warm"}, rows  # of graphs
    assert all(row["value"] > 0 for row in rows.values() if row["status"] == "measured")
    assert rows["ar-trust-rate-1"]["values"].keys() == {"tokens_per_s", "stock_graph_tokens_per_s"}


def test_the_rows_of_decoding_are_listed() -> None:
    listed = CliRunner().invoke(main, ["bench", "decode", "--list", "--only", "waits"])
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["waits"]
    wrong = CliRunner().invoke(main, ["bench", "decode", "--only", "nonsense"])
    assert wrong.exit_code == 2 and "no row is called nonsense" in wrong.output


@pytest.mark.parametrize("arguments", [
    ["serve", "http://localhost:1", "--rate", "nan"], ["serve", "http://localhost:1", "--temperature", "inf"],
    ["kernels", "--time-limit", "nan"], ["decode", "--time-limit", "nan"], ["train", "--time-limit", "nan"],
])
def test_a_number_is_a_number(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 2 and "is no finite number" in done.stderr, done.output
