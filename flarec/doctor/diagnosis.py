"""From a source to a report: opened, captured, lowered; each step can end it with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flarec.checkpoint.directory import refuse_converted
from flarec.checkpoint.manifest import Manifest
from flarec.checkpoint.merging import check_mergeable
from flarec.errors import CaptureError, CheckpointError, PassError, PropertyError, UsageError
from flarec.frontend.export import capture
from flarec.frontend.loading import judge_source, meta_model
from flarec.inspect import summarize
from flarec.passes import lower
from flarec.recipe import Recipe
from flarec.train.adapter import adapter_of
from flarec.train.precision import DTYPES, resolve_precision
from flarec.train.quantized_base import quantize_base

from .data import examine_data
from .estimates import estimated
from .kernels import availability, sites
from .report import Report
from .source import anatomy, located, wrapper_of
from .steps import training_program

NOT_CONVERTED = (CaptureError, PassError, PropertyError)


def _refuse_converted(source: str, location: str) -> None:
    """Raise `CaptureError`, which is a verdict; other faults of a checkpoint's files are errors."""
    if Path(location).is_dir():
        manifest = Manifest.read(Path(location))
        try:
            refuse_converted(source, manifest)
        except CheckpointError as error:
            raise CaptureError(str(error)) from error


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
    gguf: str | None = None,
    dequantize: bool = False,
    merge_adapter: str | None = None,
    data: Sequence[str] = (),
    say: Callable[[str], None] = _silent,
) -> Report:
    """Examine a model.

    source     model directory, configuration file or hub id; weights are not read
    recipe     block size, views and losses of the training step
    length     tokens per row in training, positions of a request in serving; batch: rows, and requests
    device     whose speed counts
    dtype      that serves; default: float32 on the CPU, else as stored. Training is in the recipe's precision
    kernels    also tell what `--kernels triton` would do with every site
    estimate   tell memory and time
    gguf, dequantize, merge_adapter  as in `flarec convert`
    data       training data to examine too, as `--data` of `flarec convert` names them
    say        called with a line before each slow part

    Raises `UsageError` for a source that is not there, and for a length or batch that no step can have; `DataError` for
    data that cannot be read.
    """
    _check_sizes(length, batch, recipe)
    train_dtype = DTYPES[resolve_precision(recipe.optimizer.precision, device)]
    report = Report(
        source=source, converts=False, reason=None, anatomy=None, capture_seconds=None, length=length, batch=batch,
        recipe=recipe.name, block_size=recipe.diffusion.block_size,
        train_dtype=str(train_dtype).removeprefix("torch."), serve_dtype="",
    )
    with located(source, gguf) as location:
        try:
            if merge_adapter is not None:
                _check_adapter(merge_adapter)
            text, model = _opened(source, location, train_dtype, dequantize, say)
            if data:
                say("reading data")
                report = replace(report, data=examine_data(source, gguf, location, text, data, recipe, length))
            wrapper = wrapper_of(location)
            report = replace(report, anatomy=anatomy(model, None, wrapper))
            _refuse_converted(source, location)
            say(f"capturing {type(model).__name__}")
            start = time.perf_counter()
            captured = capture(model, cache=True)
            report = replace(report, capture_seconds=time.perf_counter() - start)
            adapter = adapter_of(recipe)
            serve_dtype = _serving_dtype(text, dtype, device, dequantize)
            served = captured
            if serve_dtype != train_dtype:
                served = capture(meta_model(text, serve_dtype), cache=True)
            decode = lower(served, "decode", mask_vector=recipe.mask_choice == "vector", adapter=adapter)
            held = captured.clone()
            quantize_base(held, recipe, say)
            train = training_program(held, recipe, device)
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
    return estimated(report, train, decode, recipe, device, model.config, say) if estimate else report


def _check_sizes(length: int, batch: int, recipe: Recipe) -> None:
    shortest = max(2, recipe.diffusion.block_size)
    if length < shortest or batch < 1:
        raise UsageError(
            f"length {length} and batch {batch} cannot be used; give at least {shortest} tokens and one row"
        )


def _opened(
    source: str, location: str, dtype: torch.dtype, dequantize: bool, say: Callable[[str], None]
) -> tuple[Any, Any]:
    """The configuration of the text model, and the model on the meta device; `say` is told what is unusual of it.

    Raises `CaptureError` for one that transformers does not open, `UsageError` for a hub id that cannot be fetched.
    """
    try:
        facts = judge_source(location, weights=False, dequantize=dequantize)
        for note in facts.notes:
            say(note)
        if not Path(location).is_dir():
            say(f"of {source} the configuration alone was judged: its weights are once they are downloaded")
        return facts.text, meta_model(facts.text, dtype)
    except UsageError as error:
        if not Path(source).exists():
            raise
        text = str(error)  # of a configuration file: its copy has another name
        raise CaptureError(source + text.removeprefix(location) if text.startswith(location) else text) from error


def _check_adapter(path: str) -> None:
    try:
        check_mergeable(Path(path))
    except UsageError as error:
        raise CaptureError(str(error)) from error


def _serving_dtype(text: Any, dtype: torch.dtype | None, device: torch.device, dequantize: bool) -> torch.dtype:
    if dtype is not None:
        return dtype
    if device.type == "cpu":
        return torch.float32
    stored: torch.dtype | None = torch.bfloat16 if dequantize else text.dtype
    return stored or torch.float32
