"""A file of results that a later call completes: what was measured in it stays, the rest is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from . import report
from .session import MEASURED, Line

FIELDS = ("device", "versions", "commit", "settings")
"""Of a record, which a later call has in common with it: else its rows would be of different things."""


@dataclass(frozen=True)
class Before:
    """What a file held: lines by name, checks by name as they stand in it, and the calls that made it."""

    lines: dict[str, Line] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    calls: tuple[dict[str, Any], ...] = ()

    def measured(self, name: str) -> bool:
        return name in self.lines and self.lines[name].status == MEASURED

    def table(self, lines: Sequence[Line]) -> list[Line]:
        """The file's lines in their order, those of this run in the place of theirs or behind them."""
        return [*(self.lines | {line.name: line for line in lines}).values()]


def before(
    path: Path | None, *, device: torch.device, commit: str | None, settings: Mapping[str, Any]
) -> Before:
    """Raises `UsageError` for a file that is missing, is none of ours, or was measured on something else."""
    if path is None:
        raise UsageError("--resume goes on with the file of --out; name it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        lines = [_line(row) for row in found["rows"]]
        checks, call = dict(found["checks"]), {"command": found["command"], "seconds": found["seconds"]}
        calls = (*found.get("earlier", ()), call)
    except FileNotFoundError:
        raise UsageError(f"there is no {path} to go on with; leave --resume out") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} holds no results of this command to go on with; leave --resume out") from None
    now = {"device": report.device_text(device), "versions": report.versions(), "commit": commit,
           "settings": json.loads(json.dumps(dict(settings)))}
    for name in FIELDS:
        if found.get(name) != now[name]:
            raise UsageError(
                f"{path} has the {name} {json.dumps(found.get(name))}, this run {json.dumps(now[name])}: rows of both "
                "would not belong together; leave --resume out, or choose another --out"
            )
    return Before({line.name: line for line in lines}, checks, calls)


def _line(row: Mapping[str, Any]) -> Line:
    """Raises `TypeError`, `KeyError` or `AttributeError` for what is no row, before anything is measured beside it."""
    line = Line(**{**row, "notes": tuple(row["notes"])})
    texts = (line.name, line.title, line.unit, line.status, *line.notes)
    numbers = [number for number in (line.bar, line.aim, line.value, *line.values.values()) if number is not None]
    right = all(isinstance(text, str) for text in texts) and all(isinstance(number, int | float) for number in numbers)
    if not right or (line.status == MEASURED and line.value is None):
        raise TypeError(line)
    return line
