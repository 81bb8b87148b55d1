"""Where the next drafts stand: behind the rows at which a step most likely ends.

A block behind every clean row finds the next drafts wherever a step ends, and costs rows; one behind the last draft is
lost whenever a draft is wrong. The horizon head says of every clean row how many drafts behind it are safe, which is
where the step that verifies them ends: a few blocks stand there. Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PLACED = (1, 2)
"""Numbers of placed blocks that are tried: every kind of step costs trials, and on a GPU a graph."""
BELIEVED = 16.0
"""Misses that are believed at first, of as many that measured acceptance alone would have: the head is as good."""
KEPT = 0.99
"""Of misses, from one request's step to the next."""
FADE = 0.97
"""What is left of them from one choice to the next, where no placed blocks are used."""
FLOOR = 0.5
"""Misses of both kinds that are always believed besides: where all drafts were right for long there are none, and the
first one would say that the head is worth nothing, for ever, since its blocks would not be used any more."""


def likely_ends(horizon: Tensor, have: Tensor, count: int, blocks: int) -> Tensor:
    """[rows, blocks] int64: the most likely numbers of accepted drafts of a step, all of them different.

    horizon [rows, B + 1]: logits of how many drafts are safe; have [rows]: drafts that there are, of which the step
    verifies up to `count`. Where there are fewer ends than blocks, the others stand anywhere.
    """
    share, number = horizon.softmax(dim=1), torch.arange(count + 1, device=horizon.device)
    last = have.clamp_max(count)[:, None]
    more = share.flip(1).cumsum(dim=1).flip(1)  # where all drafts are right, more would have been
    ends = torch.where(number == last, more[:, : count + 1], share[:, : count + 1])
    return ends.masked_fill(number > last, -1.0).topk(blocks, dim=1).indices


def blind_share(size: int, blocks: int, runs: Sequence[float]) -> float:
    """The share of steps that end where most do: what so many blocks find by measured acceptance alone. runs[n]: the
    share of steps that accept all of n drafts; size: drafts that are verified."""
    ends = [runs[number] - runs[number + 1] for number in range(size)]
    return sum(sorted([*ends, runs[size]], reverse=True)[:blocks])


class EndsPrior:
    """What the head's places are worth here: which share of the misses that places by measured acceptance alone would
    have is left with those of the head. One number for all sizes, so that few steps tell it."""

    def __init__(self) -> None:
        self._missed = self._blind = BELIEVED - FLOOR

    @property
    def left(self) -> float:
        """1 where the head knows nothing more, 0 where it is always right."""
        return (self._missed + FLOOR) / (self._blind + FLOOR)

    def found(self, size: int, blocks: int, runs: Sequence[float]) -> float:
        """The share of steps behind which there are drafts."""
        return max(0.0, 1 - self.left * (1 - blind_share(size, blocks, runs)))

    def seen(self, steps: int, missed: int, blind: float) -> None:
        """So many requests of a step ended at no block, of those that verified all drafts of theirs; blind: the share
        of them that would have by measured acceptance alone."""
        kept = KEPT**steps
        self._missed, self._blind = kept * self._missed + missed, kept * self._blind + steps * blind

    def fade(self) -> None:
        """No placed blocks are used, which may have become better: what was seen counts less and less."""
        self._missed, self._blind = FADE * self._missed, FADE * self._blind
