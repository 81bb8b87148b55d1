"""Inputs made a step ahead: the same steps, a position that belongs to the steps taken, errors where they belong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.errors import DataError
from flarec.recipe import Recipe
from flarec.train.data.sources import TokenSource
from flarec.train.feed import Feed, mapped, tensors_of
from flarec.train.loop import Trainer
from flarec.train.state import StateDirectory
from tests.models import tiny_tokenizer
from tests.train.small_run import recipe, small, source

FAMILY = "qwen3_5_text"


def trainer(chosen: Recipe, ahead: bool, data: TokenSource | None = None) -> Trainer:
    made = small(FAMILY).trainer(chosen, data=data)
    feed = made.feed
    made.feed = Feed(feed.program, feed.recipe, feed.mask, feed.rows, feed.seed, ahead=ahead)
    return made


def log(made: Trainer, steps: int) -> list[dict[str, Any]]:
    return [made.advance().read(tiny_tokenizer()) for _ in range(steps)]


PHASES = [
    "diffusion.loss=el", "diffusion.earlier_losses=kl:0.4", "diffusion.grids=2", "diffusion.grid_offset=random",
    'diffusion.earlier_block_sizes=["1:0.2", "2:0.6"]',
]


@pytest.mark.parametrize(("name", "overrides"), [("dual", []), ("draft", PHASES)])
def test_steps_are_the_same_and_resume_bit_for_bit(name: str, overrides: list[str], tmp_path: Path) -> None:
    chosen = recipe(name, "optimizer.steps=6", *overrides)
    plain = trainer(chosen, ahead=False)
    expected = log(plain, 6)
    weights = {name: value.clone() for name, value in plain.state().model.items()}
    if overrides:
        sizes = [len(line["one_minus_tv"]) for line in expected]
        assert sizes == [1, 1, 2, 2, 3, 3]
        assert [line["diffusion_losses"] for line in expected] == [["kl"]] * 3 + [["el"]] * 3
        assert [line["diffusion_loss"] < 0 for line in expected] == [False] * 3 + [True] * 3

    first = trainer(chosen, ahead=True)
    assert log(first, 3) == expected[:3]
    assert first.feed.next is not None and first.feed.next[0] == 3, "the fourth step is being made"
    directory = StateDirectory(tmp_path / "out.partial")
    directory.create({})
    directory.save(3, first.state())
    assert log(first, 1) == expected[3:4], "saving disturbs nothing"

    state = directory.latest()
    assert state is not None
    second = trainer(chosen, ahead=True)
    log(second, 1)  # what was made ahead of here is dropped
    second.optimizer.state.clear()
    second.load(state)
    assert log(second, 3) == expected[3:]
    assert all(torch.equal(value, weights[name]) for name, value in second.state().model.items())
    assert second.feed.next is None, "nothing is made behind the last step"


def test_the_position_is_that_of_the_steps_taken() -> None:
    chosen = recipe("dual", "optimizer.steps=9")
    plain, ahead = trainer(chosen, ahead=False), trainer(chosen, ahead=True)
    for _ in range(3):
        plain.advance()
        ahead.advance()
        assert ahead.feed.next is not None
        ahead.feed.next[1].result()
        assert plain.state().values["rows"] == ahead.state().values["rows"] != ahead.rows.state_dict()


def test_bad_data_stop_the_step_that_reads_them() -> None:
    """A document that contains the mask token, first drawn for the second step."""
    chosen = recipe("draft", "optimizer.batch_rows=1", "optimizer.steps=9")
    plain = trainer(chosen, ahead=False)
    drawn = [plain.rows.rows(1)[0].documents[0].ids for _ in range(2)]
    data = source()
    bad = next(n for n in range(len(data)) if data.document(n).ids.tolist() == drawn[1].tolist())
    data.tokens[data.starts[bad] + 2] = plain.mask.token_id
    for ahead in (False, True):
        made = trainer(chosen, ahead=ahead, data=data)
        made.advance()
        with pytest.raises(DataError, match="contains the mask token"):
            made.advance()


@dataclass(frozen=True)
class Inner:
    value: Tensor
    name: str


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    lone: Tensor
    nothing: Tensor | None = None


def test_tensors_are_found_wherever_they_are() -> None:
    given = Outer((Inner(torch.zeros(2), "a"), Inner(torch.ones(3), "b")), torch.ones(1))
    assert [len(tensor) for tensor in tensors_of({"x": [given]})] == [2, 3, 1]
    doubled = mapped(given, lambda tensor: tensor * 2)
    assert doubled.parts[1].value.tolist() == [2.0, 2.0, 2.0] and doubled.parts[1].name == "b"
    assert doubled.lone.item() == 2 and given.lone.item() == 1 and doubled.nothing is None
