"""The passes and the two pipelines, as literal lists in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flarec.errors import PassError, UsageError
from flarec.ir.pipeline import Pass, UnknownPass, check_order, names_of, parse_pass, parse_pipeline, place, run_pipeline
from flarec.ir.program import Program
from flarec.passes.properties import CHECKS

from .adapt_noisy_stream import AdaptNoisyStream
from .canonicalize import Canonicalize
from .count_experts import CountExperts
from .duplicate_streams import DuplicateStreams
from .embed_mask import EmbedMask
from .fold_constants import FoldConstants
from .lower_mixers import IMPLEMENTATIONS, LowerMixers
from .merge_projections import MergeProjections
from .narrow_adapter import NarrowAdapter
from .narrow_head import NarrowHead
from .outline_regions import OutlineRegions
from .plugins import Known, known_passes
from .predict_horizon import PredictHorizon
from .quantize_base import QuantizeBase
from .rewrite_masks import RewriteMasks
from .schedule_states import ScheduleStates
from .split_head import SplitHead
from .split_streams import SplitStreams
from .thread_cache import ThreadCache

TRAIN: list[Pass] = [
    Canonicalize(),
    DuplicateStreams(),
    EmbedMask(),
    RewriteMasks(),
    ScheduleStates(),
    NarrowHead(),
    SplitHead(),
    CountExperts(),
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
OPTIONAL: tuple[type[Pass], ...] = (
    AdaptNoisyStream, NarrowAdapter, SplitStreams, MergeProjections, FoldConstants, OutlineRegions, PredictHorizon,
    QuantizeBase,
)
"""Passes that stand in a pipeline where a caller gives them (`pipeline`)."""
PASSES: dict[str, type[Pass]] = {step.name: type(step) for step in [*TRAIN, *DECODE]} | {p.name: p for p in OPTIONAL}
GIVEN = frozenset({"captured"})
"""What holds before the first pass."""
YOUNG = frozenset({"experts-counted", "head-split"})
"""Properties that pipelines of older checkpoints do not have, and that nothing which runs them needs."""
AFTER = "@after:"
"""Pins a foreign pass: `my-pass(option=1)@after:narrow-head`."""


def needs(target: str) -> frozenset[str]:
    """What holds at the end of a target's own pipeline, and has to hold with passes of others too."""
    return check_order(PIPELINES[target], GIVEN) - YOUNG


def passes_by_name(plugins: Sequence[str | Path] = ()) -> dict[str, Known]:
    """Every pass that can be named: the package's, those of installed plugins and of plugin files."""
    return known_passes(PASSES, plugins)


def pipeline(
    target: str,
    *,
    mask_vector: bool = False,
    kernels: str = "torch",
    adapter: AdaptNoisyStream | None = None,
    fast: bool = False,
    narrow: bool = False,
    regions: bool = False,
    stored: str | None = None,
    foreign: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
) -> list[Pass]:
    """The pipeline `target` ("train" or "decode") with its run-dependent options filled in.

    adapter: stands behind embed-mask, and split-streams before lower-mixers in training; without one noisy rows run
    through the model's own weights. fast: decode pipelines get merge-projections and fold-constants before
    lower-mixers; results differ in rounding. narrow: decode pipelines with an adapter get narrow-adapter there.
    regions: outline-regions stands last. stored: the text of
    a checkpoint's manifest instead of the literal list; the implementation of mixers and losses is then replaced by
    `kernels`, nothing else. foreign: passes of others as text, `name(option=value)`; each goes to the latest place
    before lower-mixers that its requirements allow, or with `@after:NAME` behind that pass. plugins: files that define
    such passes, beside the installed ones.

    Raises `UsageError` for an unknown name, `PassError` for a pass that has no place, `UnknownPass` for a stored one.
    """
    if target not in PIPELINES:
        raise UsageError(f"unknown target '{target}'; choose one of {', '.join(PIPELINES)}")
    if kernels not in IMPLEMENTATIONS:
        raise UsageError(f"unknown kernels '{kernels}'; choose one of {', '.join(IMPLEMENTATIONS)}")
    known: Mapping[str, type[Pass]] = PASSES
    if foreign or plugins or (stored and not _only_built_in(stored)):
        known = {name: row.cls for name, row in passes_by_name(plugins).items()}
    steps = PIPELINES[target] if stored is None else parse_pipeline(stored, known)
    filled: list[Pass] = []
    for step in steps:
        if isinstance(step, EmbedMask) and stored is None:
            filled.append(replace(step, vector=mask_vector))
            if adapter is not None:
                filled.append(adapter)
        elif isinstance(step, (LowerMixers, SplitHead)):
            if adapter is not None and target == "train" and isinstance(step, LowerMixers):
                filled.append(SplitStreams())
            if fast and target == "decode" and isinstance(step, LowerMixers):
                there = {other.name for other in steps}
                filled += [other for other in (MergeProjections(), FoldConstants()) if other.name not in there]
            if narrow and isinstance(step, LowerMixers) and any(isinstance(x, AdaptNoisyStream) for x in filled):
                filled.append(NarrowAdapter())
            filled.append(replace(step, implementation=kernels))
        else:
            filled.append(step)
    filled = _with_foreign(target, filled, foreign, known)
    return [*filled, OutlineRegions()] if regions else filled


