"""What the doctor says against what happens: allocated bytes and the time of a real training step, on the CPU."""

from __future__ import annotations

import functools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flarec.decode import BlockSpec, Cache, Stepper
from flarec.doctor import rates as rates_module
from flarec.doctor.estimates import opening
from flarec.doctor.rates import FAR, NEAR, _bandwidth, measure, seconds_of
from flarec.doctor.report import Memory, Rates
from flarec.doctor.simulate import ATTENTION, BATCHED, GATHER, MATMUL, MEMORY, Work
from flarec.doctor.steps import Training, cache_bytes, decode_step, simulate_serving, simulate_training
from flarec.frontend.export import capture
from flarec.frontend.tiny import build_tiny
from flarec.ir.program import Program
from flarec.passes import lower
from flarec.recipe import load_recipe
from flarec.train.adapter import adapter_of
from flarec.train.data.packing import full_rows
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken
from flarec.train.objective.batch import build_batches
from flarec.train.objective.noise import step_generator
from flarec.train.quantized_base import held_once, quantize_base
from tests.doctor.machine import Machine

LENGTH, BATCH, WIDTH = 128, 2, 256
CPU = torch.device("cpu")
RECIPE = load_recipe("flare").override([f"optimizer.batch_rows={BATCH}", f"optimizer.micro_rows={BATCH}"])


@functools.cache
def real(family: str) -> Program:
    """Four layers of width 256: small, and large enough that arithmetic counts."""
    return capture(build_tiny(family, hidden_size=WIDTH, intermediate_size=2 * WIDTH, vocab_size=2048))


@functools.cache
def simulated(family: str) -> Training:
    return simulate_training(lower(real(family), "train"), RECIPE, length=LENGTH, batch=BATCH, device=CPU)


def trainer(family: str) -> Trainer:
    program = lower(real(family), "train")
    mask = MaskToken("row", program.vocab_size - 1)
    return Trainer(program, RECIPE, mask, full_rows(LENGTH, BATCH), seed=0)


