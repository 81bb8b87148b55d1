"""What a model needs to be converted and served, told from its configuration alone.

The model is captured and lowered on the meta device, then one training step and the steps of decoding are run without
numbers: memory is what would live at the worst moment, time is the counted work at rates measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flarec.errors import CaptureError, PassError, PropertyError, UsageError
from flarec.frontend.export import capture
from flarec.inspect import summarize
from flarec.ir.program import Program
from flarec.passes import lower
from flarec.recipe import Recipe

from .kernels import availability, sites
from .rates import measure, seconds_of
from .report import Anatomy, Memory, Rates, Report, Site, Speed
from .source import anatomy, located, open_meta, wrapper_of
from .steps import Serving, Training, cache_bytes, simulate_serving, simulate_training

__all__ = ["Anatomy", "Memory", "Rates", "Report", "Site", "Speed", "diagnose"]

NOT_CONVERTED = (CaptureError, PassError, PropertyError)


def _silent(text: str) -> None:
    return None


def diagnose(
    source: str,
    recipe: Recipe,
    *,
    length: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    kernels: bool = False,
    estimate: bool = True,
    say: Callable[[str], None] = _silent,
) -> Report:
    """Examine a model.

    source     model directory, configuration file or hub id; weights are not read
    recipe     block size, views and losses of the training step
    length     tokens per row in training, positions of a request in serving; batch: rows, and requests
    device     whose speed counts
    dtype      that serves; default: float32 on the CPU, else as stored. Training is float32, as in `flarec convert`
    kernels    also tell what `--kernels triton` would do with every site
    estimate   tell memory and time
    say        called with a line before each slow part

    Raises `UsageError` for a source that is not there, and for a length or batch that no step can have.
    """
    if length < max(2, recipe.diffusion.block_size) or batch < 1:
        raise UsageError(
            f"length {length} and batch {batch} cannot be used; give at least {max(2, recipe.diffusion.block_size)} "
            "tokens and one row"
        )
    report = Report(
        source=source, converts=False, reason=None, anatomy=None, capture_seconds=None, length=length, batch=batch,
        recipe=recipe.name, block_size=recipe.diffusion.block_size, train_dtype="float32", serve_dtype="",
    )  # fmt: skip
    with located(source) as location:
        try:
            model = open_meta(location, torch.float32)
        except CaptureError as error:
            return replace(report, reason=str(error))
        except UsageError as error:
            if not Path(source).exists():  # a hub id that could not be fetched
                raise
            text = str(error)
            return replace(report, reason=source + text.removeprefix(location) if text.startswith(location) else text)
        wrapper = wrapper_of(location)
        report = replace(report, anatomy=anatomy(model, None, wrapper))
        say(f"capturing {type(model).__name__}")
        start = time.perf_counter()
        try:
            captured = capture(model)
            report = replace(report, capture_seconds=time.perf_counter() - start)
            train = lower(captured, "train")
            serve_dtype = _serving_dtype(location, dtype, device)
            served = captured if serve_dtype == torch.float32 else capture(open_meta(location, serve_dtype))
            decode = lower(served, "decode")
        except NOT_CONVERTED as error:
            return replace(report, reason=str(error))
    report = replace(
        report,
        converts=True,
        anatomy=anatomy(model, summarize(captured), wrapper),
        serve_dtype=str(serve_dtype).removeprefix("torch."),
        sites=sites(served) if kernels else (),
        kernels_note=availability(device) if kernels else "",
    )
    if not estimate:
        return report
    return _estimated(report, train, decode, recipe, device, serve_dtype, model.config, say)


def _serving_dtype(location: str, dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is not None:
        return dtype
    if device.type == "cpu":
        return torch.float32
    stored: torch.dtype = next(open_meta(location, None).parameters()).dtype
    return stored


def _estimated(
    report: Report,
    train: Program,
    decode: Program,
    recipe: Recipe,
    device: torch.device,
    serve_dtype: torch.dtype,
    config: Any,
    say: Callable[[str], None],
) -> Report:
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
    rates = {dtype: measure(device, dtype, width) for dtype in dict.fromkeys((torch.float32, serve_dtype))}
    return replace(
        report,
        convert=training.memory,
        serve=serving.memory,
        cache_bytes=cache_bytes(decode.cache_slots),
        rates=tuple(rates.values()),
        speed=_speed(training, serving, rates[torch.float32], rates[serve_dtype], recipe, batch),
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
