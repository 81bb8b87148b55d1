"""Every mode against a slow decoder without cache or batch, over random models, prompts and parameters."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flarec.base.generation import GenerationOptions
from flarec.decode import Generation
from flarec.errors import GenerationError
from tests.decode import oracles
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine, random_options, random_prompts

SIZES = [1, 2, 3, 4, 5]


def same(result: Generation, oracle: oracles.Oracle) -> None:
    assert result.token_ids == oracle.tokens
    assert result.stop_reason == oracle.reason
    assert result.forwards == oracle.forwards
    assert result.accepted == oracle.accepted()
    assert result.origins == oracle.origins
    assert result.new_tokens == len(oracle.tokens)
    assert result.tokens_per_forward == len(oracle.tokens) / oracle.forwards
    assert result.seconds > 0


def case(seed: int) -> tuple[random.Random, FakeModel, list[list[int]], dict[str, Any]]:
    rng = random.Random(seed)
    model = FakeModel(vocab=rng.choice([5, 17]), agreement=rng.choice([0.0, 0.5, 0.8, 1.0]), key=seed)
    prompts = random_prompts(rng, model, rng.randint(1, 4))
    options = {
        "options": [replace(random_options(rng), max_new_tokens=rng.randint(1, 25)) for _ in prompts],
        "prefill_chunk": rng.choice([1, 3, 512]),
    }
    return rng, model, prompts, options


@pytest.mark.parametrize("seed", range(20))
def test_causal_equals_the_oracle(seed: int) -> None:
    rng, model, prompts, options = case(seed)
    eos = rng.sample(range(model.mask), rng.randint(0, 1))
    engine, _ = make_engine(model, eos=eos)
    results = engine.generate(prompts, mode="causal", **options)
    for index, result in enumerate(results):
        params, limit = options["options"][index], options["options"][index].max_new_tokens
        same(result, oracles.causal(model, prompts[index], params, eos, limit))


@pytest.mark.parametrize("readout", ["causal", "block_end"])
@pytest.mark.parametrize("drafts", ["branches", "single"])
@pytest.mark.parametrize("size", SIZES)
def test_ar_trust_equals_causal_and_takes_the_forwards_of_the_oracle(size: int, drafts: str, readout: str) -> None:
    for seed in range(6):
        rng, model, prompts, options = case(1000 * size + seed)
        eos = rng.sample(range(model.mask), rng.randint(0, 1))
        engine, _ = make_engine(model, size, readout=readout, eos=eos)
        results = engine.generate(prompts, mode="ar-trust", drafts=drafts, **options)
        causal = engine.generate(prompts, mode="causal", **options)
        for index, result in enumerate(results):
            params, limit = options["options"][index], options["options"][index].max_new_tokens
            assert result.token_ids == causal[index].token_ids
            branches = drafts == "branches"
            same(result, oracles.ar_trust(model, prompts[index], params, eos, limit, size, readout, branches))
            assert sum(result.accepted) == result.forwards - 1
            emitted = 1 + sum((a + 1) * steps for a, steps in enumerate(result.accepted))
            assert result.new_tokens <= emitted <= result.new_tokens + size
            dropped = emitted - result.new_tokens  # behind the end: first the last step's own token, then its drafts
            counted = sum(a * steps for a, steps in enumerate(result.accepted))
            assert result.origins.count("accepted") == counted - max(0, dropped - 1)
            assert result.new_tokens - result.origins.count("accepted") == result.forwards - min(dropped, 1)


@pytest.mark.parametrize("readout", ["causal", "block_end"])
@pytest.mark.parametrize("size", SIZES)
def test_diffusion_trust_equals_the_oracle(size: int, readout: str) -> None:
    for seed in range(12):
        rng, model, prompts, options = case(1000 * size + seed)
        eos = rng.sample(range(model.mask), rng.randint(0, 1))
        engine, _ = make_engine(model, size, readout=readout, eos=eos)
        threshold = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0])
        steps = rng.choice([None, 1, 2, size + 2])
        options |= {"threshold": threshold, "denoising_steps": steps}
        results = engine.generate(prompts, mode="diffusion-trust", **options)
        for index, result in enumerate(results):
            params, limit = options["options"][index], options["options"][index].max_new_tokens
            oracle = oracles.diffusion_trust(
                model, prompts[index], params, eos, limit, size, readout, threshold, steps or size
            )
            same(result, oracle)
            assert sum(result.accepted) == result.forwards
            assert result.accepted[0] == 0, "a step commits at least one position"
            committed = sum(c * count for c, count in enumerate(result.accepted))
            assert result.new_tokens <= committed < result.new_tokens + size + 1


@pytest.mark.parametrize("size", SIZES)
def test_elastic_equals_the_oracle(size: int) -> None:
    taken = set()
    for seed in range(12):
        rng, model, prompts, options = case(1000 * size + seed)
        eos = rng.sample(range(model.mask), rng.randint(0, 1))
        engine, _ = make_engine(model, size, eos=eos)
        threshold = rng.choice([0.0, 0.3, 0.6])
        results = engine.generate(prompts, mode="elastic", threshold=threshold, **options)
        for index, result in enumerate(results):
            params, limit = options["options"][index], options["options"][index].max_new_tokens
            same(result, oracles.elastic(model, prompts[index], params, eos, limit, size, threshold))
            assert sum(result.accepted) == result.forwards
            taken |= {count for count, steps in enumerate(result.accepted) if steps}
    assert taken == set(range(size + 1)), "every number of drafts was taken"


@pytest.mark.parametrize("limit", ["horizon", "confidence"])
def test_elastic_without_safe_drafts_is_causal(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit == "horizon":
        monkeypatch.setattr(FakeModel, "horizon_from", lambda model, state, size: np.eye(size + 1, dtype=np.float32)[0])
    for seed in range(4):
        _, model, prompts, options = case(seed)
        engine, _ = make_engine(model, 3)
        each = [replace(item, top_k=0, top_p=1.0) for item in options.pop("options")]
        threshold = 1.0 if limit == "confidence" else 0.0
        results = engine.generate(prompts, each, mode="elastic", threshold=threshold, **options)
        causal = engine.generate(prompts, each, mode="causal", **options)
        assert [r.token_ids for r in results] == [r.token_ids for r in causal]
        assert [r.forwards for r in results] == [r.forwards for r in causal]


def test_elastic_is_refused_where_it_has_no_meaning() -> None:
    model = FakeModel()
    with pytest.raises(GenerationError, match=r"drafts read their whole block .* needs causal ones"):
        make_engine(model, 3, readout="block_end")[0].generate([[1]], mode="elastic")
    with pytest.raises(GenerationError, match="not converted"):
        make_engine(model, None)[0].generate([[1]], mode="elastic")
    engine, _ = make_engine(model, 3)
    engine._horizon = None
    with pytest.raises(GenerationError, match=r"no head that says how many drafts are safe.*flarec train-head"):
        engine.generate([[1]], mode="elastic")


def test_drafts_are_right_sometimes() -> None:
    """The cases above mean little if drafts are always or never accepted."""
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    histogram = engine.generate([[1, 2, 3]], mode="ar-trust", max_new_tokens=200)[0].accepted
    assert len(histogram) == 4 and all(count > 0 for count in histogram)
    steps = engine.generate([[1, 2, 3]], mode="diffusion-trust", max_new_tokens=200, threshold=0.35)[0].accepted
    assert len(steps) == 4 and steps[1] > 0 and steps[3] > 0


@pytest.mark.parametrize("mode", ["causal", "ar-trust", "diffusion-trust", "elastic"])
@pytest.mark.parametrize("drafts", ["branches", "single"])
def test_a_request_does_not_depend_on_its_batch(mode: str, drafts: str) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        model = FakeModel(agreement=0.7, key=seed)
        prompts = random_prompts(rng, model, 7, longest=20)
        each = [replace(random_options(rng), max_new_tokens=rng.randint(1, 30)) for _ in prompts]
        engine, _ = make_engine(model, 3, eos=[2])
        options: dict[str, Any] = {"mode": mode, "drafts": drafts, "threshold": 0.5}
        together = engine.generate(prompts, each, prefill_chunk=4, **options)
        for index, prompt in enumerate(prompts):
            alone = engine.generate([prompt], each[index], **options)[0]
            assert (alone.token_ids, alone.forwards, alone.accepted, alone.stop_reason) == (
                together[index].token_ids,
                together[index].forwards,
                together[index].accepted,
                together[index].stop_reason,
            )


@pytest.mark.parametrize("mode", ["causal", "ar-trust", "diffusion-trust"])
def test_long_generations_outgrow_the_first_allocation(mode: str) -> None:
    model = FakeModel(agreement=0.8)
    engine, program = make_engine(model, 4)
    result = engine.generate([[3] * 50, [1]], mode=mode, max_new_tokens=150)
    expected = oracles.causal(model, [3] * 50, GenerationOptions(), (), 150)
    assert [len(r.token_ids) for r in result] == [150, 150]
    if mode != "diffusion-trust":
        assert result[0].token_ids == expected.tokens
    assert max(max(row, default=0) for call in program.calls for row in call.clean) > 128
