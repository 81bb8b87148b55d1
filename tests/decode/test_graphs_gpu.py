"""CUDA graphs of real programs: the tokens of plain steps, and one wait per step."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from flarec.base.generation import Drafts, GenerationOptions, Mode
from flarec.decode import Engine
from flarec.decode.horizon import HorizonProgram
from flarec.decode.noise_ids import Ranges
from flarec.decode.policy import CAUSAL, Drafting
from flarec.decode.stores import Static
from flarec.ir.compiled import compiled_by_region, step_codes
from flarec.ir.program import Program
from flarec.passes import lower
from tests.decode.helpers import RandomPolicy, hold, random_options
from tests.decode.test_scheduler import WAYS
from tests.models import VOCABULARY, tiny_model
from tests.passes.test_predict_horizon import SIZE, add_head, steps_with

GRAPHED = ("qwen3_5_text", "lfm2", "bamba")


def program_of(family: str) -> Program:
    from flarec.frontend.export import capture

    return capture(tiny_model(family).cuda())


def engine_of(captured: Program, graphs: str, block: int = SIZE, noise_ids: Ranges = ()) -> Engine:
    """Of a captured program; elastic decoding is by a random head."""
    program = lower(captured, "decode", kernels="triton")

    @cache
    def horizon() -> HorizonProgram:
        elastic = captured.clone()
        add_head(elastic, seed=0)
        return HorizonProgram(lower(elastic, "decode", steps=steps_with(kernels="triton")))

    return Engine(
        program, mask_token_id=VOCABULARY - 1, block_size=block, eos_ids=[2], max_positions=4096, graphs=graphs,
        suppress=[VOCABULARY - 1], readouts={"ar-trust": "causal", "diffusion-trust": "block_end"},
        horizon=horizon, noise_ids=noise_ids,
    )


@pytest.mark.gpu
def test_random_ids_are_drawn_inside_of_graphs() -> None:
    """By request and position, as plain steps draw them: texts, and how many drafts were accepted."""
    program, rng = program_of("qwen3_5_text"), random.Random(1)
    prompts = [[rng.randrange(3, VOCABULARY - 1) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    each = [replace(random_options(rng), max_new_tokens=40) for _ in prompts]
    plain, graphed = (engine_of(program, graphs, noise_ids=((3, 90), (95, 500))) for graphs in ("off", "auto"))
    for way in ({"mode": "ar-trust"}, {"mode": "ar-trust", "drafts": "single"}, {"mode": "elastic", "threshold": 0.0}):
        expected = plain.generate(prompts, each, batch=5, **way)
        for _ in range(2):
            found = graphed.generate(prompts, each, batch=5, **way)
            assert [(one.token_ids, one.accepted) for one in found] == [
                (one.token_ids, one.accepted) for one in expected
            ], way
    assert not graphed.stats.eager and graphed.stats.replays > 0.5 * graphed.stats.steps


@pytest.mark.gpu
@pytest.mark.parametrize("family", GRAPHED)
def test_graphs_on_equals_graphs_off_on_a_gpu(family: str) -> None:
    """Every mode, with requests that join and leave; the second call finds its graphs."""
    program = program_of(family)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCABULARY - 1) for _ in range(rng.randint(1, 40))] for _ in range(12)]
    each = [replace(random_options(rng), max_new_tokens=rng.randint(1, 60)) for _ in prompts]
    plain, graphed = engine_of(program, "off"), engine_of(program, "auto")
    for way in [*WAYS, {"mode": "elastic", "threshold": 0.0}]:  # a random head's drafts are never sure
        expected = [item.token_ids for item in plain.generate(prompts, each, batch=5, **way)]
        for _ in range(2):
            found = [item.token_ids for item in graphed.generate(prompts, each, batch=5, **way)]
            assert found == expected, way
    assert not graphed.stats.eager and graphed.stats.replays > 0.5 * graphed.stats.steps


@pytest.mark.gpu
@pytest.mark.parametrize("drafts", ["auto", "horizon"])
@pytest.mark.parametrize("family", GRAPHED)
def test_shapes_may_follow_one_another_on_a_gpu(family: str, drafts: Drafts) -> None:
    """Blocks of random sizes: pending rows are spread between replays, and read where wider ones lay."""
    program, rng = program_of(family), random.Random(0)
    prompts = [[rng.randrange(3, VOCABULARY - 1) for _ in range(rng.randint(1, 40))] for _ in range(6)]
    each = [replace(random_options(rng), max_new_tokens=60, eos_ids=frozenset()) for _ in prompts]
    expected = [item.token_ids for item in engine_of(program, "off").generate(prompts, each, mode="causal")]
    graphed = engine_of(program, "auto")
    hold(graphed, RandomPolicy([CAUSAL, Drafting(1, False, int(drafts == "horizon")), Drafting(SIZE)], rng))
    for batch in (1, 3):
        found = graphed.generate(prompts, each, batch=batch, mode="ar-trust", drafts=drafts)
        assert [item.token_ids for item in found] == expected
    assert not graphed.stats.eager and graphed.stats.replays > 0.4 * graphed.stats.steps


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_waits_once(way: dict[str, Any]) -> None:
    """Replayed steps wait for their result only (an event, which this mode of CUDA does not count as a wait)."""
    engine = engine_of(program_of("qwen3_5_text"), "auto")
    engine.generate([[5, 6, 7]], max_new_tokens=60, eos_ids=(), **way)
    request = engine.add([5, 6, 7], max_new_tokens=60, eos_ids=(), **way)
    for _ in range(6):
        engine.step()
    before, steps = engine.stats.replays, engine.stats.steps
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(5):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not request.finished and engine.stats.replays - before == engine.stats.steps - steps == 5
    assert not [str(item.message) for item in found if "synchroniz" in str(item.message)]
    engine.cancel(request)


@pytest.mark.gpu
def test_a_model_that_waits_says_so() -> None:
    """Experts have matrices of computed sizes: their steps are run, and --stats says why."""
    program = program_of("qwen3_5_moe_text")
    engine, plain = engine_of(program, "auto"), engine_of(program, "off")
    expected = plain.generate([[5, 6, 7]], mode="ar-trust", max_new_tokens=40)[0].token_ids
    assert engine.generate([[5, 6, 7]], mode="ar-trust", max_new_tokens=40)[0].token_ids == expected
    assert engine.stats.replays == 0 and "waits for the device" in engine.stats.eager


@pytest.mark.gpu
def test_compiled_graphs_give_the_tokens_of_plain_causal_steps() -> None:
    """Of the first two kinds of steps, compiled for their sizes, and of others; states are overwritten in place."""
    captured = program_of("qwen3_5_text")
    plain = engine_of(captured, "off")
    program, codes = lower(captured, "decode", kernels="triton", fast=True, regions=True), step_codes(exact=2)

    def make(given: Any) -> Program:
        return compiled_by_region(given, codes)

    engine = Engine(
        program, mask_token_id=VOCABULARY - 1, block_size=SIZE, eos_ids=(), max_positions=4096, static=Static(make),
        suppress=[VOCABULARY - 1], readouts={"ar-trust": "causal"},
    )
    prompts = [[5, 17, 33, 2, 8], [7], [101, 4, 4, 9]]
    for temperature in (0.0, 1.0):
        each = GenerationOptions(max_new_tokens=40, temperature=temperature, eos_ids=frozenset())
        wanted = [item.token_ids for item in plain.generate(prompts, each, mode="causal")]
        ways: list[tuple[Mode, int]] = [("causal", 1), ("ar-trust", 1), ("ar-trust", 3)]
        for mode, batch in ways:
            found = [item.token_ids for item in engine.generate(prompts, each, mode=mode, batch=batch)]
            assert found == wanted, (mode, batch, temperature)
    assert engine.stats.replays > 100 and not engine.stats.eager
