"""`flarec bench train` as a function."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..report import make_place
from ..resume import before
from ..run import run_session
from ..session import Case, Line
from .rows import parts_of
from .session import TrainingSession


def run_training(
    rows: Sequence[Case],
    session: TrainingSession,
    *,
    out: Path | None = None,
    commit: str | None = None,
    command: str = "flarec bench train",
    say: Callable[[str], None] = print,
    ahead: bool = True,
    resume: bool = False,
) -> list[Line]:
    """Measure some rows and write `out` after each of them. ahead: compile kernels in parallel before, on a GPU.
    resume: rows that `out` has measured are kept.

    Parts end with the time limit of the run; rows that need no further part are computed behind it.
    """
    if resume:
        kept = before(out, device=session.device, commit=commit, settings=session.settings)
        rows = [row for row in rows if not kept.measured(row.name)]
    if out is not None:
        make_place(out)
    with contextlib.ExitStack() as stack:
        session.wanted = tuple(parts_of(rows))
        if ahead and session.on_gpu:
            ended = stack.enter_context(session.prepared(session.wanted))
            say(f"compiled ahead: {', '.join(f'{name}: {how}' for name, how in ended.items())}")
        return run_session(
            rows, session, out=out, commit=commit, command=command, time_limit=math.inf, say=say, warm_up=False,
            resume=resume,
        )
