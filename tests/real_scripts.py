"""The scripts of examples/real for tests: their commands run in this process, which has imported what they need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.cli.conversions import flarec

FOLDER = Path(__file__).parents[1] / "examples" / "real"


def real_script(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A module of the folder. `commands.run` of it runs in this process, without time limits."""
    monkeypatch.syspath_prepend(str(FOLDER))  # scripts import each other
    found: ModuleType = importlib.import_module(f"examples.real.{name}")
    commands: Any = importlib.import_module("commands")

    def run(command: Sequence[str], limit: float, **_: object) -> Any:
        if list(command[1:3]) == ["-m", "flarec"]:
            result = flarec(*command[3:])
            return commands.Ran(commands.shown(command), result.exit_code, result.output, 1.0)
        code = importlib.import_module(Path(command[1]).stem).main(list(command[2:]))
        return commands.Ran(commands.shown(command), code, "", 1.0)

    assert command_is_python(commands)
    monkeypatch.setattr(commands, "run", run)
    return found


def command_is_python(commands: Any) -> bool:
    """That what runs here is what a process would run."""
    first = {commands.flarec("x")[0], commands.script("measure.py")[0]}
    return first == {sys.executable} and Path(commands.script("measure.py")[1]).exists()
