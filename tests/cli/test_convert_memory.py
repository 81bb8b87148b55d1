"""`flarec convert` with too little memory: what is chosen is said, and a resumed run goes on as it began."""

from __future__ import annotations

from pathlib import Path

import pytest

from flarec.train import memory, prepare
from flarec.train.state import MICRO_ROWS, StateDirectory
from tests.cli.conversions import QUICK, flarec, place_of_conversions

COMMAND = ["convert", "source", "--data", "data.jsonl", *QUICK, "--set", "evaluation.every=0", "--steps", "3"]


def test_a_run_that_began_with_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun with fewer rows at a time and layers computed again, continued with all kept: the bits of a run with so few
    rows from its start. Where the recipe asks for more rows than a step has, that is said."""
    place, rows = place_of_conversions(tmp_path, monkeypatch), ["--set", "optimizer.micro_rows=4"]
    given_back: list[bool] = []  # of the whole process, which runs other tests too
    monkeypatch.setattr(prepare, "give_back_large_blocks", lambda: given_back.append(True))
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)
    begun = flarec(*COMMAND, *rows, "--out", "out", "--stop-after", "1")
    assert begun.exit_code == 0, begun.output
    assert "optimizer.micro_rows = 4 is more than the rows of a step: 2 at a time" in begun.stderr
    assert "layers computed again, and only 1.0 MB are free" in begun.stderr
    assert StateDirectory(place / "out.partial").identity[MICRO_ROWS] == 1
    assert StateDirectory(place / "out.partial").identity["recipe"]["train"]["memory"] == "auto"
    assert given_back == [True], "layers are computed again on a CPU"

    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    done = flarec(*COMMAND, *rows, "--out", "out", "--resume")
    assert done.exit_code == 0, done.output
    assert "memory: everything is kept, 1 row at a time; that is far from the 1000.0 GB" in done.stderr
    few = ["--set", "optimizer.micro_rows=1", "--set", "train.memory=keep"]
    assert flarec(*COMMAND, *few, "--out", "few").exit_code == 0
    ours, theirs = (sorted((place / name).glob("*.safetensors")) for name in ("out", "few"))
    assert ours and [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    assert given_back == [True], "of runs that keep everything nothing is changed"


def test_a_dry_run_says_what_would_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_of_conversions(tmp_path, monkeypatch)
    monkeypatch.setattr(prepare, "give_back_large_blocks", lambda: True)
    done = flarec(*COMMAND, "--set", "gradient_checkpointing=true", "--out", "out", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "layers are computed again, 1 row at a time (train.memory = recompute)" in done.stdout
