"""How long a run still takes, from what its steps, evaluations and saves took."""

from __future__ import annotations

from collections import deque
from statistics import fmean, median

WINDOW = 50
"""Reads of steps that an estimate looks back on."""
OUTLIER = 2.0
"""A step counts for at most so many times the median: one that waited for a disk says nothing about the next."""


class Pace:
    """Seconds of the steps, evaluations and saves of this process.

    end: the step at which the run ends, with an evaluation, a save and the checkpoint. evaluate_every, save_every: 0
    for none.
    """

    def __init__(self, end: int, evaluate_every: int, save_every: int) -> None:
        self.end = end
        self.evaluate_every = evaluate_every
        self.save_every = save_every
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._first: float | None = None
        self._evaluations: list[float] = []
        self._saves: list[float] = []

    def stepped(self, seconds: float) -> None:
        """Steps that were read together took so long each. The first ones compile and allocate: they do not count."""
        if self._first is None:
            self._first = seconds
        else:
            self._steps.append(seconds)

    def evaluated(self, seconds: float) -> None:
        self._evaluations.append(seconds)

    def saved(self, seconds: float) -> None:
        self._saves.append(seconds)

    @property
    def step_seconds(self) -> float | None:
        """Of one step; None before the second read."""
        if not self._steps:
            return None
        most = OUTLIER * median(self._steps)
        return fmean(min(seconds, most) for seconds in self._steps)

    def left(self, step: int) -> float | None:
        """Seconds behind optimizer step `step` (taken, evaluated and saved if that was due) to the end of the run, the
        checkpoint included (about a save); None if it is not known yet."""
        each = self.step_seconds
        if each is None:
            return None
        evaluations, saves = (_ahead(step, self.end, every) for every in (self.evaluate_every, self.save_every))
        seconds = (self.end - step) * each
        seconds += evaluations * (fmean(self._evaluations) if self._evaluations else 0.0)
        return seconds + (saves + 1) * (fmean(self._saves) if self._saves else 0.0)


def _ahead(step: int, end: int, every: int) -> int:
    """How often something comes behind `step`: at every multiple of `every`, and at the end."""
    if not every or step >= end:
        return 0
    return end // every - step // every + bool(end % every)


def in_words(seconds: float) -> str:
    """A duration that is an estimate."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
