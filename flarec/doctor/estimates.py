"""Memory and time of a model that converts: its programs run without numbers, at the rates of the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from flarec.decode.break_even import verdict
from flarec.decode.engine import SLOTS
from flarec.device import memory_of, resident
from flarec.errors import CaptureError, UsageError
from flarec.ir.program import Program
from flarec.recipe import Recipe
from flarec.threads import settle
from flarec.train.quantized_base import held_once

from .rates import measure, seconds_of
from .report import Memory, Rates, Report, Speed
from .steps import Serving, Training, cache_bytes, simulate_serving, simulate_training


def estimated(
    report: Report,
    train: Program,
    decode: Program,
    recipe: Recipe,
    device: torch.device,
    config: Any,
    say: Callable[[str], None],
) -> Report:
    """`report` with memory, caches, rates and times; where a step cannot be run without numbers, with the reason.

    train, decode  lowered programs on the meta device, in the dtypes of training and serving
    config         of the model; say: called with a line before each slow part
    """
    length, batch, block_size = report.length, report.batch, recipe.diffusion.block_size
    if report.anatomy is not None:
        settle(report.anatomy.parameters)
    libraries = resident()[0] if device.type == "cpu" else 0  # before anything is simulated
    try:
        say(f"running a training step of {batch} x {length} tokens without numbers")
        training = simulate_training(train, recipe, length=length, batch=batch, device=device)
        say(f"running steps of decoding for {batch} x {length} positions without numbers")
        serving = simulate_serving(decode, length=length, batch=batch, block_size=block_size, device=device)
        if "diffusion-trust" not in recipe.readouts():
            serving.steps.pop("Diffusion-Trust")
    except CaptureError as error:
        return replace(report, estimate_note=str(error))
    except RuntimeError as error:  # an operation that torch cannot run without numbers
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return replace(report, estimate_note=f"memory and time are not told: {lines[0]}")
    caches = cache_bytes(decode.cache_slots)
    convert = whole_memory(training.memory, caches, recipe, length, libraries)
    serve = Memory({**serving.memory.parts, **_of_libraries(libraries)})
    memory = memory_of(device)
    note = "layers are computed again (train.memory = recompute)" if recipe.train.memory == "recompute" else ""
    if recipe.train.memory == "auto" and memory is not None and convert.total > memory:
        say("too little memory: running a training step whose layers are computed again")
        recipe, training, note = _again(train, recipe, training, length, batch, device)
        convert = whole_memory(training.memory, caches, recipe, length, libraries)

    if train.quantized and device.type == "cpu":
        convert = opening(convert, train, libraries)

    def needs(shorter: int) -> int:
        say(f"too little memory: running a training step of {batch} x {shorter} tokens without numbers")
        step = simulate_training(train, recipe, length=shorter, batch=batch, device=device)
        return whole_memory(step.memory, caches, recipe, shorter, libraries).total

    advice = too_small(convert.total, memory, length, max(2, block_size), needs)
    say(f"measuring {device}")
    width = int(config.get_text_config().hidden_size)
    rates = {dtype: measure(device, dtype, width) for dtype in dict.fromkeys((train.dtype, decode.dtype))}
    served = {name: seconds_of(work, rates[decode.dtype]) for name, work in serving.steps.items()}
    return replace(
        report,
        convert=convert,
        serve=serve,
        cache_bytes=caches,
        rates=tuple(rates.values()),
        speed=_speed(training, serving, rates[train.dtype], rates[decode.dtype], recipe, batch),
        memory=memory,
        memory_note=note,
        advice=advice,
        pays=verdict(served["AR-Trust"], served["causal"], block_size=block_size),
    )


def _again(
    train: Program, recipe: Recipe, kept: Training, length: int, batch: int, device: torch.device
) -> tuple[Recipe, Training, str]:
    """The recipe and its step with layers that are computed again, and a sentence; what is given if there is none."""
    chosen = recipe.override(["train.memory=recompute"])
    try:
        found = simulate_training(train, chosen, length=length, batch=batch, device=device)
    except UsageError as error:
        return recipe, kept, str(error)
    more = (kept.memory.total - found.memory.total) / 1e9
    return chosen, found, f"layers are computed again (train.memory = auto): keeping all needs {more:.1f} GB more"


def whole_memory(step: Memory, caches: tuple[int, int], recipe: Recipe, length: int, libraries: int) -> Memory:
    """What a conversion needs at most: a step's memory, or that of an evaluation if it is more, and what the process
    has beside its tensors. A save writes what is there and takes nothing.

    caches: bytes per request and per position; libraries: of the process (in main memory).
    """
    parts = dict(step.parts)
    fixed, each = caches
    requests = min(SLOTS, recipe.evaluation.prompts) if recipe.evaluation.every else 0
    evaluation = requests * (fixed + each * (length + recipe.evaluation.max_new_tokens))
    if evaluation > parts["activations"]:
        del parts["activations"]
        parts["caches of an evaluation"] = evaluation
    return Memory({**parts, **_of_libraries(libraries)})


def opening(convert: Memory, train: Program, libraries: int) -> Memory:
    """`convert`, or what is there before a model becomes codes if it is more: on a CPU the whole of it, in the dtype of
    training. To a GPU its matrices come one at a time."""
    stored = sum(held.shape[0] * held.shape[1] for held in held_once(train)) * train.dtype.itemsize
    whole = stored + sum(value.nbytes for name, value in train.parameters().items() if name not in train.extra)
    before = Memory({"weights, before they are codes": whole, **_of_libraries(libraries)})
    return before if before.total > convert.total else convert


def _of_libraries(count: int) -> dict[str, int]:
    return {"Python and libraries": count} if count else {}


def too_small(
    needed: int, memory: int | None, length: int, shortest: int, needs: Callable[[int], int]
) -> tuple[str, ...]:
    """Advice for a device whose `memory` is less than what is `needed`; none if it is enough, or not known.

    needs: what a conversion with shorter rows takes; asked for halves of `length`, down to `shortest`.
    """
    if memory is None or needed <= memory:
        return ()
    lines = [f"this machine is too small: {needed / 1e9:.1f} GB are needed, and it has {memory / 1e9:.1f} GB"]
    while length // 2 >= shortest:
        length //= 2
        needed = needs(length)
        if needed <= memory:
            return (*lines, f"--max-length {length} needs {needed / 1e9:.1f} GB")
    return (*lines, "no length of rows is short enough; take an adapter recipe, or a machine with more memory")


def _speed(
    training: Training, serving: Serving, train_rates: Rates, serve_rates: Rates, recipe: Recipe, batch: int
) -> tuple[Speed, ...]:
    rows = max(batch, recipe.optimizer.batch_rows)
    passes = -(-rows // batch)
    whole = training.micro_batch.times(passes) + training.update
    counted = [(f"training step ({rows} rows, {batch} at a time)", whole, train_rates)]
    counted += [(f"decoding: {name}", work, serve_rates) for name, work in serving.steps.items()]
    return tuple(
        Speed(
            name, seconds_of(work, rates), sum(work.flops.values()), sum(work.bytes.values()), sum(work.calls.values())
        )
        for name, work, rates in counted
    )
