"""Saves that are written while training goes on: the same bits, one at a time, and nothing half-written is there."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from flarec.cli import main
from flarec.errors import TrainingError
from flarec.train import background, state
from flarec.train.background import SaveWriter, in_background
from flarec.train.saves import SavedState, write_save
from flarec.train.state import StateDirectory
from tests.cli.conversions import QUICK, place_of_conversions
from tests.train.small_run import recipe, small
from tests.train.test_resume import full_disk

LIVE = torch.zeros(4)


def live(step: int) -> SavedState:
    """What a trainer hands out: its own tensors, which the next step changes."""
    LIVE.fill_(step)
    return SavedState({"w": LIVE}, {"w.step": LIVE}, {"step": step, "evaluations": {}})


@pytest.fixture
def directory(tmp_path: Path) -> StateDirectory:
    made = StateDirectory(tmp_path / "out.partial")
    made.create({})
    return made


def writer(directory: StateDirectory) -> SaveWriter:
    return SaveWriter(directory, 2, background=True, fresh=False)


def latest(directory: StateDirectory) -> tuple[int, float] | None:
    found = StateDirectory(directory.path).latest()
    return None if found is None else (found.values["step"], float(found.model["w"].mean()))


def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits for the event, once its folder is there."""
    go = threading.Event()

    def waiting(folder: Path, saved: SavedState, between: Any) -> None:
        assert go.wait(20)
        write_save(folder, saved, between)

    monkeypatch.setattr(state, "write_save", waiting)
    return go


def test_what_training_changes_meanwhile_is_not_written(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, saves, given = held(monkeypatch), writer(directory), live(3)
    with saves:
        saves.save(3, given)
        LIVE.fill_(99)
        given.values["evaluations"][4] = "later"
        saves.check()
        assert latest(directory) is None and (saves.begun, saves.saved) == (3, None), "training went on"
        go.set()
        saves.wait()
        assert latest(directory) == (3, 3.0) and saves.saved == 3
        assert StateDirectory(directory.path).latest().values["evaluations"] == {}  # type: ignore[union-attr]
        saves.save(6, live(6))
    assert latest(directory) == (6, 6.0), "the end of a run waits"
    names = {path.name for path in directory.path.iterdir()}
    assert names == {"run.json", "latest", "state-00000003", "state-00000006"}


@pytest.mark.parametrize("limit", [0, 100])
def test_a_full_disk_stops_the_run_and_keeps_the_save_before(directory: StateDirectory, limit: int) -> None:
    saves = writer(directory)
    saves.save(3, live(3))
    saves.wait()
    with full_disk(limit):
        saves.save(6, live(6))
        assert saves._thread is not None
        saves._thread.join()
    with pytest.raises(TrainingError, match=r"cannot write .*continue with --resume"):
        saves.check()
    saves.check()
    assert saves.saved == 3 and latest(directory) == (3, 3.0)
    assert not list(directory.path.glob("*.writing"))


def test_an_error_of_the_run_waits_for_the_save_and_a_second_interrupt_gives_it_up(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="not finite"), writer(directory) as saves:
        saves.save(3, live(3))
        raise TrainingError("the loss is not finite")
    assert latest(directory) == (3, 3.0)
    go = held(monkeypatch)
    with pytest.raises(KeyboardInterrupt), writer(directory) as saves:
        saves.save(6, live(6))
        saves._stopped.set()
        go.set()
        raise KeyboardInterrupt
    assert latest(directory) == (3, 3.0) and saves.saved is None


def test_when_saves_are_written_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU only if it is asked for: the copy takes memory, and writing the cores of the step."""
    trainer = small("bamba").trainer(recipe("draft"))
    assert [in_background(choice, trainer) for choice in ("auto", "on", "off")] == [
        (False, ""), (True, ""), (False, ""),
    ]
    needed = background.state_size(trainer)
    assert needed == 3 * sum(4 * value.numel() for value in trainer.parameters.values())
    coded = small("bamba").trainer(recipe("draft", "optimizer.moments=8bit"))
    coded.advance()
    saved, count = coded.state(), sum(value.numel() for value in coded.parameters.values())
    every = sum(value.nbytes for part in (saved.model, saved.optimizer) for value in part.values())
    assert 0 <= every - background.state_size(coded) <= 4 * len(saved.model), "counts of steps"
    assert background.state_size(coded) < 7 * count < needed
    monkeypatch.setattr(type(trainer.program), "device", torch.device("cuda"))
    for free, chosen, words in ((2 * needed, True, "while training goes on"), (needed, False, "training waits"),
                                (None, False, "nothing says how much")):
        monkeypatch.setattr(background, "free_memory", lambda device, free=free: free)
        found, text = in_background("auto", trainer)
        assert found == chosen and words in text


@pytest.mark.slow
def test_a_run_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and continued, the first time in the background, then not: when a save is written is free."""
    place = place_of_conversions(tmp_path, monkeypatch)

    def convert(out: str, *more: str) -> None:
        words = ["convert", "source", "--data", "data.jsonl", "--out", out, *QUICK, *more]
        done = CliRunner().invoke(main, [*words, "--set", "evaluation.every=0"])
        assert done.exit_code == 0, done.output

    convert("whole")
    convert("parts", "--set", "save.background=on", "--stop-after", "3")
    assert {path.name for path in (place / "parts.partial").iterdir()} == {
        "run.json", "latest", "metrics.jsonl", "state-00000002", "state-00000003",
    }
    convert("parts", "--resume")
    one, other = ((place / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other
