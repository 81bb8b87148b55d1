"""From a checkpoint to the program that runs: the manifest's pipeline, with passes of others that the user adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from ..ir.pipeline import Pass
from ..ir.program import Program
from ..passes import PASSES, AdaptNoisyStream, NarrowAdapter, UnknownPass, lower, pipeline
from .directory import Checkpoint
from .horizon import TARGET, horizon_of
from .manifest import Manifest


def pipeline_of(
    manifest: Manifest | None,
    target: str,
    *,
    kernels: str = "torch",
    fast: bool = False,
    regions: bool = False,
    foreign: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
) -> list[Pass]:
    """The passes of `target` as the manifest states them, only the implementation of mixers replaced; for a model that
    was not converted, or a checkpoint of another program, the literal list. `fast`, `regions`, `foreign`, `plugins`:
    see `flarec.passes`; with the torch kernels adapters of a decode step compute for noisy rows alone, unless regions
    are marked: fewer of them would be alike, and compiled once. target "elastic": the decode pipeline with the
    checkpoint's horizon head.

    Raises `CheckpointError` for a pass that is not installed, naming the plugin that the checkpoint was made with.
    """
    stored = manifest.pipelines.get(target) if manifest is not None else None
    vector = manifest is not None and manifest.mask.kind == "vector"
    try:
        return pipeline(
            "decode" if target == TARGET else target, mask_vector=vector, kernels=kernels, fast=fast,
            narrow=kernels == "torch" and target != "train" and not regions, regions=regions, stored=stored,
            foreign=foreign, plugins=plugins,
        )
    except UnknownPass as error:
        origin = manifest.plugins.get(error.name) if manifest is not None else None
        if origin is None:
            raise
        raise CheckpointError(
            f"the checkpoint was made with the pass '{error.name}' of plugin {origin}, which is not installed; install "
            "it, or give its file with --plugin"
        ) from error


def lowered(
    checkpoint: Checkpoint,
    program: Program,
    target: str,
    *,
    kernels: str = "torch",
    fast: bool = False,
    regions: bool = False,
    foreign: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    debug: bool = False,
) -> Program:
    """A captured program of the checkpoint, lowered for `target` by `pipeline_of`."""
    steps = pipeline_of(
        checkpoint.manifest, target, kernels=kernels, fast=fast, regions=regions, foreign=foreign, plugins=plugins
    )
    return lower(program, target, steps=steps, debug=debug)


def lowered_elastic(
    checkpoint: Checkpoint, program: Program, *, kernels: str = "torch", foreign: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
) -> Program:
    """The decode program with the checkpoint's horizon head. Raises `CheckpointError` for a checkpoint without one."""
    if horizon_of(checkpoint.manifest) is None:
        raise CheckpointError(f"{checkpoint.home} has no horizon head; train one with flarec train-head")
    steps = pipeline_of(checkpoint.manifest, TARGET, kernels=kernels, foreign=foreign, plugins=plugins)
    return lower(program, "decode", steps=steps)


def lowered_source(
    checkpoint: Checkpoint, program: Program, *, kernels: str = "torch", regions: bool = False
) -> Program | None:
    """The decode program without the checkpoint's adapter, for steps that have no noisy rows: an adapter would compute
    for clean rows what is thrown away. None where there is no adapter, or where passes of others may need it."""
    steps = pipeline_of(checkpoint.manifest, "decode", kernels=kernels, regions=regions)
    rest = [step for step in steps if not isinstance(step, (AdaptNoisyStream, NarrowAdapter))]
    if len(rest) == len(steps) or any(step.name not in PASSES for step in rest):
        return None
    return lower(program, "decode", steps=rest)
