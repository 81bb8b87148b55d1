"""What steps cost: seconds of those of one kind, and lines between kinds of which there are some."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

RECENT, STALE = 9, 2
"""Timings of which the middle one counts, and how many are left of those that were made a while ago."""


class Timings:
    """Seconds of steps of one kind. cost = the middle one of the last: what delays some of them does not count.
    occasions: how often they were measured anew; last: the number of the step that was measured last."""

    def __init__(self) -> None:
        self.count = 0
        self.cost = 0.0
        self.occasions = 1
        self.last = 0
        self._recent: list[float] = []

    def add(self, seconds: float, step: int = 0) -> None:
        self.count, self.last = self.count + 1, step
        self._recent.append(seconds)
        del self._recent[:-RECENT]
        self.cost = sorted(self._recent)[(len(self._recent) - 1) // 2]

    def forget(self) -> None:
        """They were made a while ago."""
        self.occasions += 1
        del self._recent[:-STALE]

    def again(self, seconds: float, step: int) -> None:
        """One step, long after them. Steps are delayed and never hastened: where it took less, those before were."""
        if seconds < self.cost:
            self._recent.clear()
        self.forget()
        self.add(seconds, step)


def between(known: Sequence[tuple[int, float]], rows: int) -> float | None:
    """The cost of so many rows, on the line between those around them that are known; None beyond them."""
    place = bisect_left(known, (rows,))
    if place < len(known) and known[place][0] == rows:
        return known[place][1]
    if not 0 < place < len(known):
        return None
    (low, below), (high, above) = known[place - 1], known[place]
    return below + (above - below) * (rows - low) / (high - low)
