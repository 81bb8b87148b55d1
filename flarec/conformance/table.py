"""The recorded runs as a table: for the terminal, as Markdown (the README carries it), as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flarec.frontend.families import FAMILIES

from .record import SuiteRun, Trial
from .stages import STAGES, is_hybrid, names

TITLES = ("family", "mixers", "ops", "stages that pass", "smallest test config", "transformers")
PLAIN_MIXERS = "softmax"


@dataclass(frozen=True)
class Row:
    """One family.

    mixers      of the adapter row; ops: semantic ops of the small model's program
    passed      stages that pass under every version of transformers that has the family
    failed      stage -> the sentence of the newest version under which it fails
    config      of the small model: layers, width, parameters
    versions    versions of transformers with which the family was tried, newest first
    """

    family: str
    hybrid: bool
    mixers: tuple[str, ...]
    ops: Mapping[str, int]
    passed: tuple[str, ...]
    failed: Mapping[str, str]
    config: str
    versions: tuple[str, ...]

    @property
    def stages(self) -> str:
        """`all 9`, or which fail. A family that was never tried passes nothing."""
        if not self.versions:
            return "not tried"
        if not self.failed and len(self.passed) == len(STAGES):
            return f"all {len(STAGES)}"
        return f"{len(self.passed)} of {len(STAGES)}; not {', '.join(self.failed)}"

    def cells(self) -> tuple[str, ...]:
        ops = ", ".join(self.ops) or "-"
        return self.family, ", ".join(self.mixers), ops, self.stages, self.config, ", ".join(self.versions) or "-"


def rows(runs: Sequence[SuiteRun]) -> list[Row]:
    """A row per family that is tried, in the order of the adapter table; `runs` newest transformers first."""
    return [_row(family, [run.trials[family] for run in runs if family in run.trials], runs) for family in names()]


def _row(family: str, trials: Sequence[Trial], runs: Sequence[SuiteRun]) -> Row:
    failed: dict[str, str] = {}
    for stage in STAGES:
        for trial in trials:
            outcome = trial.stages.get(stage)
            if outcome is None or not outcome.passed:
                failed.setdefault(stage, "not run" if outcome is None else outcome.detail)
    newest = trials[0] if trials else None
    return Row(
        family=family,
        hybrid=is_hybrid(family),
        mixers=FAMILIES[family].mixers if is_hybrid(family) else (PLAIN_MIXERS,),
        ops=newest.ops if newest else {},
        passed=tuple(stage for stage in STAGES if trials and stage not in failed),
        failed=failed if trials else {},
        config=config_text(newest) if newest else "-",
        versions=tuple(run.transformers for run in runs if family in run.trials),
    )


def config_text(trial: Trial) -> str:
    """`4 layers, width 64, 0.2 M`"""
    return f"{trial.layers} layers, width {trial.hidden_size}, {trial.parameters / 1e6:.1f} M"


def markdown(table: Sequence[Row]) -> str:
    """The table for README.md; plain softmax models below the hybrid families."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    for row in table:
        family, *rest = row.cells()
        lines.append("| " + " | ".join([f"`{family}`", *rest]) + " |")
    return "\n".join(lines)
