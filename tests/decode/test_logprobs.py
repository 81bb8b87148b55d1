"""Log-probabilities of new tokens: those of the row that chose each, in every mode, whoever the neighbours are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from flarec.base.generation import GenerationOptions
from flarec.decode.graphs import PlainReplays
from flarec.decode.request import Request
from flarec.decode.stores import Shelf
from flarec.errors import GenerationError
from tests.decode import oracles
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine, random_options, random_prompts
from tests.decode.recheck_oracles import Rechecked, rechecked_elastic, rechecked_trust

WAYS: list[dict[str, Any]] = [
    {"mode": "causal"},
    {"mode": "ar-trust", "drafts": "branches"},
    {"mode": "ar-trust", "drafts": "single"},
    {"mode": "diffusion-trust", "threshold": 0.4, "denoising_steps": 3},
    {"mode": "diffusion-trust", "threshold": 0.2, "denoising_steps": 3, "recheck": 0.2},
    {"mode": "elastic", "threshold": 0.0, "recheck": 0.2},
]
SIZE = 3


def expected(model: FakeModel, prompt: list[int], request: Request) -> list[np.ndarray]:
    """Log-probabilities [V] of the rows that chose the tokens, in float64, from the definition of the mode."""
    options, tokens = request.options, request.tokens
    rows: list[np.ndarray] = []
    if options.recheck:
        assert options.threshold is not None and options.denoising_steps is not None
        oracle = Rechecked(model, prompt, options, [2], request.limit, options.recheck)
        if options.mode == "elastic":
            rechecked_elastic(oracle, SIZE, options.threshold)
        else:
            rechecked_trust(oracle, SIZE, "causal", options.threshold, options.denoising_steps)
        assert oracle.tokens[: len(tokens)] == tokens
        rows = oracle.rows
    elif options.mode == "diffusion-trust":
        assert options.threshold is not None and options.denoising_steps is not None
        found = oracles.diffusion_trust(
            model, prompt, options, [2], request.limit, SIZE, "causal", options.threshold, options.denoising_steps, rows
        )
        assert found.tokens == tokens
    else:
        rows = [model.clean(prompt + tokens[:count]) for count in range(len(tokens))]
    whole = np.array(rows[: len(tokens)], dtype=np.float64)
    whole[:, model.mask] = -np.inf
    return list(whole - np.log(np.exp(whole).sum(axis=1, keepdims=True)))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_they_are_those_of_the_row_that_chose(way: dict[str, Any], graphs: bool) -> None:
    rng = random.Random(1)
    model = FakeModel(agreement=0.7, key=3)
    engine, _ = make_engine(model, SIZE, eos=[2])
    if graphs:
        engine.shelf = Shelf(PlainReplays)
    engine._serving = engine._scheduler(4, 5)
    prompts = random_prompts(rng, model, 9)
    requests = []
    for index, prompt in enumerate(prompts):
        options = random_options(rng)
        wanted = [None, 0, 3, 3][index % 4]
        requests.append(engine.add(prompt, options, max_new_tokens=rng.randint(1, 20), logprobs=wanted, **way))
        for _ in range(rng.randint(0, 3)):
            engine.step()
    while engine.busy:
        engine.step()
    for prompt, request in zip(prompts, requests, strict=True):
        alone = engine.generate([prompt], request.options)[0]
        assert request.tokens == alone.token_ids  # whoever asks for them gets the same text
        if request.logprobs is None:
            assert request.chosen == []
            continue
        assert len(request.chosen) == len(request.tokens)
        for token, found, right in zip(request.tokens, request.chosen, expected(model, prompt, request), strict=True):
            assert found.logprob == pytest.approx(right[token], abs=1e-5)
            order = np.argsort(-right, kind="stable")[: request.logprobs]
            assert [index for index, _ in found.top] == order.tolist()
            assert [value for _, value in found.top] == pytest.approx(right[order].tolist(), abs=1e-5)


@pytest.mark.parametrize("mode", ["ar-trust", "diffusion-trust", "elastic"])
def test_where_the_text_is_causal_decodings_so_are_they(mode: str) -> None:
    """Of accepted tokens too: both rows chose these, and causal decoding has the clean one alone."""
    engine, _ = make_engine(FakeModel(agreement=0.9, key=4), SIZE)
    asked = GenerationOptions(temperature=0.8, seed=3, max_new_tokens=40)
    exact: dict[str, Any] = {} if mode == "ar-trust" else {"recheck": 1.0, "threshold": 0.0}
    found = [engine.add([1, 2], asked, logprobs=3, mode=mode, **exact)]
    found.append(engine.add([1, 2], asked, logprobs=3, mode="causal"))
    while engine.busy:
        engine.step()
    assert found[0].tokens == found[1].tokens and found[0].origins.count("accepted") > 9
    assert found[0].chosen == found[1].chosen


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_tokens_that_a_stop_check_takes_back_take_theirs_along(way: dict[str, Any]) -> None:
    engine, _ = make_engine(FakeModel(agreement=0.9), SIZE)

    def check(tokens: Sequence[int]) -> int | None:
        return 4 if len(tokens) == 6 else None

    request = engine.add([1, 2], GenerationOptions(max_new_tokens=30), logprobs=1, stop_check=check, **way)
    whole = engine.add([1, 2], GenerationOptions(max_new_tokens=30), logprobs=1, **way)
    while engine.busy:
        engine.step()
    assert (len(request.tokens), request.chosen) == (4, whole.chosen[:4])


def test_what_was_offered_is_counted() -> None:
    """Steps behind a rejection have no drafts under single; blocks behind every outcome always have some."""
    for drafts in ("branches", "single"):
        engine, _ = make_engine(FakeModel(agreement=0.7, key=2), SIZE)
        request = engine.add([1, 2], mode="ar-trust", drafts=drafts, max_new_tokens=40)
        while engine.busy:
            engine.step()
        assert sum(request.offered.values()) == sum(request.histogram.values()) == request.forwards - 1
        assert set(request.offered) == ({SIZE} if drafts == "branches" else {0, SIZE})
        assert request.histogram.get(0, 0) >= request.offered.get(0, 0)


@pytest.mark.parametrize("wanted", [-1, 21, True, 1.5, "3"])
def test_numbers_that_cannot_be_served(wanted: Any) -> None:
    engine, _ = make_engine(FakeModel(), SIZE)
    with pytest.raises(GenerationError, match=r"logprobs is .*; give a whole number, at least 0, at most 20"):
        engine.add([1], logprobs=wanted)
    assert not engine.busy


def test_a_reset_gives_everything_up() -> None:
    engine, _ = make_engine(FakeModel(), SIZE)
    requests = [engine.add([1, 2], max_new_tokens=9, mode=mode) for mode in ("causal", "ar-trust")]
    engine.step()
    engine.reset()
    assert not engine.busy and engine.step() == []
    again = engine.add([1, 2], max_new_tokens=9)
    while engine.busy:
        engine.step()
    assert again.generation().token_ids == engine.generate([[1, 2]], max_new_tokens=9)[0].token_ids
    assert not requests[0].finished
