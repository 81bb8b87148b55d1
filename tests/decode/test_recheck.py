"""Diffusion-Trust and elastic decoding with a recheck: against slow decoders, and against causal decoding."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from flarec.base.generation import GenerationOptions
from flarec.decode import Generation
from flarec.decode.graphs import PlainReplays
from flarec.decode.stores import Shelf
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine, random_options, random_prompts
from tests.decode.recheck_oracles import Rechecked, rechecked_elastic, rechecked_trust

SHARES = [0.01, 0.1, 0.5, 1.0]
WAYS = [("diffusion-trust", "causal"), ("diffusion-trust", "block_end"), ("elastic", "causal")]


def case(seed: int) -> tuple[random.Random, FakeModel, list[list[int]], list[GenerationOptions], list[int]]:
    rng = random.Random(seed)
    model = FakeModel(vocab=rng.choice([5, 17]), agreement=rng.choice([0.0, 0.5, 0.8, 1.0]), key=seed)
    prompts = random_prompts(rng, model, rng.randint(1, 4))
    each = [replace(random_options(rng), max_new_tokens=rng.randint(1, 25)) for _ in prompts]
    return rng, model, prompts, each, rng.sample(range(model.mask), rng.randint(0, 1))


def same(result: Generation, oracle: Rechecked) -> None:
    assert oracle.done is not None
    tokens, reason = oracle.done
    assert (result.token_ids, result.stop_reason) == (tokens, reason)
    assert result.origins == oracle.origins[: len(tokens)]
    assert (result.forwards, result.taken_back) == (oracle.forwards, oracle.taken_back)
    counts = Counter(oracle.kept + [0] * (oracle.forwards - len(oracle.kept)))
    assert result.accepted == [counts[n] for n in range(max(counts) + 1)]
    drafted = len(tokens) - sum(origin in ("clean", "corrected") for origin in result.origins)
    counted = sum(n * times for n, times in enumerate(result.accepted))
    assert counted == drafted or (counted > drafted and result.origins[-1] in ("accepted", "unverified"))


@pytest.mark.parametrize(("mode", "readout"), WAYS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_mode_equals_its_oracle(size: int, mode: str, readout: str) -> None:
    back = kept = 0
    for seed in range(16):
        rng, model, prompts, each, eos = case(1000 * size + seed)
        engine, _ = make_engine(model, size, readout=readout, eos=eos)
        if rng.random() < 0.5:
            engine.shelf = Shelf(PlainReplays)
        share, threshold = rng.choice(SHARES), rng.choice([0.0, 0.3, 0.6])
        steps = rng.choice([None, 1, 2, size + 2])
        found = engine.generate(
            prompts, each, mode=mode, threshold=threshold, denoising_steps=steps, recheck=share,
            prefill_chunk=rng.choice([1, 3, 512]),
        )
        for prompt, params, result in zip(prompts, each, found, strict=True):
            oracle = Rechecked(model, prompt, params, eos, params.max_new_tokens, share)
            if mode == "elastic":
                same(result, rechecked_elastic(oracle, size, threshold))
            else:
                same(result, rechecked_trust(oracle, size, readout, threshold, steps or size))
            back, kept = back + result.taken_back, kept + result.origins.count("unverified")
        assert engine.stats.taken_back == sum(result.taken_back for result in found)
    if size > 1 or mode == "elastic":
        assert back and kept, "tokens were taken back, and some were kept that the clean stream did not choose"


@pytest.mark.parametrize(("mode", "readout"), WAYS)
def test_a_recheck_of_one_is_causal_decoding(mode: str, readout: str) -> None:
    back = 0
    for seed in range(20):
        rng, model, prompts, each, eos = case(seed)
        engine, _ = make_engine(model, rng.choice([2, 3, 4]), readout=readout, eos=eos)
        given: dict[str, Any] = {"threshold": rng.choice([0.0, 0.4]), "denoising_steps": rng.choice([None, 1])}
        found = engine.generate(prompts, each, mode=mode, recheck=1.0, **given)
        for result, causal in zip(found, engine.generate(prompts, each, mode="causal"), strict=True):
            assert (result.token_ids, result.stop_reason) == (causal.token_ids, causal.stop_reason)
            assert {*result.origins} <= {"clean", "accepted", "corrected"}
            back += result.taken_back
    assert back


@pytest.mark.parametrize(("mode", "readout"), WAYS)
def test_a_recheck_of_zero_is_none(mode: str, readout: str) -> None:
    for seed in range(6):
        _, model, prompts, each, eos = case(seed)
        engine, program = make_engine(model, 3, readout=readout, eos=eos)
        found = [engine.generate(prompts, each, mode=mode, threshold=0.3, recheck=share) for share in (None, 0.0)]
        half = len(program.calls) // 2
        assert program.calls[:half] == program.calls[half:]
        values = [
            [(row.token_ids, row.forwards, row.accepted, row.origins, row.taken_back) for row in rows] for rows in found
        ]
        assert values[0] == values[1] and not any(row.taken_back for row in found[0])
        assert engine.stats.taken_back == 0


@pytest.mark.parametrize(("mode", "readout"), WAYS)
def test_what_is_emitted_is_final(mode: str, readout: str) -> None:
    """Tokens come in order and stay; a stop check sees each of them once more, from the first on."""
    model = FakeModel(agreement=0.6, key=5)
    engine, _ = make_engine(model, 4, readout=readout)
    emitted: list[int] = []
    seen: list[list[int]] = []

    def check(tokens: Any) -> int | None:
        seen.append(list(tokens))
        return 9 if len(tokens) == 11 else None

    result = engine.generate(
        [[1, 2, 3]], mode=mode, threshold=0.2, recheck=0.3, max_new_tokens=40,
        on_tokens=lambda index, tokens: emitted.extend(tokens), stop_check=check,
    )[0]
    assert result.stop_reason == "stop" and len(result.token_ids) == 9
    assert seen == [seen[-1][:count] for count in range(1, 12)]
    assert result.token_ids == emitted[:9] == seen[-1][:9]
    assert result.taken_back


def test_the_forward_that_takes_back() -> None:
    """Blocks of 3 behind a prompt of 5 tokens: the second draft of the first block is wrong."""
    model = FakeModel(right=lambda anchor, offset: not (anchor == 5 and offset == 1))
    engine, program = make_engine(model, 3)
    emitted: list[list[int]] = []
    result = engine.generate(
        [[4, 0, 7, 7, 2]], mode="diffusion-trust", threshold=0.0, recheck=1.0, max_new_tokens=7,
        on_tokens=lambda index, tokens: emitted.append(tokens),
    )[0]
    # x5 is a clean row's; 6 and 7 are drafts, of which 7 is taken back: x7 is committed alone, before a block at 8
    assert [call.clean[0] for call in program.calls] == [[0, 1, 2, 3, 4], [5, 6, 7], [7], [8, 9, 10]]
    assert [call.blocks[0][0][0] for call in program.calls] == [5, 8, 8, 11]
    assert [len(tokens) for tokens in emitted] == [1, 2, 1, 3]  # x5; x6 x7; x8; x9 x10 x11
    assert result.origins == ["clean", "accepted", "corrected", "clean", "accepted", "accepted", "clean"]
    assert (result.forwards, result.taken_back, result.accepted) == (4, 1, [2, 1, 1])
    assert [call.heads for call in program.calls] == [1 + 2, 3 + 2, 1 + 2, 3 + 2]


def test_a_block_that_holds_an_end_is_finished() -> None:
    """What follows the end token is not filled: it costs a commit, and no more denoising steps."""
    model = FakeModel(agreement=1.0, key=2)
    engine, program = make_engine(model, 4)
    text = engine.generate([[1, 2]], mode="causal", max_new_tokens=4)[0].token_ids
    assert text[1] not in text[:1]
    result = engine.generate(
        [[1, 2]], mode="diffusion-trust", threshold=1.0, recheck=1.0, eos_ids=[text[1]], max_new_tokens=20
    )[0]
    assert result.token_ids == text[:2] and result.stop_reason == "eos"
    assert [call.clean[0] for call in program.calls][-3:] == [[0, 1], [], [2, 3, 4, 5]]  # of which two are accepted


def test_requests_with_other_ends_share_no_forward() -> None:
    """Behind which token a block is finished is part of a step."""
    model = FakeModel(agreement=1.0, key=2)
    engine, _ = make_engine(model, 4)
    given: dict[str, Any] = {"mode": "diffusion-trust", "recheck": 0.5, "max_new_tokens": 12}
    together = engine.generate([[1, 2], [1, 2]], [GenerationOptions(eos_ids=frozenset({t})) for t in (3, 9)], **given)
    for token, result in zip((3, 9), together, strict=True):
        alone = engine.generate([[1, 2]], eos_ids=[token], **given)[0]
        assert (alone.token_ids, alone.forwards) == (result.token_ids, result.forwards)
