"""One run of the benchmark: what has been checked and measured so far, and the loop over the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from ..errors import UsageError
from .baselines import Baselines
from .checks import Check, CheckFailed
from .measure import Clock, NotMeasured, ceilings

T = TypeVar("T")
MEASURED, FAILED, MISSING = "measured", "failed", "not measured"


@dataclass(frozen=True)
class Measured:
    """What a row found. value = the number that its bar is about; values = what it was made of, by name."""

    value: float
    values: dict[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A line of the table.

    name, title  for `--only`, and for people
    measure      computes it in a session; `check` runs the correctness checks that it needs before
    unit         "x" for ratios, else the value's unit
    bar, aim     what is required and what is hoped for; None: the row only reports. `at_least`: more is better
    baselines    functions of `Baselines` that it times
    """

    name: str
    title: str
    measure: Callable[[Session], Measured]
    check: Callable[[Session], None]
    unit: str = "x"
    bar: float | None = None
    aim: float | None = None
    at_least: bool = False
    baselines: tuple[str, ...] = ()

    def verdict(self, value: float) -> str:
        return verdict(value, self.bar, self.aim, self.at_least)


def verdict(value: float, bar: float | None, aim: float | None, at_least: bool) -> str:
    """"aim reached", "met", "missed" or "reported"; NaN misses every bar."""
    if bar is None:
        return "reported"
    for limit, word in ((aim, "aim reached"), (bar, "met")):
        if limit is not None and (value >= limit if at_least else value <= limit):
            return word
    return "missed"


@dataclass(frozen=True)
class Line:
    """A row with its result, as it stands in the JSON file. status: "measured", "failed" or "not measured"."""

    name: str
    title: str
    unit: str
    bar: float | None
    aim: float | None
    at_least: bool
    status: str
    value: float | None = None
    verdict: str | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    message: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Session:
    """State of a run on one device.

    small_tokens  clean tokens of the row on which a kernel is checked: more than two chunks; a multiple of 16, for
                  which Triton compiles as it does for the lengths that are timed
    size          makes every problem smaller, for tests
    """

    def __init__(
        self,
        device: torch.device,
        *,
        budget_ms: float = 100,
        small_tokens: int = 144,
        size: Callable[[Any], Any] = lambda problem: problem,
    ) -> None:
        self.device = device
        self.clock = Clock(device, budget_ms)
        self.small_tokens = small_tokens
        self.size = size
        self.checks: dict[str, Check] = {}
        self._measured: dict[object, Any] = {}
        self._baselines: Baselines | NotMeasured | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What rows of this session have in common beside the device: kept in the results."""
        return {"budget_ms": self.clock.budget_ms, "small_tokens": self.small_tokens}

    def check(self, name: str, run: Callable[[], Check]) -> None:
        """Run a correctness check, once per session. Raises `CheckFailed` each time if it fails."""
        if name not in self.checks:
            self.checks[name] = run()
            self.clock.free()
        if not self.checks[name].passed:
            raise CheckFailed(f"the check of {name} failed, so nothing was timed ({self.checks[name].text()})")

    def measured(self, key: object, make: Callable[[], T]) -> T:
        """What `make` measures, once per session: rows share it."""
        if key not in self._measured:
            try:
                self._measured[key] = make()
            finally:
                self.clock.free()
        result: T = self._measured[key]
        return result

    @property
    def baselines(self) -> Baselines:
        """Raises `NotMeasured` if flash-linear-attention is not installed."""
        if self._baselines is None:
            try:
                self._baselines = Baselines()
            except NotMeasured as missing:
                self._baselines = missing
        if isinstance(self._baselines, NotMeasured):
            raise self._baselines
        return self._baselines

    def ceilings(self) -> dict[str, float]:
        return self.measured("ceilings", lambda: ceilings(self.clock))


def named(rows: Sequence[Case], only: Sequence[str], where: str) -> list[Case]:
    """The rows whose names are one of `only`, or begin so where no name is it. Raises `UsageError` for a name of no
    row; where: what shows them."""
    found: dict[Case, None] = {}
    for name in only:
        mine = [row for row in rows if row.name == name] or [row for row in rows if row.name.startswith(name)]
        if not mine:
            raise UsageError(f"no row is called {name}; {where}")
        found |= dict.fromkeys(mine)
    return list(found)


def run_rows(
    rows: Sequence[Case],
    session: Session,
    *,
    time_limit: float,
    on_line: Callable[[Line], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> list[Line]:
    """Measure rows in order. One that fails is recorded and the rest go on; after `time_limit` seconds none is begun.

    started = `clock()` at the beginning of the run, if that was earlier.
    """
    begin = clock() if started is None else started
    lines = []
    for row in rows:
        start = clock()
        if start - begin >= time_limit:
            line = _line(row, MISSING, message=f"the time limit of {time_limit:g} s was reached")
        else:
            line = _measure(row, session, lambda: clock() - start)  # noqa: B023  (called before the next turn)
        lines.append(line)
        on_line(line)
    return lines


def check_rows(rows: Sequence[Case], session: Session, busy: Callable[[], bool] = lambda: True) -> None:
    """Run correctness checks of `rows` in advance while something else is `busy`; they count when a row is measured."""
    for row in rows:
        if not busy():
            return
        try:
            row.check(session)
        except Exception:
            session.clock.free()  # the row runs into it again, and says so


def _measure(row: Case, session: Session, seconds: Callable[[], float]) -> Line:
    try:
        row.check(session)
        outcome = row.measure(session)
    except NotMeasured as missing:
        return _line(row, MISSING, message=str(missing), seconds=seconds())
    except Exception as error:
        session.clock.free()
        text = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {text[0] if text else ''}"
        return _line(row, FAILED, message=message, seconds=seconds())
    return _line(
        row,
        MEASURED,
        value=outcome.value,
        verdict=row.verdict(outcome.value),
        values=outcome.values,
        notes=outcome.notes,
        seconds=seconds(),
    )


def _line(row: Case, status: str, **found: Any) -> Line:
    return Line(row.name, row.title, row.unit, row.bar, row.aim, row.at_least, status, **found)
