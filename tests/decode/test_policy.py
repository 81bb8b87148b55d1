"""How much to draft: never slower than causal decoding, and what is fastest where drafting pays."""

from __future__ import annotations

import random
from typing import Any

import pytest

from flarec.decode.policy import DraftPolicy, sizes_of
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine
from tests.decode.test_graphs import with_graphs

WHOLE = {1: 1.12, 8: 1.2, 32: 2.2, 64: 3.0}
"""Cost of a step with 4 clean rows and 4 blocks of 3, to a causal one, by requests."""


def cost(rows: int, held: int, size: int) -> float:
    """Linear in the rows of a request, 1 for a causal step."""
    return 1 + (WHOLE[rows] - 1) * ((held + 1) * (size + 1) - 1) / 15


def share_for(tokens: float) -> float:
    """The acceptance per draft at which blocks of 3 yield this many tokens a step."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 + middle + middle**2 + middle**3 < tokens else (low, middle)
    return low


def run(policy: DraftPolicy, rows: int, share: float, steps: int, rng: random.Random) -> tuple[float, list[int]]:
    """(tokens per time to those of causal decoding, block sizes) of a simulated decoder."""
    held, tokens, time, used = 0, 0, 0.0, []
    for _ in range(steps):
        size = policy.next(rows)
        used.append(size)
        seconds, held = cost(rows, size, size), min(held, size)
        for _ in range(rows):
            right = 0
            while right < held and rng.random() < share:
                right += 1
            tokens += 1 + right
            policy.accepted(held, right)
        policy.timed(rows, size, seconds * rng.uniform(0.97, 1.03))
        held, time = size, time + seconds
    return tokens / rows / time, used


@pytest.mark.parametrize("rows", sorted(WHOLE))
@pytest.mark.parametrize("tokens", [1.0, 1.3, 1.7, 2.2, 2.65, 3.0, 3.5])
def test_never_slower_than_causal(rows: int, tokens: float) -> None:
    rate, _ = run(DraftPolicy(sizes_of(3, "causal")), rows, share_for(tokens), 4000, random.Random(rows))
    whole = tokens / WHOLE[rows]
    assert rate > 0.98 and rate > 0.95 * whole


def test_it_follows_the_text() -> None:
    policy, rng = DraftPolicy(sizes_of(3, "causal")), random.Random(0)
    _, used = run(policy, 8, 0.0, 3000, rng)
    assert used[-400:].count(0) > 380
    _, used = run(policy, 8, 0.95, 3000, rng)
    assert used[-400:].count(3) > 380
    _, used = run(policy, 8, 0.0, 1500, rng)
    assert used[-400:].count(0) > 380


def test_short_blocks_where_depth_does_not_pay() -> None:
    """Only the first draft is ever right: blocks of one are the best."""
    policy = DraftPolicy(sizes_of(3, "causal"))
    held, used = 0, []
    for _ in range(2000):
        size = policy.next(8)
        used.append(size)
        policy.accepted(min(held, size), min(held, size, 1))
        policy.timed(8, size, cost(8, size, size))
        held = size
    assert used[-300:].count(1) > 280


def test_block_end_knows_whole_blocks_only() -> None:
    assert sizes_of(4, "block_end") == (0, 4) and sizes_of(2, "causal") == (0, 1, 2)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("agreement", [0.0, 1.0])
def test_an_engine_that_chooses(monkeypatch: pytest.MonkeyPatch, agreement: float, graphs: bool) -> None:
    """With a clock that counts rows drafts never pay, with one that counts steps they always do; same text."""
    model = FakeModel(agreement=agreement)
    engine, program = make_engine(model, 3)
    expected = engine.generate([[1, 2, 3], [4]], max_new_tokens=120)
    if graphs:
        with_graphs(engine)

    def clock() -> float:
        rows = sum(len(row) + sum(len(ids) for _, ids in blocks) for call in program.calls
                   for row, blocks in zip(call.clean, call.blocks, strict=True))
        return rows if agreement == 0.0 else len(program.calls)

    monkeypatch.setattr("flarec.decode.rows.clock", clock)
    monkeypatch.setattr("flarec.decode.graphs.clock", clock)
    program.calls.clear()
    options: dict[str, Any] = {"mode": "ar-trust", "drafts": "auto", "max_new_tokens": 120}
    results = engine.generate([[1, 2, 3], [4]], **options)
    assert [item.token_ids for item in results] == [item.token_ids for item in expected]
    with_blocks = sum(any(call.blocks) for call in program.calls)
    if agreement == 0.0:
        assert with_blocks < 30 and results[0].forwards > 100
    else:
        assert results[0].forwards < 60
