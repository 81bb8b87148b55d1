"""Memory and time of a model that converts: its programs run without numbers, at the rates of the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from flarec.errors import CaptureError
from flarec.ir.program import Program
from flarec.recipe import Recipe

from .rates import measure, seconds_of
from .report import Rates, Report, Speed
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
    try:
        say(f"running a training step of {batch} x {length} tokens without numbers")
        training = simulate_training(train, recipe, length=length, batch=batch, device=device)
        say(f"running steps of decoding for {batch} x {length} positions without numbers")
        serving = simulate_serving(decode, length=length, batch=batch, block_size=block_size, device=device)
    except CaptureError as error:
        return replace(report, estimate_note=str(error))
    except RuntimeError as error:  # an operation that torch cannot run without numbers
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return replace(report, estimate_note=f"memory and time are not told: {lines[0]}")
    say(f"measuring {device}")
    width = int(config.get_text_config().hidden_size)
    rates = {dtype: measure(device, dtype, width) for dtype in dict.fromkeys((train.dtype, decode.dtype))}
    return replace(
        report,
        convert=training.memory,
        serve=serving.memory,
        cache_bytes=cache_bytes(decode.cache_slots),
        rates=tuple(rates.values()),
        speed=_speed(training, serving, rates[train.dtype], rates[decode.dtype], recipe, batch),
    )


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
