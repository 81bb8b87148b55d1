"""Random ids as noise: what the blocks of a step show, whatever runs beside a request (docs/semantics.md section 3)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from flarec.decode import Engine
from flarec.decode.policy import CAUSAL, Drafting
from flarec.decode.prefix import PrefixCache
from flarec.errors import GenerationError
from flarec.kernels.sampling import reference

from .fake_model import FakeModel, FakeProgram
from .helpers import RandomPolicy, hold
from .test_graphs import with_graphs

RANGES = ((2, 6), (9, 14))
POOL = [*range(2, 6), *range(9, 14)]
SIZE = 3


def engine_of(model: FakeModel, readout: str = "causal", **options: Any) -> tuple[Engine, FakeProgram]:
    """The id of the mask has a meaning for the fake model, and is in no pool."""
    program = FakeProgram(model)
    wide = FakeProgram(model, calls=program.calls, horizon=SIZE)
    engine = Engine(
        program, mask_token_id=model.vocab, noise_ids=RANGES, block_size=SIZE, readouts={"ar-trust": readout},
        eos_ids=(), max_positions=10_000, horizon=lambda: wide, suppress=[model.mask], **options,
    )
    return engine, program


def prompts_of(rng: random.Random, count: int = 4) -> list[list[int]]:
    return [[rng.randrange(16) for _ in range(rng.randint(1, 12))] for _ in range(count)]


@pytest.mark.parametrize(("drafts", "readout"), [("branches", "causal"), ("single", "block_end"), ("auto", "causal")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ar_trust_stays_exact_and_shows_the_hash(drafts: str, readout: str, temperature: float) -> None:
    """Every noisy row shows the id of its request's seed and its position: never the mask, and in every block."""
    model = FakeModel(agreement=0.8)
    engine, program = engine_of(model, readout)
    prompts = prompts_of(random.Random(1))
    if drafts == "auto":  # whatever a policy chooses, without a clock
        choices = [CAUSAL, Drafting(1, False), Drafting(SIZE)]
        hold(engine, RandomPolicy(choices, random.Random(2)))
    options: dict[str, Any] = {"temperature": temperature, "seed": 7, "max_new_tokens": 120, "eos_ids": ()}
    wanted = engine.generate(prompts, mode="causal", **options)
    program.calls.clear()
    found = engine.generate(prompts, mode="ar-trust", drafts=drafts, **options)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert any(sum(one.accepted[1:]) for one in found)
    blocks = [block for call in program.calls for row in call.blocks for block in row]
    assert blocks
    for anchor, ids in blocks:
        assert ids == [reference.random_id(7, anchor + offset, POOL) for offset in range(len(ids))]


@pytest.mark.parametrize("mode", ["ar-trust", "elastic"])
def test_a_request_is_what_it_is_alone(mode: str) -> None:
    """Texts of elastic decoding depend on what its blocks show, as the forwards of AR-Trust do: both on nothing else,
    beside others, in slots, with chunks of prompts, in the buffers of graphs, and behind a prefix that a request of
    another seed has read."""
    model = FakeModel(agreement=0.9)
    prompts, seeds = prompts_of(random.Random(2), 4), [3, 4, 2**40, 0]
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 10, "temperature": 0.7, "eos_ids": ()}
    if mode == "elastic":
        options["threshold"] = 0.05
    rounds = [list(zip(prompts, order, strict=True)) for order in (seeds, seeds[::-1])]
    alone = {
        (*prompt, seed): engine_of(model)[0].generate([prompt], seed=seed, **options)[0]
        for pairs in rounds for prompt, seed in pairs
    }
    for graphs, slots, chunk in ((False, 64, 4), (True, 2, 5), (False, 3, 1)):
        engine, _ = engine_of(model)
        if graphs:
            with_graphs(engine)
        engine.prefixes = PrefixCache(10**7, 4)
        for pairs in rounds:
            engine._serving = engine._scheduler(slots, chunk)
            requests = [engine.add(prompt, seed=seed, **options) for prompt, seed in pairs]
            while engine.busy:
                engine.step()
            for request, (prompt, seed) in zip(requests, pairs, strict=True):
                found, wanted = request.generation(), alone[*prompt, seed]
                assert found.token_ids == wanted.token_ids and found.accepted == wanted.accepted
        assert engine.stats.known_tokens
    assert len({tuple(one.accepted) for one in alone.values()}) > 1


def test_diffusion_trust_is_refused() -> None:
    engine, program = engine_of(FakeModel())
    with pytest.raises(GenerationError, match="random ids, which do not say what positions of a block are still mask"):
        engine.generate([[1, 2]], mode="diffusion-trust")
    assert not program.calls