def _only_built_in(text: str) -> bool:
    return all(line.split("(")[0].strip() in PASSES for line in text.splitlines() if line.strip())


def _with_foreign(
    target: str, steps: list[Pass], foreign: Sequence[str], known: Mapping[str, type[Pass]]
) -> list[Pass]:
    """The steps with the passes of others among them; one may need what another one provides."""
    waiting = []
    for text in foreign:
        name, _, pin = text.partition(AFTER)
        step = parse_pass(name, known)
        if step.name in PASSES:
            raise UsageError(f"pass '{step.name}' is flarec's own and stands where it belongs; leave it out")
        if target in step.targets:
            waiting.append((step, pin.strip()))
    while waiting:
        before, errors = len(waiting), []
        for item in list(waiting):
            step, pin = item
            try:
                split = any(isinstance(other, SplitStreams) for other in steps)
                last = SplitStreams.name if split else LowerMixers.name
                index = _after(steps, step, pin) if pin else place(steps, step, GIVEN, last)
                trial = [*steps[:index], step, *steps[index:]]
                check_order(trial, GIVEN)
            except PassError as error:
                errors.append(error)
            else:
                steps = trial
                waiting.remove(item)
        if len(waiting) == before:
            raise errors[0]
    lost = sorted(needs(target) - check_order(steps, GIVEN))
    if lost:
        culprit = next((step.name for step in steps if lost[0] in names_of(step.invalidates)), None)
        why = f"pass '{culprit}' invalidates it" if culprit else "no pass provides it"
        raise PassError(
            f"after the pipeline '{target}' the property '{lost[0]}' does not hold: {why}; provide it again"
        )
    return steps


def _after(steps: Sequence[Pass], step: Pass, pin: str) -> int:
    """The index behind the pass `pin`. Raises `PassError` if there is none of that name."""
    names = [other.name for other in steps]
    if pin not in names:
        raise PassError(f"pass '{step.name}' cannot stand after '{pin}': the pipeline has {', '.join(names)}")
    return names.index(pin) + 1


def placed(steps: Sequence[Pass]) -> list[str]:
    """One line for every pass of others: where it stands."""
    lines = []
    for index, step in enumerate(steps):
        if step.name not in PASSES:
            before = f"after {steps[index - 1].name}" if index else "first"
            lines.append(f"pass {step.text()} stands {before}")
    return lines


def lower(
    program: Program,
    target: str,
    *,
    mask_vector: bool = False,
    kernels: str = "torch",
    adapter: AdaptNoisyStream | None = None,
    fast: bool = False,
    regions: bool = False,
    steps: Sequence[Pass] | None = None,
    debug: bool = False,
) -> Program:
    """Run a pipeline on a captured program and return the lowered one; parameters stay shared. steps: instead of the
    literal list (`pipeline`). Weights that the program holds as codes are read so (`quantize-base`), behind all of
    these passes but `outline-regions`."""
    if steps is None:
        steps = pipeline(
            target, mask_vector=mask_vector, kernels=kernels, adapter=adapter, fast=fast, regions=regions
        )
    if program.quantized:
        behind = [step for step in steps if isinstance(step, OutlineRegions)]
        steps = [*(step for step in steps if step not in behind), QuantizeBase(), *behind]
    return run_pipeline(program, steps, CHECKS, debug=debug)


__all__ = [
    "AFTER",
    "GIVEN",
    "OPTIONAL",
    "PASSES",
    "PIPELINES",
    "YOUNG",
    "AdaptNoisyStream",
    "Known",
    "NarrowAdapter",
    "OutlineRegions",
    "PredictHorizon",
    "QuantizeBase",
    "UnknownPass",
    "lower",
    "needs",
    "passes_by_name",
    "pipeline",
    "placed",
]
