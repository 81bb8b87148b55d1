"""Resuming around the ends of epochs: before, at and behind one, and after two, as if the run had not stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flarec.train.advice import MANY_EPOCHS
from flarec.train.data.packing import RowStream
from flarec.train.prepare import epochs_of
from flarec.train.state import StateDirectory
from tests.models import tiny_tokenizer
from tests.train.small_run import recipe, small, source

STEPS = 5
DATA = source(5)
EPOCHS = [1.4, 2.0, 2.4, 3.0, 3.4]
"""Passed behind each step, documents that wait for a row included: an epoch ends within steps and between two."""


def test_how_often_a_run_passes_over_its_data() -> None:
    """Each source by its weight; what is said before the first step is what a run of that length then has drawn."""
    sources = [replace(source(3), weight=2.0), replace(source(40), weight=1.0)]
    rows = RowStream(sources, max_length=64, seed=0, lookahead=4)
    before, chosen = rows.state_dict(), recipe("draft", "optimizer.steps=100")
    said = epochs_of(rows, chosen)
    assert rows.state_dict() == before
    rows.rows(100 * chosen.optimizer.batch_rows)
    assert said == pytest.approx(rows.epochs, rel=0.1)
    assert said[0] > 2 * MANY_EPOCHS > MANY_EPOCHS > said[1], "the small source is repeated, the large one is not"


def test_a_run_resumes_at_every_side_of_an_epochs_end(tmp_path: Path) -> None:
    set_up, chosen = small("qwen3_5_text"), recipe("draft", f"optimizer.steps={STEPS}")
    whole = set_up.trainer(chosen, data=DATA)
    epochs, log = [], []
    for step in range(1, STEPS + 1):
        log.append(whole.advance().read(tiny_tokenizer()))
        state = whole.state()
        position = state.values["rows"]["mixture"]
        epochs.append(position["epoch"][0] + position["position"][0] / len(DATA))
        directory = StateDirectory(tmp_path / f"{step}.partial")
        directory.create({})
        directory.save(step, state)
    assert epochs == EPOCHS
    expected = {name: value.clone() for name, value in whole.state().model.items()}
    for stop in range(1, STEPS):
        again = set_up.trainer(chosen, data=DATA)
        saved = StateDirectory(tmp_path / f"{stop}.partial").latest()
        assert saved is not None
        again.load(saved)
        assert [again.advance().read(tiny_tokenizer()) for _ in range(STEPS - stop)] == log[stop:], stop
        found = again.state().model
        assert all(torch.equal(found[name], value) for name, value in expected.items()), stop
