"""What a checkpoint and records of evaluations say. Nothing is computed that they do not hold, and a value that is no
number counts as not recorded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarec.base.files import why_no_file
from flarec.checkpoint.location import resolve
from flarec.checkpoint.manifest import Manifest
from flarec.errors import UsageError
from flarec.evaluation.record import read_record
from flarec.evaluation.summary import LETTERS
from flarec.train.metrics import read_metrics
from flarec.train.state import METRICS

Points = list[tuple[float, float]]
SPAN = 16
"""Positions of an answer that are counted together."""
ONE_PER_FORWARD = ("causal", "ar-trust", "elastic")
"""Modes in which a forward ends with one token of the clean stream, so that these count the forwards."""
ENDS = (LETTERS["clean"], LETTERS["corrected"])
"""Letters of the tokens that end a forward there."""
LARGEST = 1e15
"""Of a number that is shown; nothing that a run counts or measures is larger."""


@dataclass(frozen=True)
class Recorded:
    """A checkpoint's manifest and its `metrics.jsonl`: lines of steps, and of evaluations among them, as they are.

    name: of the directory, or the hub id
    """

    name: str
    manifest: Manifest
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]

    def curve(self, *keys: str, held_out: bool = False) -> Points:
        """(step, value) of a number by its keys, from the steps or the evaluations that have it."""
        found = ((line["step"], at(line, *keys)) for line in (self.evaluations if held_out else self.steps))
        return [(float(step), value) for step, value in found if value is not None]

    def slots(self, *keys: str) -> dict[int, Points]:
        """The same of a list with a value per position of a block, over the evaluations: position from 1 -> points."""
        lengths = [len(found) for line in self.evaluations if isinstance(found := inside(line, *keys), list)]
        curves = {
            slot + 1: [
                (float(line["step"]), value)
                for line in self.evaluations
                if (value := at(line, *keys, slot)) is not None
            ]
            for slot in range(max(lengths, default=0))
        }
        return {slot: points for slot, points in curves.items() if points}


@dataclass(frozen=True)
class EvaluationRecord:
    """A record of `flarec eval --out`. own: it is of this checkpoint."""

    file: str
    own: bool
    table: Mapping[str, Any]

    @property
    def model(self) -> str:
        return "this checkpoint" if self.own else at_text(self.table, "model", "name") or "another model"

    @property
    def mode(self) -> str:
        return at_text(self.table, "result", "mode") or "unknown mode"

    def number(self, *keys: str | int) -> float | None:
        return at(self.table, *keys)

    @property
    def label(self) -> str:
        """Records of one label are of one model, mode and data."""
        whose = "" if self.own else f"{self.model}, "
        return f"{whose}{self.mode}, {at_text(self.table, 'data', 'name') or 'unnamed data'}"

    @property
    def forwards_per_answer(self) -> float | None:
        forwards, answers = self.number("result", "forwards"), self.number("result", "generated")
        return forwards / answers if forwards is not None and answers is not None and answers >= 1 else None

    def by_position(self) -> Points:
        """(position in the answer, tokens per forward) over spans of `SPAN` tokens that are whole in some answer. A
        forward counts where it ends; the last one of an answer may have been cut behind an accepted draft."""
        if self.mode not in ONE_PER_FORWARD:
            return []
        answers = self.table.get("answers")
        texts = [at_text(answer, "origins") for answer in answers] if isinstance(answers, list) else []
        points: Points = []
        for start in range(0, max(map(len, texts), default=0) - SPAN + 1, SPAN):
            end = start + SPAN
            whole = [text for text in texts if len(text) >= end]
            ends = sum(text.count(letter, start, end) for text in whole for letter in ENDS)
            forwards = ends + sum(len(text) == end and text[-1] not in ENDS for text in whole)
            if forwards:
                points.append((start + SPAN / 2, SPAN * len(whole) / forwards))
        return points


def read_recorded(path: str | Path) -> Recorded:
    """Of a checkpoint, or of an adapter alone. Raises `CheckpointError` for what cannot be read, `UsageError` for a
    model that was not converted."""
    directory = resolve(path)
    manifest = Manifest.read(directory)
    if manifest is None:
        raise UsageError(f"{path} was not converted (it has no flarec.json), so there is nothing to report")
    metrics = directory / METRICS
    if problem := why_no_file(metrics):
        raise UsageError(f"{metrics} {problem}; copy the checkpoint again")
    read = read_metrics(metrics) if metrics.is_file() else ()
    lines = [line for line in read if at(line, "step") is not None]
    return Recorded(
        directory.resolve().name if os.path.isdir(path) else str(path),  # a snapshot is called by its hash
        manifest,
        [line for line in lines if "evaluation" not in line],
        [line for line in lines if "evaluation" in line],
    )


def read_evaluations(paths: Sequence[Path], manifest: Manifest) -> list[EvaluationRecord]:
    """Records, each with whether it is of the checkpoint with this manifest. Raises `UsageError`."""
    own = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    tables = [(path, read_record(path, "--eval")) for path in paths]
    return [EvaluationRecord(path.name, table["model"].get("manifest") == own, table) for path, table in tables]


def inside(value: Any, *keys: str | int) -> Any:
    """What stands in tables and lists under these keys; None if nothing does."""
    for key in keys:
        if isinstance(value, Mapping) and isinstance(key, str):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return value


def at(value: Any, *keys: str | int) -> float | None:
    """The same for a number, finite and of a size that is met."""
    found = inside(value, *keys)
    known = isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) <= LARGEST  # NaN is not
    return float(found) if known else None


def at_text(value: Any, *keys: str | int) -> str:
    """The same for a text; empty if there is none."""
    found = inside(value, *keys)
    return found if isinstance(found, str) else ""
