"""What trials of families gave, as data: one run per transformers version, kept in `results.json`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from flarec.base.files import write_file
from flarec.errors import UsageError

NAME = "results.json"


@dataclass(frozen=True)
class Outcome:
    """One stage of one family. `detail`: what was measured, or the sentence that says why it failed."""

    passed: bool
    seconds: float
    detail: str


@dataclass(frozen=True)
class Trial:
    """One family's way through the stages.

    ops         semantic ops of the captured program with their number; empty if it was not captured
    layers, hidden_size, parameters   of the small model it was tried with
    stages      stage -> outcome, in order
    """

    family: str
    ops: Mapping[str, int]
    layers: int
    hidden_size: int
    parameters: int
    stages: Mapping[str, Outcome]

    @property
    def passed(self) -> bool:
        return all(outcome.passed for outcome in self.stages.values())

    @property
    def seconds(self) -> float:
        return sum(outcome.seconds for outcome in self.stages.values())


@dataclass(frozen=True)
class SuiteRun:
    """Trials under one version of transformers.

    commits   family -> commit of the tree that tried it, where it was told
    absent    families that this version of transformers does not have
    """

    versions: Mapping[str, str]
    device: str
    trials: Mapping[str, Trial]
    absent: tuple[str, ...] = ()
    commits: Mapping[str, str] | None = None

    @property
    def transformers(self) -> str:
        return self.versions["transformers"]


def device_text() -> str:
    return f"{platform.machine()} CPU"


def load_runs(path: Path | None = None) -> list[SuiteRun]:
    """The recorded runs, newest transformers first. path: a file of this form; default: the one in the package.

    Raises `UsageError` for a file that is not of this form.
    """
    place = path or files("flarec.conformance").joinpath(NAME)
    try:
        table = json.loads(place.read_text(encoding="utf-8"))
        return [_run(item) for item in table["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{place} holds no results of `flarec families --run` ({type(error).__name__}: {error}); name another file"
        ) from error


def _run(item: Mapping[str, Any]) -> SuiteRun:
    trials = {
        name: Trial(
            name, trial["ops"], trial["layers"], trial["hidden_size"], trial["parameters"],
            {stage: Outcome(**outcome) for stage, outcome in trial["stages"].items()},
        )
        for name, trial in item["trials"].items()
    }
    return SuiteRun(item["versions"], item["device"], trials, tuple(item["absent"]), item["commits"])


def merge_run(runs: Sequence[SuiteRun], new: SuiteRun) -> list[SuiteRun]:
    """The runs with `new` in place of what was known of its families under its version of transformers."""
    old = next((run for run in runs if run.transformers == new.transformers), None)
    if old is not None:
        kept = {name: trial for name, trial in old.trials.items() if name not in new.absent}
        commits = {
            name: commit for name, commit in (old.commits or {}).items() if name in kept and name not in new.trials
        }
        absent = {*old.absent, *new.absent} - new.trials.keys()
        new = replace(
            new, trials={**kept, **new.trials}, absent=tuple(sorted(absent)), commits={**commits, **(new.commits or {})}
        )
    others = [run for run in runs if run.transformers != new.transformers]
    return sorted([*others, new], key=lambda run: _version(run.transformers), reverse=True)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())


def save_runs(runs: Sequence[SuiteRun], path: Path) -> None:
    """Write the runs, one line per stage so that differences can be read. Raises `UsageError` if it cannot."""
    table = {"runs": [_plain(run) for run in runs]}
    text = json.dumps(table, indent=1, ensure_ascii=False)
    write_file(path, text + "\n", "--write")


def _plain(run: SuiteRun) -> dict[str, Any]:
    trials = {}
    for name, trial in sorted(run.trials.items()):
        values = asdict(trial)
        del values["family"]
        for outcome in values["stages"].values():
            outcome["seconds"] = round(outcome["seconds"], 2)
        trials[name] = values
    return {
        "versions": dict(run.versions),
        "device": run.device,
        "commits": dict(sorted((run.commits or {}).items())),
        "absent": list(run.absent),
        "trials": trials,
    }
