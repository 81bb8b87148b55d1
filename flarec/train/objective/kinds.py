"""The kinds of noisy block that a recipe draws: what each block's kind says, and which rows count.

Contract: docs/semantics.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ...layout import READOUTS
from ...recipe.diffusion import BlockKind, Diffusion, Loss

LOSSES: tuple[str, ...] = get_args(Loss)
"""Losses of a signal; a batch names them by their place here."""
COMPARING = ("tv", "el")
"""Those that need the distance of every pair."""


@dataclass(frozen=True)
class Kinds:
    """The kinds of `n` blocks. number [n] int64: index into `known`."""

    known: tuple[BlockKind, ...]
    number: Tensor

    @staticmethod
    def of(diffusion: Diffusion, number: Tensor) -> Kinds:
        return Kinds(tuple(kind for _, kind in diffusion.kinds), number)

    def __getitem__(self, index: Tensor) -> Kinds:
        """Of other blocks: `number[index]`."""
        return Kinds(self.known, self.number[index])

    def each(self, function: Callable[[BlockKind], int]) -> Tensor:
        """[n] int64 (bool for truths): a property of each block's kind."""
        return torch.tensor([function(kind) for kind in self.known])[self.number]

    @property
    def views(self) -> Tensor:
        return self.each(lambda kind: kind.views)

    @property
    def random(self) -> Tensor:
        """[n] bool: masked at a random rate; the others are masked everywhere."""
        return self.each(lambda kind: kind.mask == "random")

    @property
    def wrong_tokens(self) -> Tensor:
        """[n] float64: the share of visible positions that show a wrong token."""
        return torch.tensor([kind.wrong_tokens for kind in self.known], dtype=torch.float64)[self.number]

    @property
    def readout(self) -> Tensor:
        return self.each(lambda kind: READOUTS[kind.readout])

    @property
    def loss(self) -> Tensor:
        """[n] int64 into `LOSSES`."""
        return self.each(lambda kind: LOSSES.index(kind.loss))

    @property
    def until_fail(self) -> Tensor:
        """[n] bool: slots weigh as much as their drafts are likely to be looked at. `el` does so by itself."""
        return self.each(_weighs_slots)

    @property
    def used(self) -> list[BlockKind]:
        """Kinds that these blocks have."""
        return [self.known[number] for number in sorted(set(self.number.tolist()))]

    def losses(self) -> tuple[str, ...]:
        """Names of the losses of these blocks."""
        return tuple(name for name in LOSSES if any(kind.loss == name for kind in self.used))

    def weighs_slots(self) -> bool:
        """Whether `until_fail` is true anywhere."""
        return any(map(_weighs_slots, self.used))

    def signals(self, masked: Tensor, has_target: Tensor) -> Tensor:
        """[n, B] bool: which noisy rows are supervised, by each kind's `supervise` rule. masked: those that do not show
        their own token."""
        # A row sees its target only inside its own block, with the block_end readout, where that token is not masked.
        visible = torch.zeros_like(masked)
        visible[:, :-1] = ~masked[:, 1:]
        visible &= self.each(lambda kind: kind.readout == "block_end")[:, None]
        masked_input = self.each(lambda kind: kind.supervise != "masked-target")[:, None]
        hidden_target = self.each(lambda kind: kind.supervise != "masked-input")[:, None]
        return has_target & (masked | ~masked_input) & (~visible | ~hidden_target)


def _weighs_slots(kind: BlockKind) -> bool:
    return kind.slot_weights == "accept-until-fail" and kind.loss != "el"
