"""Pairs of a block as a chain: a draft counts only if all drafts before it were accepted.

`1 - TV` of a pair is the probability that its draft is accepted, drawn and verified with the best coupling. The product
over the first slots of a block stands for the probability that they all are, and the sum of these products over the
slots for the expected accepted length. Contract of the objective: docs/semantics.md section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 0.1
"""The least weight of a slot under `accept-until-fail`: late slots learn, too, while the early ones still fail."""


@dataclass(frozen=True)
class Chain:
    """Blocks of pairs and what their slots weigh, for `P` pairs.

    blocks      [n, S] int64  the pairs of each block by slot, -1 behind the last one; a pair is in one block at most
    length      [P]           weight of minus the pair's term of the expected accepted length
    until_fail  [P] bool      the pair's other losses weigh as much as its draft is likely to be looked at
    """

    blocks: Tensor
    length: Tensor
    until_fail: Tensor

    def part(self, blocks: slice, pairs: slice) -> Chain:
        """Of a chunk that holds these pairs and these blocks, whole ones."""
        table = self.blocks[blocks]
        return Chain(torch.where(table < 0, table, table - pairs.start), self.length[pairs], self.until_fail[pairs])

    def weights(self, overlap: Tensor) -> Tensor:
        """[P] what the losses of each pair are multiplied with; `overlap` [P] is 1 - TV."""
        weight = slot_weights(overlap, self.blocks)
        return torch.where(self.until_fail, weight, torch.ones_like(weight))

    def slope(self, overlap: Tensor) -> Tensor:
        """[P] derivative by each pair's TV of minus the weighted expected accepted length."""
        table = _by_slot(overlap, self.blocks, 1.0)
        weight = _by_slot(self.length.to(overlap.dtype), self.blocks, 0.0)
        before = torch.ones_like(table[:, 0])
        left, right = [], [torch.zeros_like(before)]
        for slot in range(table.shape[1]):
            left.append(before)
            before = before * table[:, slot]
        for slot in reversed(range(table.shape[1])):
            after = table[:, slot + 1] * right[-1] if slot + 1 < table.shape[1] else right[-1]
            right.append(weight[:, slot] + after)
        return _by_pair(torch.stack(left, 1) * torch.stack(right[:0:-1], 1), self.blocks, len(overlap), 0.0)


def slot_weights(overlap: Tensor, blocks: Tensor) -> Tensor:
    """[P] product of the 1 - TV of the earlier slots of the same block, at least `FLOOR`; 1 outside of blocks. Without
    gradient."""
    table = _by_slot(overlap.detach(), blocks, 1.0)
    before = torch.cat([torch.ones_like(table[:, :1]), table[:, :-1]], 1).cumprod(1).clamp_min(FLOOR)
    return _by_pair(before, blocks, len(overlap), 1.0)


def accepted(overlap: Tensor, blocks: Tensor) -> Tensor:
    """[P] probability that the pair's draft and all before it in its block are accepted; 0 outside of blocks."""
    return _by_pair(_by_slot(overlap, blocks, 1.0).cumprod(1), blocks, len(overlap), 0.0)


def _by_slot(values: Tensor, blocks: Tensor, fill: float) -> Tensor:
    """[n, S] of [P]; `fill` where a block has no pair."""
    padded = torch.cat([values, values.new_full((1,), fill)])
    return padded[torch.where(blocks < 0, len(values), blocks)]


def _by_pair(table: Tensor, blocks: Tensor, pairs: int, fill: float) -> Tensor:
    """[P] of [n, S]; `fill` for a pair in no block. What stands behind a block's last pair falls into a spare element.
    """
    index = torch.where(blocks < 0, pairs, blocks)
    return table.new_full((pairs + 1,), fill).scatter(0, index.flatten(), table.flatten())[:pairs]
