"""From a model directory or checkpoint to the program that a target's pipeline makes of it, without weights."""

from __future__ import annotations

from pathlib import Path

from flarec.checkpoint.directory import open_checkpoint
from flarec.errors import UsageError
from flarec.frontend.export import capture
from flarec.ir.pipeline import run_pipeline
from flarec.ir.program import Program
from flarec.passes import pipeline
from flarec.passes.properties import CHECKS

CAPTURE = "capture"
"""Name that stands for "before the first pass" where a pass is asked for."""


def open_program(
    path: str | Path, target: str = "train", *, after: str | None = None, kernels: str = "torch", debug: bool = False
) -> Program:
    """Capture a model from its configuration alone (on the meta device) and run a target's pipeline.

    target: "train" or "decode". after: name of the last pass to run, "capture" for none; the whole pipeline by default.
    A checkpoint's manifest decides whether there is a mask vector. `debug` checks all properties after each pass.
    Raises `UsageError` for an unknown target or pass, otherwise what `capture` and the passes raise.
    """
    manifest = open_checkpoint(path).manifest if Path(path).is_dir() else None
    steps = pipeline(target, mask_vector=manifest is not None and manifest.mask.kind == "vector", kernels=kernels)
    if after is not None:
        names = [CAPTURE, *(step.name for step in steps)]
        if after not in names:
            raise UsageError(f"the pipeline '{target}' has no pass '{after}'; choose one of {', '.join(names)}")
        steps = steps[: names.index(after)]
    return run_pipeline(capture(path, device="meta"), steps, CHECKS, debug=debug)
