"""Kinds of steps that were measured long ago, and look too dear to be used: one step of such a kind is tried again.

A measure may have been an outlier: the host was paused, something compiled, another program shared the machine. What
is not used is not measured, and so would look dear for ever. What such a step loses to causal decoding is paid from
savings of their own, so that what is tried again never stands in the way of the drafts that are known to pay, nor they
in its. Savings begin full. What the purse of `policy` cannot hold fills them, and until they are full a share of what
every step puts in there. A step may cost more than they hold: then they owe the rest.
"""

from __future__ import annotations

from .timings import Timings

SAVED = 4.0
"""Steps of causal decoding that savings hold at most."""
OWED = 1024.0
"""Those that they may lack: what a step loses beyond that is forgotten, or one that a suspended host interrupted would
end all trials. No step of a model takes as many times as long as a causal one, for as many rows as it has."""
SHARE = 0.25
"""Of what every step puts into the purse, while savings are not full."""
AGES = (2048, 1 << 16)
"""Steps since a kind was measured on one occasion, until it is tried again; four times as many for each further one."""
TRIES = 12
"""Steps of a trial until one of them was timed: those that are recorded are not, and neither are some behind them."""


def aged(found: Timings, now: int) -> bool:
    """Whether it was measured so long ago that it may be wrong. now: steps so far."""
    return now - found.last >= min(AGES[0] << 2 * min(found.occasions - 1, 8), AGES[1])


class Retrials:
    """saved: steps of causal decoding that trials may lose. trying: whether a step is tried now."""

    def __init__(self) -> None:
        self.saved = SAVED
        self.trying = False
        self._left = 0

    def affords(self, loss: float) -> bool:
        """Whether such a step may be tried. One that is dearer than all savings may be when they are full."""
        return self.saved >= min(loss, SAVED)

    def begin(self, switch: float) -> None:
        """With the next step. switch: what it takes to get there."""
        self.trying, self._left = True, TRIES
        self._pay(switch)

    def goes_on(self) -> bool:
        """Whether the step of a trial was not timed, and another one is tried."""
        self._left -= 1
        self.trying = self.trying and self._left > 0
        return self.trying

    def end(self, loss: float) -> None:
        """The step was timed."""
        self.trying = False
        self._pay(loss)

    def fill(self, put: float) -> float:
        """What is left for the purse of what a step puts in."""
        if self.saved >= SAVED:
            return put
        self._pay(-SHARE * put)
        return (1 - SHARE) * put

    def spill(self, rest: float) -> None:
        """What the purse could not hold."""
        self._pay(-rest)

    def _pay(self, loss: float) -> None:
        self.saved = max(-OWED, min(SAVED, self.saved - loss))
