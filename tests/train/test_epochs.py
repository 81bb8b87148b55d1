"""Resuming around the ends of epochs: before, at and behind one, and after two, as if the run had not stopped."""

from __future__ import annotations

from pathlib import Path

import torch

from flarec.train.state import StateDirectory
from tests.models import tiny_tokenizer
from tests.train.small_run import recipe, small, source

STEPS = 5
DATA = source(5)
EPOCHS = [1.4, 2.0, 2.4, 3.0, 3.4]
"""Passed behind each step, documents that wait for a row included: an epoch ends within steps and between two."""


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
