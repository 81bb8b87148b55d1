"""`flarec bench kernels` as a function."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import UsageError
from . import baselines, report, warm
from .resume import Before, before
from .rows import select
from .session import Case, Line, Session, check_rows, run_rows

TIME_LIMIT = 450.0
"""Seconds after which no row is begun."""
WARM_SHARE = 0.5
"""Part of the time limit that compiling in advance may take."""


def run_kernels(
    *,
    only: Sequence[str] = (),
    quick: bool = False,
    out: Path | None = None,
    commit: str | None = None,
    command: str = "flarec bench kernels",
    time_limit: float = TIME_LIMIT,
    device: str = "cuda",
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> list[Line]:
    """Check and measure the rows that `only` names, or all; write `out` after each of them.

    quick: rows with a bar only, and shorter timings. resume: rows that `out` has measured are kept. Raises
    `UsageError` for an unknown row, a missing device, or a file of another device, version or commit.
    """
    rows = select(only, quick=quick)
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise UsageError("the kernels are timed on CUDA devices, and there is none here; run this where there is a GPU")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("the kernels need the package triton; install flarec[gpu]")
    session = Session(torch.device(device), budget_ms=30 if quick else 100)
    return run_session(
        rows, session, out=out, commit=commit, command=command, time_limit=time_limit, say=say, warm_up=True,
        resume=resume,
    )


def run_session(
    rows: Sequence[Case],
    session: Session,
    *,
    out: Path | None,
    commit: str | None,
    command: str,
    time_limit: float,
    say: Callable[[str], None],
    warm_up: bool,
    resume: bool = False,
) -> list[Line]:
    """As `run_kernels`, in a session on any device. warm_up: compile the baselines' kernels in other processes.

    Returns the lines of the file: with `resume` those of earlier calls too.
    """
    kept = Before()
    if resume:
        kept = before(out, device=session.device, commit=commit, settings=session.settings)
        rows = [row for row in rows if not kept.measured(row.name)]
    if out is not None:
        report.make_place(out)
    started = time.monotonic()
    names = sorted({name for row in rows for name in row.baselines})
    compiling = warm.start(names) if warm_up and names and baselines.version() is not None else []
    try:
        check_rows(rows, session, lambda: any(process.poll() is None for process in compiling))
    finally:
        ready = warm.wait(compiling, WARM_SHARE * time_limit - (time.monotonic() - started))
    if compiling:
        seconds = time.monotonic() - started
        say(f"baselines: {ready} of {len(compiling)} compiling processes ended well, after {seconds:.0f} s")
    ceilings = session.ceilings()
    say(", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()))
    lines: list[Line] = []

    def keep(line: Line) -> None:
        lines.append(line)
        say(report.text(line))
        if out is not None:
            values = report.record(
                device=session.device,
                command=command,
                commit=commit,
                ceilings=ceilings,
                checks=session.checks,
                lines=kept.table(lines),
                seconds=time.monotonic() - started,
                settings=session.settings,
                earlier_checks=kept.checks,
                earlier=kept.calls,
            )
            report.write(out, values)

    run_rows(rows, session, time_limit=time_limit, on_line=keep, started=started)
    return kept.table(lines)
