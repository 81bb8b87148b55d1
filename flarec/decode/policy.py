"""How much to draft: the block size of every step, from what steps cost here and from how many drafts were accepted.

With blocks of `b` positions a step yields `E(b) = 1 + p1 + p1 p2 + ... + p1..pb` tokens of each request, `pi` being the
share of drafts at depth `i` that are right when those before them are, and takes `cost(b)`. The size with the largest
`E(b) / cost(b)` is used; 0 is plain causal decoding. Both are running means, and what is not used is tried again now
and then: a size that drafts for a few steps after `PATIENCE` steps, or a causal step if those had drafts. The text does
not depend on the choice (docs/semantics.md section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

PATIENCE = 512
TRIAL = 6
"""Steps for which a size is tried: 1.2 % of PATIENCE, at a cost per step of at most about twice a causal one's."""
WARM = 2
"""Timings of a size before it is judged."""
FORGET = 0.95
PRIOR = 4.0
"""Accepted drafts, and as many rejected ones, that every depth is believed to have had at first."""


class DraftPolicy:
    """sizes = block sizes to choose from, ascending; the first is 0.

    Costs are per number of rows (of powers of two). A step verifies as many drafts as it makes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        assert sizes[0] == 0 and list(sizes) == sorted(sizes)
        self.sizes = tuple(sizes)
        self.size = self.sizes[-1]
        largest = self.sizes[-1]
        self._right = [PRIOR] * largest
        self._tried = [2 * PRIOR] * largest
        self._costs: dict[tuple[int, int], tuple[float, int]] = {}
        self._steps = 0
        self._trial = 0

    def acceptance(self, depth: int) -> float:
        """Share of the drafts at a depth (from 1) that are right when those before them are."""
        return self._right[depth - 1] / self._tried[depth - 1]

    def tokens(self, size: int) -> float:
        """Expected tokens of a step with blocks of `size`."""
        total = running = 1.0
        for depth in range(1, size + 1):
            running *= self.acceptance(depth)
            total += running
        return total

    def accepted(self, held: int, right: int) -> None:
        """A request had `held` drafts in a step, of which the first `right` were accepted."""
        for depth in range(1, min(held, right + 1) + 1):
            self._right[depth - 1] = FORGET * self._right[depth - 1] + (depth <= right)
            self._tried[depth - 1] = FORGET * self._tried[depth - 1] + 1

    def timed(self, rows: int, size: int, seconds: float) -> None:
        """A step of `rows` rows that verified `size` drafts and made blocks of `size` took `seconds`."""
        rows = _bucket(rows)
        mean, count = self._costs.get((rows, size), (0.0, 0))
        weight = max(1 / (count + 1), 1 - 0.9)
        # a step that something else has delayed tells nothing
        seconds = min(seconds, 3 * mean) if count >= WARM else seconds
        self._costs[rows, size] = mean + weight * (seconds - mean), count + 1

    def cost(self, rows: int, size: int) -> float | None:
        """Seconds of a step; between two sizes that were measured, on the line. None if neither is known."""
        known = {s: self._costs[rows, s][0] for s in self.sizes if (rows, s) in self._costs}
        if size in known:
            return known[size]
        below, above = [s for s in known if s < size], [s for s in known if s > size]
        if not below or not above:
            return None
        low, high = below[-1], above[0]
        return known[low] + (known[high] - known[low]) * (size - low) / (high - low)

    def next(self, rows: int) -> int:
        """The block size of the next step."""
        rows = _bucket(rows)
        self._steps += 1
        if self._trial > 0:
            self._trial -= 1
            return self.size
        unknown = [s for s in (self.sizes[-1], 0) if self._costs.get((rows, s), (0, 0))[1] < WARM]
        if unknown:
            return self._try(unknown[0])
        if self._steps >= PATIENCE:
            self._steps = 0
            best = self._best(rows, [s for s in self.sizes if s > 0])
            return self._try(best if self.size == 0 else 0, TRIAL if self.size == 0 else 1)
        self.size = self._best(rows, self.sizes)
        return self.size

    def _try(self, size: int, steps: int = TRIAL) -> int:
        self.size, self._trial = size, steps - 1
        return size

    def _best(self, rows: int, sizes: Sequence[int]) -> int:
        costs = {size: self.cost(rows, size) for size in sizes}
        rates = {size: self.tokens(size) / cost for size, cost in costs.items() if cost}
        return max(rates, key=lambda size: rates[size], default=0)


def _bucket(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()


def sizes_of(block: int, readout: str) -> tuple[int, ...]:
    """The block sizes that decode alike: shorter blocks only where no row reads the rows behind it."""
    return tuple(range(block + 1)) if readout == "causal" else (0, block)
