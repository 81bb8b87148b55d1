"""How much to draft: the blocks of every step, from what steps cost here and from how many drafts were accepted.

With blocks of `b` positions behind every clean row a step yields `E(b) = 1 + p1 + p1 p2 + ... + p1..pb` tokens of each
request, `pi` being the share of drafts at depth `i` that are right when those before them are. With one block, behind
the last draft, a step that rejects leaves nothing to verify in the next one: if `q = p1..pb` of the steps accept all
drafts, a share of `1 / (2 - q)` of the steps has drafts and yields `E(b)`, the others yield 1. The blocks with most
tokens per second are used; none at all is plain causal decoding. Costs are the middle of the last timings, shares are
running means, and what is not used is tried again now and then. The text does not depend on the choice
(docs/semantics.md section 4).

Beliefs may be wrong, and texts change. So the time that drafting has lost to causal decoding is kept in a purse, in
steps of causal decoding: a step that drafts takes out what it took longer than the tokens it gave would have taken
there, or puts in what it gained, up to `PURSE`; every step puts in `SLACK`. What the purse does not hold is not risked.
Over any steps drafting loses at most `PURSE`, `SLACK` of each, and once for every kind of step what its first
measurement was above its estimate. What looks too dear is tried again from other savings (`retrial`), which are lost at
most once on top. A purse is never emptier than `-PURSE`: what one step takes beyond that, which
needs costs that rose all at once, is forgotten, at most once in `PURSE / SLACK` steps; not to draft any more would not
bring it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from math import ceil, inf
from operator import mul
from typing import NamedTuple

from .ends import EndsPrior, blind_share
from .retrial import Retrials, aged
from .timings import Timings, between

PURSE = 4.0
SLACK = 0.004
SWITCH = 0.5
"""Steps of causal decoding that it takes to begin to draft, besides the steps: buffers are spread (`Store.spread`)."""
GUESS = 1.0
"""Steps of causal decoding that a step is believed to take longer than one before any like it was measured."""
PATIENCE, CLOSE = (256, 512), 1.5
"""Steps with drafts, after which causal ones measure what those cost now, and so do those of other blocks that may be
better (`_promising`): the first where drafts yield less than CLOSE times as much per second. Every fourth time larger
blocks are tried instead."""
EARLY = 16
"""Steps with drafts before that happens for the first time, doubled until it is `PATIENCE`: what was measured when a
process had just begun, or a GPU had waited for a compiler, may be far off."""
PAUSES = (64, 1024)
"""Causal steps until drafts are tried, doubled where they did not pay."""
SOON = 16
"""Causal steps until they are tried for a request that is new."""
LOOK = 8
"""Steps with drafts from one choice to the next."""
TRIAL = 6
LEAST = 3
"""Steps of a trial, and of the shortest one: nothing is verified in the first."""
WARM, FIRST = 3, 5
"""Timings of blocks before they are judged, and of causal steps, by which all others are judged."""
AGAIN = 3
"""Causal steps in a row that measure anew what they cost: the first finds other buffers than those that follow."""
MEMORY = 64.0
LONG = 10
"""Drafts of a depth that count, or those of so many steps if these are more."""
KEEP = 1.03
"""Other blocks than those in use are taken where they yield so much more per second."""
PROMISING = 1.1
"""Other blocks are measured again where they would yield so much more if they cost as little as may be hoped."""
NEW = 1.02
"""The same on top for blocks that were never measured: on a GPU every kind of step is recorded once."""
FADE = 0.97
"""What is left of the drafts of a depth, from one choice to the next, where blocks are too short for it."""
PRIOR = 4.0
"""Accepted drafts, and as many rejected ones, that every depth is believed to have had at first."""


class Drafting(NamedTuple):
    """The blocks of a step. size = positions of each, 0 for none; branches: one behind every clean row, else one behind
    the last draft, or, with placed > 0, so many where the step most likely ends (`flarec.decode.ends`)."""

    size: int
    branches: bool = True
    placed: int = 0

    @property
    def kind(self) -> tuple[bool, int]:
        """Sizes of one kind cost alike."""
        return self.branches, self.placed

    @property
    def blocks(self) -> int:
        """Of each request."""
        return (1 + self.size if self.branches else max(1, self.placed)) if self.size else 0

    @property
    def rows(self) -> int:
        """Of each request."""
        return 1 + self.size + self.size * self.blocks


CAUSAL = Drafting(0)


class DraftPolicy:
    """choices = what a step may draft, `CAUSAL` among them.

    Costs are per number of rows (of powers of two). A step verifies as many drafts as a block of its has. Threads may
    share one: what two of them note at once may be lost, which costs a measurement.
    """

    def __init__(self, choices: Sequence[Drafting]) -> None:
        assert CAUSAL in choices
        self.choices = tuple(sorted(choices))
        self.drafting = CAUSAL
        self.purse = PURSE
        self.retrials = Retrials()
        self.ends = EndsPrior()
        kinds = {item.kind: item for item in self.choices if item != CAUSAL}
        # of the blocks the largest of every kind are measured first: costs of the others lie between them
        self._first = [kinds[kind] for kind in sorted(kinds)]
        largest = max(self.choices).size
        self._right, self._tried = [PRIOR] * largest, [2 * PRIOR] * largest
        self._news = [[0, 0] for _ in range(largest)]
        self._timings: dict[tuple[int, Drafting], Timings] = {}
        self._rows = 0
        self._steps = 0  # that were timed
        self._extra = 0.0  # of a step that is drafted now
        self._wait = 0  # steps until a choice is made
        self._then: list[tuple[Drafting, float, int]] = []  # what is taken before the next choice, the next one last
        self._pause = PAUSES[0]
        self._drafted = 0  # steps with drafts since the costs were looked at
        self._patience = EARLY
        self._looks: Counter[int] = Counter()

    def acceptance(self, depth: int) -> float:
        """Share of the drafts at a depth (from 1) that are right when those before them are."""
        self._learn()
        return next(islice(self._shares(), depth - 1, None))

    def tokens(self, drafting: Drafting) -> float:
        """Expected tokens per step."""
        runs = self._runs()
        return self._expected(drafting, runs, list(accumulate(runs)))

    def _runs(self) -> list[float]:
        """[n]: the share of steps that accept all of n drafts; 1 for none."""
        return list(accumulate(self._shares(), mul, initial=1.0))

    def _shares(self) -> Iterator[float]:
        """Of the drafts at every depth that are right. Of a deep one of which little was seen: as at the one before."""
        share, weight = 0.0, 0.0
        for right, tried in zip(self._right, self._tried, strict=True):
            share = (right + weight * share) / (tried + weight)
            weight = PRIOR / 2
            yield share

    def begun(self) -> None:
        """A request is new, and its text may be another one: of drafts that blocks in use are too short for, half of
        what is known of others is forgotten."""
        self._pause, self._wait = PAUSES[0], min(self._wait, SOON)
        if self.drafting != CAUSAL:
            for depth in range(self.drafting.size, len(self._tried)):
                self._right[depth], self._tried[depth] = self._right[depth] / 2, self._tried[depth] / 2

    def accepted(self, held: int, right: int) -> None:
        """A request had `held` drafts in a step, of which the first `right` were accepted."""
        for depth in range(min(held, right + 1)):
            news = self._news[depth]
            news[0] += depth < right
            news[1] += 1

    def _learn(self) -> None:
        """From the last step's drafts."""
        if not self.drafting.placed:
            self.ends.fade()
        for depth, news in enumerate(self._news):
            right, tried = news
            if tried:
                kept = 1 - 1 / max(MEMORY / tried, LONG)
                self._right[depth] = kept * self._right[depth] + right
                self._tried[depth] = kept * self._tried[depth] + tried
                news[:] = 0, 0
            elif self.drafting != CAUSAL and depth >= self.drafting.size:
                self._right[depth], self._tried[depth] = FADE * self._right[depth], FADE * self._tried[depth]

    def ended(self, drafting: Drafting, requests: int, missed: int) -> None:
        """So many requests of a step with placed blocks verified all drafts that it can, and some ended at no block."""
        self.ends.seen(requests, missed, 1 - blind_share(drafting.size, drafting.placed, self._runs()))

    def _doubt(self) -> None:
        """What was seen counts as little as what was believed at first."""
        for depth, tried in enumerate(self._tried):
            if tried > 2 * PRIOR:
                share = 2 * PRIOR / tried
                self._right[depth], self._tried[depth] = share * self._right[depth], share * tried

    def timed(self, rows: int, drafting: Drafting, seconds: float, tokens: float) -> None:
        """A step of `rows` rows with these blocks took `seconds`, and gave so many tokens per request."""
        rows = _bucket(rows)
        if (own := self._timings.get((rows, drafting))) is None:
            own = self._timings[rows, drafting] = Timings()
        self._steps += 1
        plain = self._timings.get((rows, CAUSAL))
        gain = self.retrials.fill(SLACK)
        if self.retrials.trying and drafting == self.drafting and plain is not None and plain.cost:
            own.again(seconds, self._steps)
            self.retrials.end(seconds / plain.cost - tokens)
        else:
            own.add(seconds, self._steps)
            if drafting != CAUSAL and plain is not None and plain.cost:
                gain += tokens - own.cost / plain.cost
        self.retrials.spill(max(0.0, self.purse + gain - PURSE))
        self.purse = max(-PURSE, min(PURSE, self.purse + gain))

    def cost(self, rows: int, drafting: Drafting) -> float | None:
        """Seconds of a step; between two of the same kind that were measured, by the rows of each. None if unknown."""
        return between(self._known(_bucket(rows), drafting.kind), drafting.rows)

    def _known(self, rows: int, kind: tuple[bool, int]) -> list[tuple[int, float]]:
        """Rows of each request with one kind of block, where that was measured, in order, and their costs."""
        alike = [item for item in self.choices if item == CAUSAL or item.kind == kind]
        return [(item.rows, self._timings[rows, item].cost) for item in alike if (rows, item) in self._timings]

    def _count(self, drafting: Drafting) -> int:
        found = self._timings.get((self._rows, drafting))
        return 0 if found is None else found.count

    def next(self, rows: int) -> Drafting:
        """The blocks of the next step."""
        rows = _bucket(rows)
        if rows != self._rows:  # its steps have other costs
            self._rows, self._wait, self._patience = rows, 0, min(self._patience, _early(self._looks[rows]))
            self._then.clear()
            self.retrials.trying = False
        if self.retrials.trying and self._goes_on():
            return self.drafting
        self._drafted += self.drafting != CAUSAL
        if self.drafting != CAUSAL and self.purse < self._extra:
            self._then.clear()
            self._take(CAUSAL)
            self._rest()
        elif self._wait > 0:
            self._wait -= 1
        elif self._then:
            self._take(*self._then.pop(), back=True)
        else:
            self._choose()
        return self.drafting

    def unmeasured(self) -> Drafting:
        """The blocks of a step that will not be timed, in the place of `next`: those in use. There may be many such
        steps in a row, and what looks too dear is tried in one."""
        if not self.retrials.trying:
            return self.drafting
        return self._then[0][0] if self._then else CAUSAL

    def _choose(self) -> None:
        self._learn()
        if self._count(CAUSAL) < FIRST:
            return self._take(CAUSAL)
        costs = self._relative()
        for item in self._first:
            extra = costs[item] - 1 if item in costs else GUESS
            if self._count(item) < WARM and self.purse >= LEAST * extra + SWITCH * (self.drafting == CAUSAL):
                return self._take(item, extra)
        if self.drafting != CAUSAL and self._drafted >= self._patience:
            return self._again(costs)
        if self.drafting == CAUSAL and (old := self._aged(costs)) is not None:
            return self._retry(old, SWITCH)
        return self._judge(costs)

    def _judge(self, costs: Mapping[Drafting, float]) -> None:
        """Go on drafting while that pays; else rest, and then see whether it does now."""
        used, hoped = self.drafting, self._hoped(costs)
        best, gain = self._best(costs, hoped)
        pays, self._patience = gain > 1.0, min(PATIENCE[gain > CLOSE], _early(self._looks[self._rows]))
        if used != CAUSAL:
            if pays:
                self._pause = PAUSES[0]
                self._take(best, costs[best] - 1, LOOK - 1)
            else:
                self._take(CAUSAL)
                self._rest()
        elif best == CAUSAL:  # no blocks are known, or those that are would take more than a full purse
            self._rest()
        elif (need := _need(hoped[best])) > self.purse:
            self._wait = ceil((need - self.purse) / SLACK)
        else:
            self._doubt()
            self._forget(best)
            self._take(best, hoped[best] - 1, TRIAL - 1)

    def _best(self, costs: Mapping[Drafting, float], hoped: Mapping[Drafting, float]) -> tuple[Drafting, float]:
        """The blocks that yield most per second, of those that may be tried, and how much, a causal step being 1."""
        runs = self._runs()
        totals, rates = list(accumulate(runs)), dict[Drafting, float]()
        for item, cost in costs.items():
            if item != CAUSAL and (_need(hoped[item]) <= PURSE if self.drafting == CAUSAL else cost - 1 <= self.purse):
                favour = KEEP if item == self.drafting else 1.0 if self._count(item) else 1 / NEW
                rates[item] = favour * self._expected(item, runs, totals) / cost
        best = max(rates, key=lambda item: rates[item], default=CAUSAL)
        return best, self._expected(best, runs, totals) / costs.get(best, 1.0)

    def _again(self, costs: Mapping[Drafting, float]) -> None:
        """What is not used for long is measured anew: what a causal step costs, and what other blocks cost that may be
        better; now and then how many drafts are right in the largest blocks."""
        used = self.drafting
        self._drafted, self._looks[self._rows] = 0, self._looks[self._rows] + 1
        largest = max(item for item in self.choices if item.kind == used.kind)
        if self._looks[self._rows] % 4:
            self._forget(CAUSAL)
            self._then = [(used, self._extra, 0), (CAUSAL, 0.0, AGAIN - 1)]
            other = self._promising(costs)
            if other is not None:
                self._forget(other)
                self._then.append((other, self._hoped(costs)[other] - 1, AGAIN - 1))
            elif (old := self._aged(costs)) is not None:
                return self._retry(old)
            self._take(*self._then.pop())
        elif largest != used and costs.get(largest, inf) - 1 < self.purse:
            self._take(largest, costs[largest] - 1, TRIAL - 1)

    def _promising(self, costs: Mapping[Drafting, float]) -> Drafting | None:
        """The blocks that would be better than those in use if they cost as little as may be hoped."""
        runs = self._runs()
        totals = list(accumulate(runs))
        rates = {
            item: self._expected(item, runs, totals) / cost for item, cost in self._hoped(costs).items()
            if item not in (CAUSAL, self.drafting) and cost - 1 <= self.purse
        }
        best = max(rates, key=lambda item: rates[item], default=None)
        used = self._expected(self.drafting, runs, totals) / costs.get(self.drafting, 1.0)
        return best if best is not None and rates[best] > PROMISING * used else None

    def _aged(self, costs: Mapping[Drafting, float]) -> Drafting | None:
        """What was measured long ago and may have been delayed then: it would be better than what is used, or nothing
        else is left to draft, if it cost no more than a causal step; and its trial can be paid. The best of those."""
        runs = self._runs()
        totals, used = list(accumulate(runs)), self.drafting
        least = PROMISING * self._expected(used, runs, totals) / costs.get(used, 1.0)
        if used == CAUSAL and self._best(costs, self._hoped(costs))[0] == CAUSAL:
            least = 0.0  # nobody sees whether drafts are right
        gains = {
            item: self._expected(item, runs, totals) for item, cost in costs.items()
            if item not in (CAUSAL, used) and (found := self._timings.get((self._rows, item))) is not None
            and aged(found, self._steps) and self.retrials.affords(cost - 1 + SWITCH)
        }
        best = max(gains, key=lambda item: gains[item], default=None)
        return best if best is not None and gains[best] > least else None

    def _retry(self, drafting: Drafting, switch: float = 0.0) -> None:
        """One step, which `retrials` pays."""
        self.retrials.begin(switch)
        self._take(drafting, back=True)

    def _goes_on(self) -> bool:
        """Whether the step of a trial was no measure yet. In the end it is given up, until it is old once more."""
        goes_on = self.retrials.goes_on()
        if not goes_on and (found := self._timings.get((self._rows, self.drafting))) is not None:
            found.last = self._steps
        return goes_on

    def _hoped(self, costs: Mapping[Drafting, float]) -> dict[Drafting, float]:
        """What steps may cost: a third of what one takes longer than a causal one may be wrong if it was measured once;
        the (n + 2)-th part after n times."""
        hoped = {}
        for item, cost in costs.items():
            found = self._timings.get((self._rows, item))
            hoped[item] = cost - max(0.0, cost - 1) / (3 if found is None else 2 + found.occasions)
        return hoped

    def _expected(self, drafting: Drafting, runs: Sequence[float], totals: Sequence[float]) -> float:
        """Tokens per step. runs[n]: the share of steps that accept all of n drafts; totals: their running sums."""
        size, _, placed = drafting
        if drafting.branches:
            return totals[size]
        drafted = 1 / (2 - (self.ends.found(size, placed, runs) if placed else runs[size]))
        return drafted * totals[size] + 1 - drafted

    def _take(self, drafting: Drafting, extra: float = 0.0, wait: int = 0, *, back: bool = False) -> None:
        """From the next step on, for so many steps behind it. back: causal steps were a look, which drafting pays."""
        if self.drafting == CAUSAL != drafting and not back:
            self.purse -= SWITCH
        self.drafting, self._extra, self._wait = drafting, max(0.0, extra), wait

    def _forget(self, drafting: Drafting) -> None:
        """What a step costs was measured a while ago."""
        if (found := self._timings.get((self._rows, drafting))) is not None:
            found.forget()

    def _rest(self) -> None:
        """Causal steps until drafts are tried again."""
        self._wait, self._pause = self._pause, min(2 * self._pause, PAUSES[1])

    def _relative(self) -> dict[Drafting, float]:
        """Costs of steps, a causal one being 1; of those about which something is known."""
        known = {kind: self._known(self._rows, kind) for kind in {item.kind for item in self.choices}}
        costs = {item: between(known[item.kind], item.rows) for item in self.choices}
        plain = costs[CAUSAL] or 1.0
        return {item: cost / plain for item, cost in costs.items() if cost}


def _need(cost: float) -> float:
    """What a purse has to hold for a trial of steps that cost so many causal ones; of the dearest, a short trial."""
    return max(SWITCH + LEAST * (cost - 1), min(SWITCH + TRIAL * (cost - 1), PURSE))


def _early(looks: int) -> int:
    """Steps with drafts before costs are looked at once more; as many as `PATIENCE` allows after a few looks."""
    return min(PATIENCE[1], EARLY << min(looks, PATIENCE[1].bit_length()))


def _bucket(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()


def choices_of(block: int, readout: str, placed: Sequence[int] = ()) -> tuple[Drafting, ...]:
    """What decodes alike: shorter blocks only where no row reads the rows behind it. placed: numbers of blocks that
    stand where a step most likely ends, in the place of one behind the last draft; none: nobody tells where."""
    sizes = range(1, block + 1) if readout == "causal" else (block,)
    few = [Drafting(size, False, blocks) for size in sizes for blocks in placed or (0,) if blocks <= size]
    return CAUSAL, *few, *(Drafting(size, True) for size in sizes)
