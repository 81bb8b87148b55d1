"""From a model directory or checkpoint to the program that a target's pipeline makes of it, without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.lowered import pipeline_of
from flarec.errors import UsageError
from flarec.frontend.export import capture
from flarec.ir.pipeline import Pass, run_pipeline
from flarec.ir.program import Program
from flarec.passes.plugins import load_plugins
from flarec.passes.properties import CHECKS

CAPTURE = "capture"
"""Name that stands for "before the first pass" where a pass is asked for."""


def steps_of(
    path: str | Path,
    target: str,
    *,
    kernels: str = "torch",
    passes: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    adapter: str | Path | None = None,
) -> list[Pass]:
    """The passes that a model or checkpoint goes through; plugins are loaded. adapter: of a model whose adapter lies
    elsewhere."""
    load_plugins(plugins)
    known = adapter is not None or Path(path).is_dir()
    manifest = open_checkpoint(path, adapter=adapter).manifest if known else None
    return pipeline_of(manifest, target, kernels=kernels, foreign=passes, plugins=plugins)


def open_program(
    path: str | Path,
    target: str = "train",
    *,
    after: str | None = None,
    kernels: str = "torch",
    passes: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    debug: bool = False,
    on_pass: Callable[[str, Program], None] | None = None,
) -> Program:
    """Capture a model from its configuration alone (on the meta device) and run a target's pipeline.

    target: "train" or "decode". after: name of the last pass to run, "capture" for none; the whole pipeline by default.
    passes, plugins: passes of others, see `flarec.passes.pipeline`. Of a checkpoint the manifest's pipeline is run.
    adapter: of a model whose adapter lies elsewhere. dtype: of the run, as stored by default. Graphs are kept in the
    program cache and taken from there.
    `debug` checks all properties after each pass. `on_pass`: see `run_pipeline`.
    Raises `UsageError` for an unknown target or pass, otherwise what `capture` and the passes raise.
    """
    steps = steps_of(path, target, kernels=kernels, passes=passes, plugins=plugins, adapter=adapter)
    if after is not None:
        names = [CAPTURE, *(step.name for step in steps)]
        if after not in names:
            raise UsageError(f"the pipeline '{target}' has no pass '{after}'; choose one of {', '.join(names)}")
        steps = steps[: names.index(after)]
    captured = capture(path, dtype=dtype, device="meta", cache=True)
    return run_pipeline(captured, steps, CHECKS, debug=debug, on_pass=on_pass)
