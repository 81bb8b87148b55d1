"""The results as JSON and as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..base.files import check_name, write_file
from ..errors import UsageError
from . import baselines
from .checks import Check
from .session import FAILED, MEASURED, Line


def versions() -> dict[str, str | None]:
    try:
        import triton
    except ImportError:  # of a CPU
        triton = None

    return {
        "flarec": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "transformers": metadata.version("transformers"),
        "cuda": torch.version.cuda,
        baselines.PACKAGE: baselines.version(),
    }


def device_text(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def record(
    *,
    device: torch.device,
    command: str,
    commit: str | None,
    ceilings: Mapping[str, float],
    checks: Mapping[str, Check],
    lines: Sequence[Line],
    seconds: float,
    settings: Mapping[str, Any],
    earlier_checks: Mapping[str, Any],
    earlier: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the JSON file holds. settings: of the session; earlier: calls whose lines are among these."""
    return {
        "device": device_text(device),
        "versions": versions(),
        "command": command,
        "commit": commit,
        "settings": dict(settings),
        "seconds": round(seconds, 1),
        **({"earlier": [*earlier]} if earlier else {}),
        "ceilings": dict(ceilings),
        "checks": {
            **earlier_checks,
            **{
                name: {"passed": check.passed, "errors": dict(check.errors), "allowed": dict(check.budgets)}
                for name, check in checks.items()
            },
        },
        "rows": [line.to_dict() for line in lines],
    }


def make_place(path: Path, option: str = "--out") -> None:
    """The folder of a file of results, before anything is measured. Raises `UsageError` if the file has no place."""
    check_name(path, option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent} cannot be made: {error.strerror}; choose another {option}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written; choose another {option}")


def write(path: Path, values: Mapping[str, Any]) -> None:
    """In one piece: a run that is stopped leaves what it had measured. Raises `UsageError` if it cannot be written."""
    make_place(path)
    write_file(path, json.dumps(values, indent=1) + "\n")


def cells(line: Line) -> list[str]:
    """Title, value, bar, aim, verdict and what the value was made of."""
    sign = "≥" if line.at_least else "≤"
    limits = [f"{sign} {limit:g}" if limit is not None else "" for limit in (line.bar, line.aim)]
    if line.status != MEASURED:
        return [line.title, "", *limits, line.status.upper() if line.status == FAILED else line.status,
                line.message or ""]
    assert line.value is not None
    value = f"{line.value:.2f} {line.unit}" if line.unit != "x" else f"{line.value:.2f}"
    parts = ", ".join(f"{name} {number:.3g}" for name, number in line.values.items() if number is not None)
    verdict = line.verdict or ""
    return [line.title, value, *limits, verdict.upper() if verdict == "missed" else verdict, parts]


HEADER = ("row", "value", "bar", "aim", "verdict", "measured")


def table(lines: Sequence[Line], title: str = "Kernels") -> Any:
    """A rich table of the results."""
    from rich.table import Table

    made = Table(*HEADER, title=title, title_justify="left")
    for line in lines:
        made.add_row(*cells(line))
    return made


def text(line: Line) -> str:
    """One line for the terminal as soon as a row is done."""
    title, value, bar, _, verdict, rest = cells(line)
    parts = (value, f"({bar})" if bar else "", verdict, rest)
    return f"{line.seconds:6.1f} s  {title}: {' '.join(filter(None, parts))}"
