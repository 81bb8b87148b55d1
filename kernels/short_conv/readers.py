"""The schedule of the Triton convolution: one order in which to visit the tokens of a row, and what each of them reads.

The order runs backwards through the row's clean slots; a noisy block stands where its anchor is, just before the last
clean token that it reads. Two things follow. What a noisy token reads has just been read by its neighbours in the
order, so it is still in a cache. And a backward pass that walks the order meets all readers of a token before the token
itself: clean readers sit at most W-1 slots ahead, and all blocks, of any view, that are anchored near it lie between.
Rolling sums in registers therefore hold complete gradients, without atomics and without a list of readers per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import Schedule, flat_input
from flarec.errors import LayoutError
from flarec.layout import PADDING, Layout

from .windows import _slot_minus_position, conv_windows

WIDTHS = range(2, 9)
REGION = 64

# Bits of a step's code. Padding is a block of one token that reads nothing: ENTER, LEAVE and NEAR.
REAL = 1
ENTER = 2  # the last token of a block, which is visited first
LEAVE = 4  # the first token of a block
HISTORY = 8  # with LEAVE: the block reads clean tokens
RESET = 16  # the first token of a document
NEAR = 32  # may read clean tokens before it: every clean token, the first W-1 tokens of a block


@flat_input
@dataclass(frozen=True)
class ConvSchedule(Schedule):
    """Index tensors (int32) of one layout and one conv width; small against the tokens' channels.

    table  [rows, T, W + 1]     steps in visiting order: the token's slot, its code, what it reads at lags 1 .. W-1.
                                A read is a slot of the row, -1 for zero, or -2 - c for column c of the initial window
    starts [rows, regions, 3]   steps of a region of `region` clean slots and the blocks that stand in it: first step of
                                the halo (the following region's tokens that may read this one's), first own step, end
    cached [rows]               clean tokens of document 0 before the row
    """

    rows: int
    length: int
    clean_length: int
    width: int
    region: int
    table: Tensor
    starts: Tensor
    cached: Tensor

    @property
    def device(self) -> torch.device:
        return self.table.device

    @staticmethod
    def from_layout(layout: Layout, width: int, *, region: int = REGION, continues: bool = False) -> ConvSchedule:
        """Derive the schedule on the layout's device; `continues`: see `conv_windows`. Raises `LayoutError` for a width
        outside 2..8."""
        if width not in WIDTHS:
            raise LayoutError(f"the Triton convolution takes widths 2 to 8, not {width}; use the torch kernels")
        order, key = _order(layout, continues)
        code = _codes(layout, width).gather(1, order)
        reads = _reads(layout, width, continues)
        reads = reads.gather(1, order[:, :, None].expand_as(reads))
        table = torch.cat([order[:, :, None], code[:, :, None], reads], dim=2)
        return ConvSchedule(
            rows=layout.rows,
            length=layout.length,
            clean_length=layout.clean_length,
            width=width,
            region=region,
            table=table.to(torch.int32).contiguous(),
            starts=_starts(key, layout.clean_length, width, region).to(torch.int32).contiguous(),
            cached=layout.cached.to(torch.int32),
        )


def _order(layout: Layout, continues: bool) -> tuple[Tensor, Tensor]:
    """(slots in visiting order [B, T], sort keys in that order [B, T], descending).

    Clean slot s has key 2s; a block whose last clean token is slot s has 2s + 1, or -1 if that is not in the row.
    """
    clean, slots = layout.clean_length, torch.arange(layout.length, device=layout.device)
    anchor = layout.per_noisy(layout.block_anchor)
    document = layout.token_document()[:, clean:]
    last_read = anchor - 1 + _slot_minus_position(layout, continues).gather(1, document.clamp_min(0))
    before_row = (document == 0) & (anchor <= layout.cached[:, None])
    last_read = torch.where(before_row, -1, last_read)
    # padding changes nothing wherever it stands: spread it, so that no region is longer than the others
    spread = (slots[clean:] - clean) % max(clean, 1)
    last_read = torch.where(document == PADDING, spread.expand_as(document), last_read)
    noisy_key = 2 * last_read + 1

    key = torch.cat([(2 * slots[:clean]).expand(layout.rows, -1), noisy_key], dim=1)
    # slots are the tie-break: tokens of a block follow each other, the last one first
    ranked = (key * layout.length + slots).sort(dim=1, descending=True).indices
    return ranked, key.gather(1, ranked)


def _codes(layout: Layout, width: int) -> Tensor:
    """[B, T] codes of the tokens by slot."""
    padding = ENTER | LEAVE | NEAR
    starts = torch.where(layout.clean_position == 0, RESET, 0)
    clean = torch.where(layout.clean_document == PADDING, padding, REAL | NEAR | starts)

    block, anchor = layout.noisy_block, layout.per_noisy(layout.block_anchor)
    offset = layout.noisy_position - anchor
    ends = torch.ones_like(block, dtype=torch.bool)
    ends[:, :-1] = block[:, 1:] != block[:, :-1]
    noisy = REAL | torch.where(ends, ENTER, 0) | torch.where(offset < width - 1, NEAR, 0)
    noisy = noisy | torch.where(offset == 0, torch.where(anchor > 0, LEAVE | HISTORY, LEAVE), 0)
    return torch.cat([clean, torch.where(block == PADDING, padding, noisy)], dim=1)


def _reads(layout: Layout, width: int, continues: bool) -> Tensor:
    """[B, T, W-1] what each slot reads at lags 1 .. W-1, as `ConvSchedule.table` encodes it."""
    index = conv_windows(layout, width, continues=continues)[:, :, 1:]
    read = torch.where(index < width - 1, -2 - index, index - (width - 1))
    return torch.where(index == width - 1 + layout.length, -1, read)


def _starts(key: Tensor, clean_length: int, width: int, region: int) -> Tensor:
    """[B, regions, 3]; `key` [B, T] is descending."""
    regions = max(1, -(-clean_length // region))
    first_slot = region * torch.arange(regions + 1, device=key.device)

    def steps_above(bound: Tensor) -> Tensor:
        """[B, n] how many steps have a key above each bound."""
        ascending = (-key).contiguous()
        return torch.searchsorted(ascending, (-bound).expand(key.shape[0], -1).contiguous())

    own = steps_above(2 * first_slot[1:] - 1)
    # clean slot (first + W - 2) of the next region is the last that reads into this one
    halo = steps_above(2 * (first_slot[1:] + width - 2))
    end = torch.cat([torch.full_like(own[:, :1], key.shape[1]), own[:, :-1]], dim=1)
    return torch.stack([halo, own, end], dim=2)
