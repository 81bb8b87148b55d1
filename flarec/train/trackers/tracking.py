"""What goes to which tracker: the lines of `metrics.jsonl`, each once.

The run's record (`run.json`) says of each tracker how far it is, and whether it is open. A process that closes its
trackers (all but one that is killed) says there what they have, so that the next one continues the same run of the
service and sends what is missing: not the steps behind the save, which it takes again, but what was logged before a
tracker joined. Of a tracker that a killed process left open nobody knows what arrived: the next process begins another
run there, with all steps from the first. TensorBoard's files are always written anew.
"""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, first_line
from .services import TensorBoard, Tracker, Trackio, Wandb

NAMES = ("tensorboard", "wandb", "trackio")
NONE = "none"
_BEFORE = (0, -1)
"""Last step and last evaluation that were sent, before any."""


@dataclass
class State:
    """Of one tracker. attempt: runs of the service before this one; sent: its last step and its last evaluation."""

    open: bool = False
    attempt: int = 0
    sent: tuple[int, int] = _BEFORE

    @staticmethod
    def read(values: Any) -> State:
        """What a record says; a new one where it was changed by hand."""
        try:
            step, evaluation = values["sent"]
            state = State(values["open"], values["attempt"], (step, evaluation))
        except (TypeError, KeyError, ValueError):
            return State()
        types = [type(item) for item in (state.open, state.attempt, *state.sent)]
        return state if types == [bool, int, int, int] else State()


def chosen_trackers(report_to: str) -> tuple[str, ...]:
    """The trackers in a text like "tensorboard,wandb". Raises `UsageError` for an unknown or a missing one."""
    names = tuple(dict.fromkeys(name.strip() for name in report_to.split(",")))
    if names == (NONE,):
        return ()
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--report-to {report_to}: give none, or one or more of {', '.join(NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--report-to {name}: the package is not installed; pip install 'flarec[{name}]'")
    return names


class Tracking:
    """The open trackers of a run.

    record: `tracking` of the run's record, empty for a fresh run; out: the checkpoint to be. Raises `UsageError` if a
    tracker cannot be opened (for example nobody is logged in).
    """

    def __init__(
        self,
        names: Iterable[str],
        out: Path,
        config: Mapping[str, Any],
        record: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.run_id = str(record.get("run") or secrets.token_hex(4))
        self.warn = warn
        known = record.get("trackers")
        self.states = {name: State.read(known.get(name)) if isinstance(known, dict) else State() for name in NAMES}
        self.trackers: dict[str, Tracker] = {}
        for name in names:
            state = self.states[name]
            if name == "tensorboard":
                state.sent = _BEFORE
            elif state.open:
                state.attempt, state.sent = state.attempt + 1, _BEFORE
            try:
                self.trackers[name] = self._open(name, out, config)
            except Exception as error:  # whatever a service's package raises
                self.close()
                raise UsageError(f"--report-to {name} cannot be used: {first_line(error)}") from error
            state.open = True

    def _open(self, name: str, out: Path, config: Mapping[str, Any]) -> Tracker:
        if name == "tensorboard":
            return TensorBoard(out.with_name(f"{out.name}.tensorboard") / self.run_id, out.name, config)
        attempt = self.states[name].attempt
        run_id = f"{self.run_id}-{attempt}" if attempt else self.run_id
        return (Wandb if name == "wandb" else Trackio)(run_id, out.name, config)

    @property
    def record(self) -> dict[str, Any]:
        """For the run's record, before the run goes on and when its trackers are closed."""
        return {"run": self.run_id, "trackers": {name: asdict(state) for name, state in self.states.items()}}

    @property
    def places(self) -> list[str]:
        return [tracker.where for tracker in self.trackers.values()]

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of the log, to the trackers that do not have it; one that fails is left out from now on."""
        kind, step = int("evaluation" in line), line["step"]
        values = scalars(line["evaluation"], "eval/") if kind else scalars(line, "train/")
        for name, tracker in list(self.trackers.items()):
            state = self.states[name]
            if step <= state.sent[kind]:
                continue
            try:
                tracker.log(step, values)
            except Exception as error:  # a run does not end because nobody watches it
                self.warn(f"{name} failed and is left out: {first_line(error)}")
                del self.trackers[name]
                continue
            state.sent = (state.sent[0], step) if kind else (step, state.sent[1])

    def close(self) -> None:
        """Behind this, `record` says what arrived."""
        for name, tracker in self.trackers.items():
            try:
                tracker.close()
                self.states[name].open = False
            except Exception as error:
                self.warn(f"{name} could not be closed: {first_line(error)}")
        self.trackers = {}


def scalars(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The finite numbers of nested values by name, those of lists by their index (`one_minus_tv/0`)."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if name == "step" and prefix == "train/":
            continue
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (list, tuple)):
            found |= scalars({str(index): item for index, item in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found[f"{prefix}{name}"] = value
    return found
