"""How much to draft: the blocks of every step, from what steps cost here and from how many drafts were accepted.

With blocks of `b` positions behind every clean row a step yields `E(b) = 1 + p1 + p1 p2 + ... + p1..pb` tokens of each
request, `pi` being the share of drafts at depth `i` that are right when those before them are. With one block, behind
the last draft, a step that rejects leaves nothing to verify in the next one: if `q = p1..pb` of the steps accept all
drafts, a share of `1 / (2 - q)` of the steps has drafts and yields `E(b)`, the others yield 1. The blocks with most
tokens per second are used; none at all is plain causal decoding. Costs and shares are running means, and what is not
used is tried again now and then: blocks that draft for a few steps after `PATIENCE` steps, or a causal step if those
had drafts. The text does not depend on the choice (docs/semantics.md section 4).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from operator import mul, truediv
from typing import NamedTuple

PATIENCE = 512
TRIAL = 6
"""Steps for which blocks are tried: 1.2 % of PATIENCE, at a cost per step of at most about twice a causal one's."""
WARM = 2
"""Timings of blocks before they are judged."""
FORGET = 0.95
LEARN = 0.1
"""Weight of a timing in the running mean, once there are more of them."""
KEEP = 1.02
"""What is used stays unless others yield so much more per second: on a GPU every kind of step is recorded once."""
PRIOR = 4.0
"""Accepted drafts, and as many rejected ones, that every depth is believed to have had at first."""


class Drafting(NamedTuple):
    """The blocks of a step. size = positions of each, 0 for none; branches: one behind every clean row, else one behind
    the last draft."""

    size: int
    branches: bool = True


CAUSAL = Drafting(0)


class DraftPolicy:
    """choices = what a step may draft, `CAUSAL` among them.

    Costs are per number of rows (of powers of two). A step verifies as many drafts as a block of its has. Threads may
    share one: what two of them note at once may be lost, which costs a measurement.
    """

    def __init__(self, choices: Sequence[Drafting]) -> None:
        assert CAUSAL in choices
        self.choices = tuple(sorted(choices))
        self.drafting = max(self.choices)
        kinds = {item.branches: item for item in self.choices if item != CAUSAL}
        # the largest blocks of every kind, and none, are measured first: costs of the others lie between them
        self._first = [*(kinds[branches] for branches in sorted(kinds, reverse=True)), CAUSAL]
        largest = self.drafting.size
        self._right = [PRIOR] * largest
        self._tried = [2 * PRIOR] * largest
        self._costs: dict[tuple[int, Drafting], tuple[float, int]] = {}
        self._steps = 0
        self._trial = 0

    def acceptance(self, depth: int) -> float:
        """Share of the drafts at a depth (from 1) that are right when those before them are."""
        return self._right[depth - 1] / self._tried[depth - 1]

    def tokens(self, drafting: Drafting) -> float:
        """Expected tokens per step."""
        runs = self._runs()
        return _expected(drafting, runs, list(accumulate(runs)))

    def _runs(self) -> list[float]:
        """[n]: the share of steps that accept all of n drafts; 1 for none."""
        return list(accumulate(map(truediv, self._right, self._tried), mul, initial=1.0))

    def accepted(self, held: int, right: int) -> None:
        """A request had `held` drafts in a step, of which the first `right` were accepted."""
        for depth in range(1, min(held, right + 1) + 1):
            self._right[depth - 1] = FORGET * self._right[depth - 1] + (depth <= right)
            self._tried[depth - 1] = FORGET * self._tried[depth - 1] + 1

    def timed(self, rows: int, drafting: Drafting, seconds: float) -> None:
        """A step of `rows` rows with these blocks took `seconds`."""
        rows = _bucket(rows)
        mean, count = self._costs.get((rows, drafting), (0.0, 0))
        weight = max(1 / (count + 1), LEARN)
        # a step that something else has delayed tells nothing
        seconds = min(seconds, 3 * mean) if count >= WARM else seconds
        self._costs[rows, drafting] = mean + weight * (seconds - mean), count + 1

    def cost(self, rows: int, drafting: Drafting) -> float | None:
        """Seconds of a step; between two sizes of the same kind that were measured, on the line. None if unknown."""
        return _between(self._known(rows, drafting.branches), drafting.size)

    def _known(self, rows: int, branches: bool) -> list[tuple[int, float]]:
        """Sizes of one kind of block that were measured, in order, and their costs."""
        alike = [item for item in self.choices if item == CAUSAL or item.branches == branches]
        return [(item.size, self._costs[rows, item][0]) for item in alike if (rows, item) in self._costs]

    def next(self, rows: int) -> Drafting:
        """The blocks of the next step."""
        rows = _bucket(rows)
        self._steps += 1
        if self._trial > 0:
            self._trial -= 1
            return self.drafting
        unknown = [item for item in self._first if self._costs.get((rows, item), (0, 0))[1] < WARM]
        if unknown:
            return self._try(unknown[0])
        if self._steps >= PATIENCE:
            self._steps = 0
            if self.drafting != CAUSAL:
                return self._try(CAUSAL, 1)
            return self._try(self._best(rows, [item for item in self.choices if item != CAUSAL]))
        self.drafting = self._best(rows, self.choices, self.drafting)
        return self.drafting

    def _try(self, drafting: Drafting, steps: int = TRIAL) -> Drafting:
        self.drafting, self._trial = drafting, steps - 1
        return drafting

    def _best(self, rows: int, choices: Sequence[Drafting], used: Drafting | None = None) -> Drafting:
        known, runs = {branches: self._known(rows, branches) for branches in (False, True)}, self._runs()
        totals = list(accumulate(runs))
        costs = {item: _between(known[item.branches], item.size) for item in choices}
        rates = {item: _expected(item, runs, totals) / cost for item, cost in costs.items() if cost}
        best = max(rates, key=lambda item: rates[item], default=CAUSAL)
        return used if used in rates and rates[best] < KEEP * rates[used] else best


def _expected(drafting: Drafting, runs: Sequence[float], totals: Sequence[float]) -> float:
    """Tokens per step. runs[n]: the share of steps that accept all of n drafts; totals: their running sums."""
    if drafting.branches:
        return totals[drafting.size]
    drafted = 1 / (2 - runs[drafting.size])
    return drafted * totals[drafting.size] + 1 - drafted


def _between(known: Sequence[tuple[int, float]], size: int) -> float | None:
    """The cost of a size, on the line between those around it that are known; None beyond them."""
    place = bisect_left(known, (size,))
    if place < len(known) and known[place][0] == size:
        return known[place][1]
    if not 0 < place < len(known):
        return None
    (low, below), (high, above) = known[place - 1], known[place]
    return below + (above - below) * (size - low) / (high - low)


def _bucket(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()


def choices_of(block: int, readout: str) -> tuple[Drafting, ...]:
    """What decodes alike: shorter blocks only where no row reads the rows behind it."""
    sizes = range(1, block + 1) if readout == "causal" else (block,)
    return CAUSAL, *(Drafting(size, branches) for size in sizes for branches in (False, True))
