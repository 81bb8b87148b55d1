"""Reading prompts: what a forward is asked for, and in pieces of which length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flarec.decode.engine import PREFILL_CHUNK, chunk_on
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine


class Recorded:
    """A program that notes (tokens of a row, rows of the head) of its steps."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.steps: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def step(self, ids: Any, layout: Any, head_rows: Any, cache: Any) -> Any:
        self.steps.append((ids.shape[1], len(head_rows)))
        return self.program.step(ids, layout, head_rows, cache)


@pytest.mark.parametrize(("mode", "noisy", "heads"), [("causal", 0, 1), ("ar-trust", 3, 4)])
def test_the_head_sees_the_last_row_of_a_prompt_alone(mode: Any, noisy: int, heads: int) -> None:
    """And, at the end of it, those of the first block."""
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    program = engine.program = Recorded(engine.program)
    engine._causal = lambda: program
    engine.generate([[1] * 9, [2] * 10], mode=mode, max_new_tokens=1, prefill_chunk=4)
    assert program.steps[:3] == [(4, 0), (4, 0), (2 + noisy, 2 * heads)]


def test_pieces_are_longer_beside_a_gpu() -> None:
    assert chunk_on(torch.device("cpu")) == PREFILL_CHUNK["cpu"] < chunk_on(torch.device("cuda", 1))
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    assert engine.prefill_chunk == PREFILL_CHUNK["cpu"]
