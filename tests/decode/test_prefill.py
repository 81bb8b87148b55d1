"""Reading prompts: what a forward is asked for, and in pieces of which length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flarec.decode.engine import PREFILL_ALONE, PREFILL_CHUNK, chunk_on, longest_piece
from flarec.decode.graphs import PlainReplays
from flarec.decode.scheduler import PREFILL_ROWS
from flarec.decode.stores import Shelf
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
    assert [longest_piece(torch.device("cuda"), count) for count in (1, 2, 8)] == [PREFILL_ROWS // n for n in (1, 2, 8)]
    assert [longest_piece(torch.device("cpu"), count) for count in (1, 2, 64)] == [512, 512, PREFILL_ROWS // 64]


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_a_prompt_alone_is_read_in_larger_pieces(prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many chunks as fit into the rows of a forward, all prompts together; who says how long pieces are has them."""
    monkeypatch.setitem(PREFILL_ALONE, "cpu", 24)
    monkeypatch.setitem(PREFILL_CHUNK, "cpu", 4)
    model = FakeModel(agreement=0.7)
    engine, _ = make_engine(model, 3)
    program = engine.program = Recorded(engine.program)
    engine._causal = lambda: program
    texts = [[1 + index] * 42 for index in range(prompts)]
    found = engine.generate(texts, mode="causal", max_new_tokens=2, batch=prompts)
    longest = {1: 24, 2: 12, 5: 4}[prompts]
    sizes = [tokens for tokens, _ in program.steps]
    assert sizes[:-1] == [longest] * (42 // longest) + [42 % longest] * (42 % longest > 0)
    program.steps.clear()
    assert [item.token_ids for item in engine.generate(texts, mode="causal", max_new_tokens=2, prefill_chunk=4)] == [
        item.token_ids for item in found
    ]
    assert [tokens for tokens, _ in program.steps] == [4] * 10 + [2, 1]


@pytest.mark.parametrize("modes", [("causal", "causal"), ("ar-trust", "causal")], ids=str)
def test_who_runs_goes_on_between_pieces(modes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever mode: a long prompt is then read a chunk at a time, and at once when all others have ended."""
    monkeypatch.setitem(PREFILL_ALONE, "cpu", 1000)
    monkeypatch.setitem(PREFILL_CHUNK, "cpu", 4)
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    program = engine.program = Recorded(engine.program)
    engine._causal = lambda: program
    running = engine.add([1, 2, 3], mode=modes[0], max_new_tokens=12)
    engine.step()
    reading = engine.add([5] * 100, mode=modes[1], max_new_tokens=2)
    pieces: list[list[int]] = []
    while not reading.tokens:
        program.steps.clear()
        before = len(running.tokens)
        engine.step()
        assert running.finished or len(running.tokens) > before
        pieces.append([tokens for tokens, _ in program.steps if tokens % 16])  # 16: of a step with four blocks
        if not running.finished:
            assert not reading.tokens and max(pieces[-1]) == 4
    assert len(pieces) > 3 and max(pieces[-1]) > 40


def test_steps_behind_a_queued_piece_are_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for it, with graphs and without."""
    monkeypatch.setitem(PREFILL_CHUNK, "cpu", 4)
    for shelf in (None, Shelf(PlainReplays)):
        engine, _ = make_engine(FakeModel(agreement=0.7), 3)
        engine.shelf = shelf
        engine.add([1, 2, 3], mode="ar-trust", max_new_tokens=40)
        for _ in range(6):
            engine.step()
        (lane,) = engine._serving.lanes.values()
        timed: list[bool] = []
        monkeypatch.setattr(lane.mode, "timed", lambda shape, seconds, timed=timed: timed.append(True))
        engine.add([5] * 18, mode="ar-trust", max_new_tokens=2)
        for _ in range(4):
            engine.step()
        assert lane.reading is not None and not timed
        for _ in range(4):
            engine.step()
        assert lane.reading is None and timed
