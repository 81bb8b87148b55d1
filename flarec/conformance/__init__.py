"""Which model families go through which stages: tried on small models, kept as data, shown as a table.

`flarec families` prints what the last full run found (`results.json`); `flarec families --run` tries again.
"""

from __future__ import annotations

from .record import Outcome, SuiteRun, Trial, load_runs, merge_run, save_runs
from .stages import STAGES, is_hybrid, names, try_family
from .table import Row, markdown, rows

__all__ = [
    "STAGES",
    "Outcome",
    "Row",
    "SuiteRun",
    "Trial",
    "is_hybrid",
    "load_runs",
    "markdown",
    "merge_run",
    "names",
    "rows",
    "save_runs",
    "try_family",
]
