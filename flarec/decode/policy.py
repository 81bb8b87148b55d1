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

from collections.abc import Sequence
from typing import NamedTuple

PATIENCE = 512
TRIAL = 6
"""Steps for which blocks are tried: 1.2 % of PATIENCE, at a cost per step of at most about twice a causal one's."""
WARM = 2
"""Timings of blocks before they are judged."""
FORGET = 0.95
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

    Costs are per number of rows (of powers of two). A step verifies as many drafts as a block of its has.
    """

    def __init__(self, choices: Sequence[Drafting]) -> None:
        assert CAUSAL in choices
        self.choices = tuple(sorted(choices))
        self.drafting = max(self.choices)
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
        total = running = 1.0
        for depth in range(1, drafting.size + 1):
            running *= self.acceptance(depth)
            total += running
        if drafting.branches:
            return total
        drafted = 1 / (2 - running)
        return drafted * total + 1 - drafted

    def accepted(self, held: int, right: int) -> None:
        """A request had `held` drafts in a step, of which the first `right` were accepted."""
        for depth in range(1, min(held, right + 1) + 1):
            self._right[depth - 1] = FORGET * self._right[depth - 1] + (depth <= right)
            self._tried[depth - 1] = FORGET * self._tried[depth - 1] + 1

    def timed(self, rows: int, drafting: Drafting, seconds: float) -> None:
        """A step of `rows` rows with these blocks took `seconds`."""
        rows = _bucket(rows)
        mean, count = self._costs.get((rows, drafting), (0.0, 0))
        weight = max(1 / (count + 1), 1 - 0.9)
        # a step that something else has delayed tells nothing
        seconds = min(seconds, 3 * mean) if count >= WARM else seconds
        self._costs[rows, drafting] = mean + weight * (seconds - mean), count + 1

    def cost(self, rows: int, drafting: Drafting) -> float | None:
        """Seconds of a step; between two sizes of the same kind that were measured, on the line. None if unknown."""
        alike = [other for other in self.choices if other == CAUSAL or other.branches == drafting.branches]
        known = {other.size: self._costs[rows, other][0] for other in alike if (rows, other) in self._costs}
        size = drafting.size
        if size in known:
            return known[size]
        below, above = [s for s in sorted(known) if s < size], [s for s in sorted(known) if s > size]
        if not below or not above:
            return None
        low, high = below[-1], above[0]
        return known[low] + (known[high] - known[low]) * (size - low) / (high - low)

    def next(self, rows: int) -> Drafting:
        """The blocks of the next step."""
        rows = _bucket(rows)
        self._steps += 1
        if self._trial > 0:
            self._trial -= 1
            return self.drafting
        unknown = [item for item in self._measured_first() if self._costs.get((rows, item), (0, 0))[1] < WARM]
        if unknown:
            return self._try(unknown[0])
        if self._steps >= PATIENCE:
            self._steps = 0
            if self.drafting != CAUSAL:
                return self._try(CAUSAL, 1)
            return self._try(self._best(rows, [item for item in self.choices if item != CAUSAL]))
        self.drafting = self._best(rows, self.choices)
        return self.drafting

    def _measured_first(self) -> list[Drafting]:
        """The largest blocks of every kind, and none: costs of the others lie between them."""
        kinds = {item.branches: item for item in self.choices if item != CAUSAL}
        return [*(kinds[branches] for branches in sorted(kinds, reverse=True)), CAUSAL]

    def _try(self, drafting: Drafting, steps: int = TRIAL) -> Drafting:
        self.drafting, self._trial = drafting, steps - 1
        return drafting

    def _best(self, rows: int, choices: Sequence[Drafting]) -> Drafting:
        costs = {item: self.cost(rows, item) for item in choices}
        rates = {item: self.tokens(item) / cost for item, cost in costs.items() if cost}
        return max(rates, key=lambda item: rates[item], default=CAUSAL)


def _bucket(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()


def choices_of(block: int, readout: str) -> tuple[Drafting, ...]:
    """What decodes alike: shorter blocks only where no row reads the rows behind it."""
    sizes = range(1, block + 1) if readout == "causal" else (block,)
    return CAUSAL, *(Drafting(size, branches) for size in sizes for branches in (False, True))
