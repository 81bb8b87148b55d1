"""Names, files and outputs that nobody expects: one line each, nothing half-written, nothing that waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flarec.base.files import LONGEST_NAME, check_name, why_no_file
from flarec.base.prompts import read_prompts
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.own import is_own, why_not_own
from flarec.errors import CheckpointError, DataError, TrainingError, UsageError
from flarec.train.arguments import Arguments
from flarec.train.data.files import read_records
from flarec.train.metrics import MetricsLog
from flarec.train.options import Options
from flarec.train.state import StateDirectory
from tests.checkpoints import own_folder, tree
from tests.cli.conversions import flarec, write_data


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model/ (a configuration), data.jsonl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_data(tmp_path / "data.jsonl")
    return tmp_path


def one_line(result: Any, *codes: int) -> str:
    assert result.exit_code in (codes or (2,)), result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert errors == result.stderr.splitlines()[-1:]
    return str(errors[0])


# --- names


NAMES = {
    "/": "has no name",
    "": "lies in the output directory",  # a path without a name is this directory
    "n" * 231: "is longer than 230 bytes",
    "ü" * 116: "is longer than 230 bytes",
    "n" * 5000: "is longer than 230 bytes",
    "new\nline": "unprintable characters",
    "esc\x1b[2J": "unprintable characters",
    "half\udce4": "unprintable characters",
    "model/../model": "lies in the output directory",
    "data.jsonl/out": "data.jsonl",
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_odd_outputs(place: Path, name: str) -> None:
    before = tree(place)
    line = one_line(flarec("convert", "model", "--data", "data.jsonl", "--out", name))
    assert NAMES[name] in line and len(line) < 6000
    assert tree(place) == before


@pytest.mark.parametrize("name", ["n" * LONGEST_NAME, "-x", " ", "ümlaut", ".hidden", "a b", "out.partial"])
def test_outputs_with_names(name: str) -> None:
    check_name(Path(name))


def test_here_and_its_parent_have_names(place: Path) -> None:
    with pytest.raises(UsageError, match=r"out is 'nul\\x00'; give text or a path"):
        Options(source="model", data="data.jsonl", out="nul\0")  # type: ignore[arg-type]
    for out in (".", "./", "model/.."):
        check_name(Options(source="model", data=("data.jsonl",), out=Path(out)).output)


@pytest.mark.parametrize(
    "command", [["generate"], ["verify"], ["inspect"], ["doctor"], ["convert", "--data", "data.jsonl"]]
)
@pytest.mark.parametrize("name", ["n" * 5000, "a" * 300 + "/" + "b" * 300, "nul\0"], ids=["long", "long/long", "nul"])
def test_odd_sources(place: Path, command: list[str], name: str) -> None:
    one_line(flarec(command[0], name, *(["red"] if command == ["generate"] else []), *command[1:]), 1, 2)


def test_odd_data_and_recipes(place: Path) -> None:
    for option in ("--data", "--recipe", "--eval-data", "--plugin"):
        more = [] if option == "--data" else ["--data", "data.jsonl"]
        for name in ("n" * 5000, "nul\0", "nul\0:2"):
            one_line(flarec("convert", "model", *more, option, name, "--out", "out"), 1, 2)


# --- pipes in the place of files


def test_what_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        assert why_no_file(tmp_path / name) == "is a pipe, a socket or a device, not a file"
    assert why_no_file(Path("/dev/zero")) != ""
    for good in (tmp_path, tmp_path / "nothing", Path(__file__), Path("n" * 5000), Path("nul\0")):
        assert why_no_file(good) == ""
    reads, writes = os.pipe()  # as a shell's <(command)
    try:
        assert why_no_file(Path(f"/dev/fd/{reads}")) == ""
    finally:
        os.close(reads)
        os.close(writes)


@pytest.mark.parametrize("name", ["config.json", "flarec.json", "tokenizer.json", "model.safetensors", "README.md"])
def test_a_pipe_in_a_model(tmp_path: Path, name: str) -> None:
    out = own_folder(tmp_path / "out")
    (out / "config.json").write_text("{}")
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pipe"):
        open_checkpoint(out)
    assert not is_own(out) and why_not_own(out)


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.json"])
def test_a_pipe_of_data(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} is a pipe"):
        list(read_records(tmp_path / name))
    with pytest.raises(DataError, match=f"{name} is a pipe"):
        list(read_prompts(tmp_path / name))


def test_a_pipe_in_a_run(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "out.partial")
    directory.create({})
    for name in ("latest", "metrics.jsonl", "run.json"):
        (directory.path / name).unlink(missing_ok=True)
        os.mkfifo(directory.path / name)
    with pytest.raises(CheckpointError, match="latest is a pipe"):
        directory.latest()
    assert directory.saved_step is None
    with pytest.raises(TrainingError, match=r"metrics\.jsonl is a pipe"):
        MetricsLog(directory.metrics)
    with pytest.raises(UsageError, match="has no record of a run"):
        directory.check_own()


def test_pipes_by_the_command_line(place: Path) -> None:
    os.mkfifo(place / "recipe.toml")
    os.mkfifo(place / "prompts.txt")
    os.mkfifo(place / "plugin.py")
    for more in (["--recipe", "recipe.toml"], ["--plugin", "plugin.py"]):
        one_line(flarec("convert", "model", "--data", "data.jsonl", *more))
    assert "prompts.txt is a pipe" in one_line(flarec("generate", "model", "--prompts", "prompts.txt"))


# --- values of the Python interface


@pytest.mark.parametrize("name", Arguments.__dataclass_fields__)
def test_none_is_the_default_or_one_line(name: str) -> None:
    values: dict[str, Any] = {"source": "s", "data": ("d",)}
    try:
        given = Arguments(**{**values, name: None})
    except UsageError as error:
        assert str(error).startswith(f"{name} is None; give ")
    else:
        assert given == Arguments(**values)


def test_numbers_of_libraries() -> None:
    for number in (np.int64(3), np.int8(3), torch.tensor(3), torch.tensor([3], dtype=torch.int32), np.array([3])):
        given = Arguments(source="s", data=["d"], steps=number, seed=number)  # type: ignore[arg-type]
        assert (given.steps, given.seed) == (3, 3) and type(given.steps) is int


WRONG = [True, 2.5, "3", float("nan"), 10**400, -(10**5000), [3], {}, object(), np.array([1, 2]), torch.ones(2), b"3"]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_wrong_values_are_one_line(value: Any) -> None:
    for name in ("steps", "seed", "max_length"):
        with pytest.raises(UsageError) as caught:
            Arguments(source="s", data=("d",), **{name: value})
        assert str(caught.value).startswith(f"{name} is ") and "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        Arguments(source=value if not isinstance(value, str) else 3, data=["d"])  # type: ignore[arg-type]


def test_json_with_numbers_that_python_refuses(tmp_path: Path) -> None:
    digits = "9" * 5000
    (tmp_path / "data.jsonl").write_text(f'{{"text": {digits}}}\n{{"text": "a", "x": 1e999}}\n')
    (place, bad), (_, good) = read_records(tmp_path / "data.jsonl")
    assert str(place).endswith("data.jsonl, line 1") and isinstance(bad, ValueError) and good["text"] == "a"  # type: ignore[index]
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": {digits}}}\n')
    with pytest.raises(DataError, match="line 1: not JSON"):
        list(read_prompts(tmp_path / "prompts.jsonl"))


# --- outputs


def shell(command: str) -> tuple[int, str]:
    """(exit code, stderr) of `flarec` with its outputs redirected by a shell."""
    words = ["bash", "-o", "pipefail", "-c", f'"$0" -m flarec {command}', sys.executable]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.returncode, found.stderr


FULL = "Error: the output cannot be written: No space left on device\n"
OUTPUTS: dict[str, tuple[int, str]] = {
    "recipes > /dev/full": (1, FULL),
    "--help > /dev/full": (1, FULL),
    "recipes >&-": (0, ""),
    "recipes nothing >&- 2>&-": (2, ""),
    "recipes nothing 2> /dev/full": (2, ""),
    "recipes | true": (0, ""),
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_that_cannot_be_written(command: str) -> None:
    if "/dev/full" in command and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    code, errors = shell(command)
    assert errors == OUTPUTS[command][1]
    assert code in (OUTPUTS[command][0], *([1] if "| true" in command else []))


FAILURES = {
    "some/file cannot be used: Input/output error": OSError(5, "Input/output error", "some/file"),
    "the output cannot be written: No space left on device": OSError(28, "No space left on device"),
    "what a library says": OSError("what a library says\nand more of it"),
}


@pytest.mark.parametrize("text", FAILURES)
def test_a_disk_that_fails_is_one_line(place: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no command expects it; `--debug` shows where."""

    def fail(*_: Any) -> None:
        raise FAILURES[text]

    monkeypatch.setattr("flarec.train.options.load_recipe", fail)
    command = ["convert", "model", "--data", "data.jsonl"]
    assert one_line(flarec(*command), 1) == f"Error: {text}"
    assert isinstance(flarec(*command, "--debug").exception, OSError)
