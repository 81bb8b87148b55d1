"""Inputs for the tests of `flarec convert`: tiny sources, a data file, and a way to run the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flarec.cli import main
from tests.models import few_checkpoint

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five"]
QUICK = [
    "--steps", "6", "--max-length", "96", "--device", "cpu", "--set", "optimizer.lr=1e-3",
    "--set", "optimizer.warmup_steps=0", "--set", "optimizer.batch_rows=2", "--set", "evaluation.every=4",
    "--set", "evaluation.prompts=2", "--set", "evaluation.max_new_tokens=8", "--set", "save.every=2",
    "--recipe", "flare",  # all weights; of the default, an adapter, see test_convert_adapter.py
]


def place_of_conversions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with a tiny model `source` and `data.jsonl` in it, as the working directory."""
    monkeypatch.chdir(folder)
    write_data(folder / "data.jsonl")
    few_checkpoint(folder, "qwen3_5_text").rename(folder / "source")
    return folder


def write_data(path: Path, documents: int = 12) -> Path:
    """Chat records; the answer repeats the question."""
    records = []
    for number in range(documents):
        text = f"{WORDS[number % 8]} {WORDS[number * 3 % 8]}"
        turns = [{"role": "user", "content": f"say {text}"}, {"role": "assistant", "content": f"{text} and {text}"}]
        records.append({"messages": turns})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def flarec(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
