"""`metrics.jsonl`: one JSON object per line, for a step or (under the key "evaluation") for a held-out evaluation."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..base.files import replace_file, why_no_file
from ..errors import TrainingError
from .state import StateDirectory, writing


class MetricsLog:
    """Appends to the file; what was logged after the save that a run resumes from is dropped first.

    evaluations: steps whose evaluation the save knows; None: all up to it.
    """

    def __init__(self, path: Path, *, resume_at: int = 0, evaluations: Collection[int] | None = None) -> None:
        self.path = path
        self.go_on = StateDirectory(path.parent).go_on
        if reason := why_no_file(path):
            raise TrainingError(f"{path} {reason}; start again with --overwrite")
        with writing(path, self.go_on):
            found = [line for line in read_metrics(path) if line["step"] <= resume_at] if path.exists() else []
            kept = [line for line in found if "evaluation" not in line or _knows(evaluations, line["step"])]
            replace_file(path, "".join(_line(values) for values in kept), path.with_suffix(".writing"))
            # without a buffer: what a full disk refused would be tried again when the file is closed
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def write(self, values: Mapping[str, Any]) -> None:
        data = _line(values).encode()
        with writing(self.path, self.go_on):
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> None:
        with writing(self.path, self.go_on):
            self._file.close()


def _knows(evaluations: Collection[int] | None, step: int) -> bool:
    return evaluations is None or step in evaluations


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a log; an interruption can cut the last one short."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(values, dict) and type(values.get("step")) is int:
                yield values
