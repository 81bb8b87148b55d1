"""Logits that are no numbers: which requests end with an error, and what suppressed ids may hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.decode import Engine
from flarec.errors import GenerationError
from flarec.layout import Layout
from tests.decode.fake_model import FakeModel, FakeProgram
from tests.decode.helpers import make_engine

MODES: list[tuple[str, dict[str, Any]]] = [
    ("causal", {}),
    ("ar-trust", {"drafts": "branches"}),
    ("ar-trust", {"drafts": "single"}),
    ("diffusion-trust", {"threshold": 0.3}),
    ("diffusion-trust", {"threshold": 0.3, "recheck": 0.5}),
    ("elastic", {"threshold": 0.0, "recheck": 0.5}),
]
PROMPTS = [[1, 2, 3], [4], [5, 6]]
Change = Callable[[Tensor, Tensor, Tensor, int], None]  # logits [N, V], their request and slot [N], clean slots


def spoilt(model: FakeModel, change: Change, *, after: int = 0) -> Engine:
    """An engine whose programs change their logits in place, from its step number `after` on."""
    engine, program = make_engine(model, 3)
    assert engine._horizon is not None
    _change(program, change, after)
    _change(engine._horizon(), change, after)
    return engine


def _change(program: Any, change: Change, after: int) -> None:
    step = FakeProgram.step

    def wrong(ids: Tensor, layout: Layout, rows: Tensor, cache: Any) -> Tensor:
        logits = step(program, ids, layout, rows, cache)
        if len(program.calls) > after:
            change(logits, rows // layout.length, rows % layout.length, layout.clean_length)
        return logits

    program.step = wrong


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize(("mode", "options"), MODES)
def test_the_prompt_is_named(mode: str, options: dict[str, Any], after: int, value: float, temperature: float) -> None:
    def change(logits: Tensor, request: Tensor, slot: Tensor, clean: int) -> None:
        logits[request == 1, 2] = value

    engine = spoilt(FakeModel(agreement=0.9), change, after=after)
    with pytest.raises(GenerationError, match=r"the logits of prompt 1 are not finite after [0-9]+ new tokens"):
        engine.generate(PROMPTS, mode=mode, max_new_tokens=30, temperature=temperature, top_p=0.9, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize(("mode", "options"), MODES)
def test_a_suppressed_id_may_hold_anything(mode: str, options: dict[str, Any], value: float) -> None:
    model = FakeModel(agreement=0.9)

    def change(logits: Tensor, request: Tensor, slot: Tensor, clean: int) -> None:
        logits[:, [7, model.mask]] = value

    asked: dict[str, Any] = {"mode": mode, "max_new_tokens": 20, "temperature": 1e6, "suppress": [7], **options}
    expected = make_engine(model, 3)[0].generate(PROMPTS, **asked)
    result = spoilt(model, change).generate(PROMPTS, **asked)
    assert [item.token_ids for item in result] == [item.token_ids for item in expected]
    assert not {7, model.mask} & {token for item in result for token in item.token_ids}


@pytest.mark.parametrize("drafts", ["branches", "single"])
def test_a_draft_that_cannot_be_chosen_is_a_wrong_draft(drafts: str) -> None:
    model = FakeModel(agreement=0.9)

    def change(logits: Tensor, request: Tensor, slot: Tensor, clean: int) -> None:
        logits[slot >= clean] = torch.nan

    causal = make_engine(model, 3)[0].generate(PROMPTS, max_new_tokens=20, temperature=1.0)
    result = spoilt(model, change).generate(PROMPTS, mode="ar-trust", drafts=drafts, max_new_tokens=20, temperature=1.0)
    assert [item.token_ids for item in result] == [item.token_ids for item in causal]


@pytest.mark.parametrize("share", [0.01, 1.0])
@pytest.mark.parametrize(("mode", "threshold"), [("diffusion-trust", 0.0), ("diffusion-trust", 0.9), ("elastic", 0.0)])
def test_a_token_that_a_noisy_row_cannot_choose_is_never_kept(mode: str, threshold: float, share: float) -> None:
    """Not even where the id in its place is right, or nearly: no such token is emitted, nor a number of its row."""
    model = FakeModel(vocab=8, agreement=0.9)

    def change(logits: Tensor, request: Tensor, slot: Tensor, clean: int) -> None:
        logits[slot >= clean] = torch.nan

    asked: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5}
    causal = make_engine(model, 3)[0].generate(PROMPTS, **asked)
    assert sum(item.token_ids.count(0) for item in causal) > 9
    engine = spoilt(model, change)
    requests = [
        engine.add(prompt, mode=mode, threshold=threshold, recheck=share, logprobs=1, **asked) for prompt in PROMPTS
    ]
    while engine.busy:
        engine.step()
    for request, right in zip(requests, causal, strict=True):
        assert request.generation().token_ids == right.token_ids
        assert {*request.origins} <= {"clean", "corrected"}
        assert all(math.isfinite(found.logprob) for found in request.chosen)
        assert bool(request.taken_back) == (mode == "diffusion-trust")  # elastic decoding does not take such drafts


@pytest.mark.parametrize(("mode", "options"), MODES)
def test_what_comes_after_the_end_does_not_count(mode: str, options: dict[str, Any]) -> None:
    """A request that has ended before the bad logits would have been used is not touched by them."""
    model = FakeModel(agreement=1.0)
    free = make_engine(model, 3)[0].generate([[1, 2]], mode=mode, max_new_tokens=12, **options)[0]

    def change(logits: Tensor, request: Tensor, slot: Tensor, clean: int) -> None:
        logits.fill_(torch.nan)

    engine = spoilt(model, change, after=free.forwards)
    assert engine.generate([[1, 2]], mode=mode, max_new_tokens=12, **options)[0].token_ids == free.token_ids
