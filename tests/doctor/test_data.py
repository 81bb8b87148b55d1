"""`flarec doctor --data`: its counts are those that a run prints, and what it says of lengths and repeats is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flarec.cli import main
from flarec.train.data.sources import load_sources, parse_source
from tests.models import tiny_checkpoint, tiny_tokenizer

LENGTH = 48


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and data with a long document, a repeated one, one whose answer lies behind a row, and a bad line."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "model").symlink_to(tiny_checkpoint(folder, "llama"))
    records: list[Any] = [{"prompt": f"count to {n}", "response": "one " * n} for n in range(1, 21)]
    records += [{"prompt": "count to 3", "response": "one " * 3}] * 2
    records += [{"prompt": "far " * 40, "response": "behind"}, {"messages": []}]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def examine(place: Path, *more: str) -> Any:
    command = ["doctor", str(place / "model"), "--data", str(place / "train.jsonl"), "--length", str(LENGTH), "--quick"]
    run = CliRunner().invoke(main, [*command, *more])
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)["data"] if "--json" in more else run.stdout


def test_counts_are_those_of_a_run(place: Path) -> None:
    (found,) = examine(place, "--json")
    (source,) = load_sources(
        [parse_source(str(place / "train.jsonl"))], tiny_tokenizer(), max_length=LENGTH, skip_bad_lines=True
    )
    stats = source.stats
    assert stats.truncated and stats.dropped == stats.bad_lines == 1
    assert found["text"] == str(stats)
    for name in ("documents", "tokens", "targets", "turns", "truncated", "truncated_tokens", "dropped", "bad_lines"):
        assert found[name] == getattr(stats, name), name


def test_lengths_and_repeats(place: Path) -> None:
    (found,) = examine(place, "--json")
    (whole,) = load_sources(
        [parse_source(str(place / "train.jsonl"))], tiny_tokenizer(), max_length=10_000, skip_bad_lines=True
    )
    lengths = sorted(whole.length(index) for index in range(len(whole)))
    assert [count for count, _ in found["longest"]] == lengths[:-4:-1]
    assert found["longest"][0][1].endswith("train.jsonl, line 23")
    half, most = found["lengths"]["half"], found["lengths"]["nine in ten"]
    assert sum(length <= half for length in lengths) >= len(lengths) / 2 > sum(length < half for length in lengths)
    assert sum(length <= most for length in lengths) >= 0.9 * len(lengths) > sum(length < most for length in lengths)
    assert found["repeats"] == 2 and found["most_repeated"][0] == 3
    assert found["most_repeated"][1].endswith("train.jsonl, line 3")
    assert found["rows"] == -(-found["tokens"] // LENGTH)


def test_what_to_do_is_said(place: Path) -> None:
    text = examine(place)
    (found,) = examine(place, "--json")
    assert f"--max-length {found['longest'][0][0]} would cut none" in text
    assert "2 documents stand there before, token for token" in text and "line 3: 3 times" in text
    assert "1 records cannot be used, and a run refuses the first" in text and "line 24" in text
    assert "passes about" in text, "a run of the recipe repeats these few documents"


def test_shares_of_a_mixture(place: Path) -> None:
    """Weights share the tokens of the run."""
    (alone,) = examine(place, "--json")
    heavy, light = examine(place, "--json", "--data", f"{place / 'train.jsonl'}:3")
    assert light["epochs"] == pytest.approx(3 * heavy["epochs"])
    assert heavy["epochs"] + light["epochs"] == pytest.approx(alone["epochs"])


def test_a_tokenizer_of_another_model(place: Path, tmp_path: Path) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((place / "model" / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    command = ["doctor", str(tmp_path), "--data", str(place / "train.jsonl"), "--quick"]
    run = CliRunner().invoke(main, command)
    assert "is none of the model's 64 rows: give the tokenizer that belongs to the model" in run.stdout, run.output


@pytest.mark.parametrize(("data", "words"), [("nowhere.jsonl", "does not exist"), ("model", "model")])
def test_what_cannot_be_examined(place: Path, data: str, words: str) -> None:
    run = CliRunner().invoke(main, ["doctor", str(place / "model"), "--data", str(place / data), "--quick"])
    assert run.exit_code == 2 and words in run.stderr and run.stderr.splitlines()[-1].startswith("Error: ")


def test_a_source_without_a_tokenizer(place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    run = CliRunner().invoke(main, ["doctor", str(tmp_path), "--data", str(place / "train.jsonl"), "--quick"])
    assert run.exit_code == 2 and "has no tokenizer" in run.stderr
