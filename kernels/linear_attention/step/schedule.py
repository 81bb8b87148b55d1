"""The schedule of a decode step: which rows one program works on, and what each row reads.

The rows of a request form a tree: clean row `j` follows clean row `j - 1`, a noisy block hangs on the clean row before
its anchor. A tile holds all clean rows and some whole noisy blocks, so it knows every ancestor of each of its rows.
Nearly every step fits into one tile; the tiles of a longer one repeat the clean rows and are independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import Schedule, flat_input
from flarec.errors import LayoutError
from flarec.layout import CAUSAL, PADDING, Layout

MIN_TILE = 16  # rows of the smallest matrix product
MAX_TILE = 64


@flat_input
@dataclass(frozen=True)
class StepSchedule(Schedule):
    """Rows and tiles of one step, int32 tensors on the layout's device.

    row_table  [B, 3, T]       per token slot: how many clean rows it reads (its anchor minus the cached tokens; a clean
                               row: its own index; -1 on padding), first slot of its block (a clean row: itself), last
                               slot that its query reads (itself, or the end of its block)
    tile_start [B, tiles + 1]  first noisy slot of every tile; tiles end where the next one starts
    tile_rows                  clean slots and noisy slots of a tile, padded to a power of two of at least 16

    All of it depends on anchors relative to the cache only, so steps of the same shape may share one schedule.
    """

    clean_length: int
    noisy_length: int
    tile_rows: int
    row_table: Tensor
    tile_start: Tensor

    @property
    def rows(self) -> int:
        return self.row_table.shape[0]

    @property
    def length(self) -> int:
        return self.clean_length + self.noisy_length

    @property
    def tiles(self) -> int:
        return self.tile_start.shape[1] - 1

    @staticmethod
    def from_layout(layout: Layout, max_block: int | None = None) -> StepSchedule:
        """Derive the schedule with tensor operations on the layout's device.

        max_block = an upper bound of the tokens per block; it matters only for layouts of more than 64 slots, where the
        device has to be asked for it if it is not given. Nothing else waits for a GPU, hence the values of a layout on
        a GPU are not checked.

        Raises `LayoutError` if the clean slots and one block are more than 64 rows, and (layouts on the host) for a
        token of another document than 0, or a block anchored outside the clean rows of the step.
        """
        first, last = _block_bounds(layout)
        tile_rows, window = _tile_shape(layout, max_block, first)
        slot = torch.arange(layout.clean_length, dtype=torch.int64, device=layout.device).expand(layout.rows, -1)
        clean = layout.clean_document != PADDING
        noisy = layout.noisy_block != PADDING
        anchor = layout.per_noisy(layout.block_anchor) - layout.cached[:, None]
        if layout.device.type == "cpu":
            _check(layout, anchor)
        table = [
            torch.cat([slot.where(clean, PADDING), anchor.where(noisy, PADDING)], dim=1),
            torch.cat([slot, first + layout.clean_length], dim=1),
            torch.cat([slot, last + layout.clean_length], dim=1),
        ]
        return StepSchedule(
            clean_length=layout.clean_length,
            noisy_length=layout.noisy_length,
            tile_rows=tile_rows,
            row_table=torch.stack(table, dim=1).to(torch.int32),
            tile_start=_tile_starts(first, window).to(torch.int32),
        )


def _block_bounds(layout: Layout) -> tuple[Tensor, Tensor]:
    """[B, Ln] each: first noisy slot of the slot's block, last one that its query reads; on padding the slot itself."""
    block, length = layout.noisy_block, layout.noisy_length
    slot = torch.arange(length, dtype=torch.int64, device=layout.device).expand(layout.rows, -1)
    if length == 0:
        return slot, slot
    border = (block[:, 1:] != block[:, :-1]) | (block[:, 1:] == PADDING)
    edge = torch.ones_like(border[:, :1]) if length > 1 else torch.ones_like(block, dtype=torch.bool)
    starts, ends = torch.cat([edge, border], dim=1), torch.cat([border, edge], dim=1)
    first = slot.where(starts, 0).cummax(dim=1).values
    last = slot.where(ends, length).flip(1).cummin(dim=1).values.flip(1)
    causal = layout.per_noisy(layout.block_readout) == CAUSAL
    return first, slot.where(causal, last)


def _tile_shape(layout: Layout, max_block: int | None, first: Tensor) -> tuple[int, int]:
    """(rows of a tile, noisy slots after which the next tile starts)."""
    clean, noisy = layout.clean_length, layout.noisy_length
    if clean + noisy <= MAX_TILE:
        return MIN_TILE << max(0, (clean + noisy - 1) // MIN_TILE).bit_length(), max(noisy, 1)
    if max_block is None:
        slot = torch.arange(noisy, device=layout.device)
        max_block = int((slot - first).max()) + 1 if first.numel() else 0
    if clean + max_block > MAX_TILE:
        raise LayoutError(
            f"a decode step takes at most {MAX_TILE} clean rows and noisy rows of one block per request, this layout "
            f"has {clean} and {max_block}: run it as a prefill, in chunks"
        )
    return MAX_TILE, MAX_TILE - clean - max_block + 1


def _tile_starts(first: Tensor, window: int) -> Tensor:
    """[B, tiles + 1]: every `window` slots, moved on to the next start of a block. first [B, Ln]."""
    rows, length = first.shape
    tiles = max(1, -(-length // window))
    nominal = torch.arange(tiles, dtype=torch.int64, device=first.device) * window
    slot = torch.arange(length, dtype=torch.int64, device=first.device)
    next_start = slot.where(first == slot, length).flip(1).cummin(dim=1).values.flip(1) if length else first
    inner = next_start.index_select(1, nominal[1:])
    ends = first.new_full((rows, 1), length)
    return torch.cat([torch.zeros_like(ends), inner, ends], dim=1)


def _check(layout: Layout, anchor: Tensor) -> None:
    """Raise `LayoutError` for a layout on the host that is no decode step. anchor [B, Ln] relative to the cache."""
    documents = layout.token_document()
    if bool((documents > 0).any()):
        row = int((documents > 0).any(dim=1).nonzero()[0])
        raise LayoutError(f"row {row}: a decode step has one document per row, this layout has more")
    counts = (layout.clean_document != PADDING).sum(dim=1)
    wrong = (layout.noisy_block != PADDING) & ((anchor < 0) | (anchor > counts[:, None]))
    if bool(wrong.any()):
        row, slot = (int(i) for i in wrong.nonzero()[0])
        low = int(layout.cached[row])
        raise LayoutError(
            f"row {row}: the block at noisy slot {slot} is anchored at {low + int(anchor[row, slot])}; its state is "
            f"known from position {low} to {low + int(counts[row])} only"
        )