def peak_bytes(run: Trainer) -> int:
    """The most that torch's CPU allocator handed out in a step beside weights, gradients and moments."""
    run.advance()  # makes gradients and moments
    batches = build_batches(run.rows.rows(BATCH), run.recipe.diffusion, run.mask.token_id, step_generator(0, 0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run.accumulate(batches)
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear"])
def test_training_memory_is_what_torch_allocates(family: str) -> None:
    """Within 5 %: scratch memory inside of operations is not seen. Measured: 0.2 %."""
    run = trainer(family)
    parts = simulated(family).memory.parts
    count = sum(parameter.numel() for parameter in run.parameters.values())
    assert parts["gradients"] == 4 * count
    assert 0 <= parts["weights"] - 4 * count < 4096, "rotary frequencies and the like"
    assert 0 <= parts["AdamW moments"] - 8 * count < 4096, "step counters"
    assert parts["activations"] == pytest.approx(peak_bytes(run), rel=0.05)
    assert simulated(family).memory.total == sum(parts.values())


def test_memory_of_8_bit_moments_is_what_the_optimizer_keeps() -> None:
    """Codes and scales, and activations as with float32's; a step's own decoded values are gone before they come."""
    chosen = RECIPE.override(["optimizer.moments=8bit"])
    program = lower(real("qwen3_5_text"), "train")
    parts = simulate_training(program, chosen, length=LENGTH, batch=BATCH, device=CPU).memory.parts
    run = Trainer(program, chosen, MaskToken("row", program.vocab_size - 1), full_rows(LENGTH, BATCH), seed=0)
    run.advance()
    kept = sum(value.nbytes for state in run.optimizer.state.values() for value in state.values())
    assert parts["AdamW moments"] == kept
    count = sum(parameter.numel() for parameter in run.parameters.values())
    assert 2 * count < kept < 2.1 * count
    assert parts["activations"] == pytest.approx(simulated("qwen3_5_text").memory.parts["activations"], rel=1e-3)


@pytest.mark.parametrize("base", ["stored", "int8"])
def test_memory_of_an_adapter_is_what_torch_allocates(base: str) -> None:
    """A frozen model without gradients and moments, as it is or in codes, and activations of noisy rows."""
    chosen = load_recipe("draft").override([
        f"optimizer.batch_rows={BATCH}", f"optimizer.micro_rows={BATCH}", "adapter.rank=8", "objective.ar_weight=0",
        f"adapter.base={base}",
    ])
    held = real("qwen3_5_text") if base == "stored" else real.__wrapped__("qwen3_5_text")  # its values go
    quantize_base(held, chosen, print)
    program = lower(held, "train", mask_vector=True, adapter=adapter_of(chosen))
    parts = simulate_training(program, chosen, length=LENGTH, batch=BATCH, device=CPU).memory.parts
    mask = MaskToken("vector", program.vocab_size)
    run = Trainer(program, chosen, mask, full_rows(LENGTH, BATCH), seed=0)
    count = sum(parameter.numel() for parameter in run.parameters.values())
    every = sum(parameter.numel() for parameter in program.parameters().values())
    codes = sum(weight.nbytes for weight in held_once(program))
    assert 10 * count < every if base == "stored" else codes > every
    assert parts["gradients"] == 4 * count
    assert 0 <= parts["weights"] - 4 * every - codes < 4096
    assert 0 <= parts["AdamW moments"] - 8 * count < 8192, "step counters"
    assert parts["activations"] == pytest.approx(peak_bytes(run), rel=0.05)


    if base == "int8":
        whole = sum(value.nbytes for value in real("qwen3_5_text").parameters().values())
        small, large = Memory({"weights": whole // 2}), Memory({"weights": 2 * whole})
        before = {"weights, before they are codes": whole, "Python and libraries": 10}
        assert opening(small, program, 10).parts == before
        assert opening(large, program, 10) is large


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear"])
def test_memory_of_layers_that_are_computed_again(family: str) -> None:
    """What torch allocates, and less than with everything kept: of four layers one at a time is whole."""
    chosen = RECIPE.override(["train.memory=recompute"])
    program = lower(real(family), "train")
    again = simulate_training(program, chosen, length=LENGTH, batch=BATCH, device=CPU).memory.parts
    mask = MaskToken("row", program.vocab_size - 1)
    run = Trainer(lower(real(family), "train"), chosen, mask, full_rows(LENGTH, BATCH), seed=0)
    assert again["activations"] == pytest.approx(peak_bytes(run), rel=0.05)
    assert again["activations"] < 0.6 * simulated(family).memory.parts["activations"]


def test_more_tokens_and_views_need_more() -> None:
    program = lower(real("qwen3_5_text"), "train")
    base = simulated("qwen3_5_text").memory.parts
    several = RECIPE.override(["train.shard=parameters"])  # of several ranks: it is told of one
    one = simulate_training(program, several, length=LENGTH, batch=1, device=CPU).memory.parts
    assert one["weights"] == base["weights"]
    assert 0.4 < one["activations"] / base["activations"] < 0.7
    draft = load_recipe("draft")  # one view instead of two: two thirds of the tokens
    fewer = simulate_training(program, draft, length=LENGTH, batch=BATCH, device=CPU).memory.parts
    assert fewer["activations"] < 0.85 * base["activations"]


MACHINE = functools.partial(Machine, call=2e-5, flops=1e9, bandwidth=1e9, gather=5e8)
"""Slow, so that the micro-benchmark calls each operation a few times only."""


@pytest.fixture(scope="module")
def speed() -> Rates:
    """What the micro-benchmark finds, told the time by the machine's clock."""
    with pytest.MonkeyPatch.context() as patch, MACHINE() as machine:
        patch.setattr(rates_module, "time", SimpleNamespace(perf_counter=machine.clock))
        return measure(CPU, torch.float32, WIDTH)


def test_the_micro_benchmark_finds_the_speed_of_a_known_machine(speed: Rates) -> None:
    """Within 2 % for arithmetic and memory; small tensors are a tenth slower, for each call has its own time."""
    for kind in (MATMUL, BATCHED, ATTENTION):
        assert speed.flops[kind] == pytest.approx(1e9, rel=0.02)
    assert speed.far == pytest.approx({MEMORY: 1e9, GATHER: 5e8}, rel=0.02)
    assert speed.near == pytest.approx({MEMORY: 1e9, GATHER: 5e8}, rel=0.1)
    assert speed.call == pytest.approx(2e-5, rel=0.05)


def test_the_time_of_a_step_is_that_of_a_known_machine(speed: Rates) -> None:
    """Counted work at measured rates against what the operations of a real step take: forward, backward and update.

    How close the prediction comes on a real machine is measured by `benchmarks/doctor_estimates.py`.
    """
    run = trainer("qwen3_5_text")
    run.advance()
    with MACHINE() as machine:
        run.advance()
    work = simulated("qwen3_5_text").micro_batch + simulated("qwen3_5_text").update
    assert seconds_of(work, speed) == pytest.approx(machine.seconds, rel=0.05)


def test_serving_memory_and_steps() -> None:
    program = lower(real("kimi_linear"), "decode")
    serving = simulate_serving(program, length=200, batch=3, block_size=4, device=CPU)
    cache = Cache.allocate(program.cache_slots, 3, 200, CPU)
    allocated = sum(tensor.nbytes for tensor in cache.tensors.values())
    assert allocated <= serving.memory.parts["caches"] < allocated + 256, "and two counters per request"
    fixed, each = cache_bytes(program.cache_slots)
    assert allocated == 3 * (fixed + each * cache.capacity)
    flops = {name: sum(work.flops.values()) for name, work in serving.steps.items()}
    assert list(flops) == ["prefill of 199 tokens", "causal", "AR-Trust", "Diffusion-Trust"]
    assert flops["causal"] < flops["Diffusion-Trust"] < flops["AR-Trust"] < flops["prefill of 199 tokens"]


def test_the_time_of_decoding_steps_is_that_of_a_known_machine(speed: Rates) -> None:
    """The same operations, and their time within 5 %, where calls are most of it."""
    program = lower(real("qwen3_5_text"), "decode")
    serving = simulate_serving(program, length=200, batch=2, block_size=4, device=CPU)
    cache = Cache.allocate(program.cache_slots, 2, 200, CPU)
    cache.length = torch.full((2,), 100)
    stepper = Stepper(program, cache, BlockSpec(4, 4, "causal", 0))
    decode_step(stepper, 1, [])  # what a step commits are the rows of the one before
    for name, clean, anchors in (("causal", 1, []), ("AR-Trust", 5, [1, 2, 3, 4, 5]), ("Diffusion-Trust", 0, [0])):
        with torch.no_grad(), MACHINE() as machine:
            decode_step(stepper, clean, anchors)
        work = serving.steps[name]
        assert sum(work.calls.values()) == machine.operations, name
        assert seconds_of(work, speed) == pytest.approx(machine.seconds, rel=0.05), name


def rates(device: str = "cpu", call: float = 1e-6) -> Rates:
    return Rates(device, "float32", 1, {MATMUL: 1e9}, {MEMORY: 8e9, GATHER: 4e9}, {MEMORY: 2e9, GATHER: 1e9}, call)


def test_time_of_counted_work() -> None:
    work = Work()
    work.add(MATMUL, 10**9, 1000)
    assert seconds_of(work, rates()) == pytest.approx(1 + 1e-6)
    work.add(MEMORY, 0, 8000)
    work.add(MEMORY, 0, 8000)
    assert seconds_of(work, rates()) == pytest.approx(1 + 2e-6 + 3e-6)
    work.add(GATHER, 0, 1 << 30)
    assert seconds_of(work, rates()) == pytest.approx(1 + 2e-6 + 4e-6 + (1 << 30) / 1e9)
    small = Work(Counter(), Counter(), Counter())
    small.add(MEMORY, 0, 8)
    assert seconds_of(small, rates("cuda")) == pytest.approx(1e-6), "launches overlap with what the GPU does"


def test_bandwidth_falls_from_caches_to_main_memory() -> None:
    found = [_bandwidth(rates(), MEMORY, moved) for moved in range(8, 40)]
    assert found[0] == pytest.approx(8e9) and found[-1] == pytest.approx(2e9)
    assert sorted(found, reverse=True) == found
    assert math.isclose(_bandwidth(rates(), MEMORY, NEAR), 8e9) and math.isclose(_bandwidth(rates(), MEMORY, FAR), 2e9)
