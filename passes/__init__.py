"""The passes and the two pipelines, as literal lists in the order in which they run."""

from __future__ import annotations

from dataclasses import replace

from flarec.errors import UsageError
from flarec.ir.pipeline import Pass, run_pipeline
from flarec.ir.program import Program
from flarec.passes.properties import CHECKS

from .canonicalize import Canonicalize
from .duplicate_streams import DuplicateStreams
from .embed_mask import EmbedMask
from .lower_mixers import IMPLEMENTATIONS, LowerMixers
from .narrow_head import NarrowHead
from .rewrite_masks import RewriteMasks
from .schedule_states import ScheduleStates
from .thread_cache import ThreadCache

TRAIN: list[Pass] = [
    Canonicalize(),
    DuplicateStreams(),
    EmbedMask(),
    RewriteMasks(),
    ScheduleStates(),
    NarrowHead(),
    LowerMixers(),
]

DECODE: list[Pass] = [
    Canonicalize(),
    DuplicateStreams(),
    EmbedMask(),
    RewriteMasks(),
    ScheduleStates(),
    NarrowHead(),
    ThreadCache(),
    LowerMixers(),
]

PIPELINES: dict[str, list[Pass]] = {"train": TRAIN, "decode": DECODE}
PASSES: dict[str, type[Pass]] = {step.name: type(step) for step in [*TRAIN, *DECODE]}


def pipeline(target: str, *, mask_vector: bool = False, kernels: str = "torch") -> list[Pass]:
    """The pipeline `target` ("train" or "decode") with its run-dependent options filled in."""
    if target not in PIPELINES:
        raise UsageError(f"unknown target '{target}'; choose one of {', '.join(PIPELINES)}")
    if kernels not in IMPLEMENTATIONS:
        raise UsageError(f"unknown kernels '{kernels}'; choose one of {', '.join(IMPLEMENTATIONS)}")
    filled: list[Pass] = []
    for step in PIPELINES[target]:
        if isinstance(step, EmbedMask):
            filled.append(replace(step, vector=mask_vector))
        elif isinstance(step, LowerMixers):
            filled.append(replace(step, implementation=kernels))
        else:
            filled.append(step)
    return filled


def lower(
    program: Program, target: str, *, mask_vector: bool = False, kernels: str = "torch", debug: bool = False
) -> Program:
    """Run a pipeline on a captured program and return the lowered one; parameters stay shared."""
    return run_pipeline(program, pipeline(target, mask_vector=mask_vector, kernels=kernels), CHECKS, debug=debug)
