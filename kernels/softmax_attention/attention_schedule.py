"""Who reads whom in softmax attention, as index tensors that are derived once per batch and shared by all layers.

A token reads at most two intervals of slots: clean tokens of its document, and noisy tokens of its own block
(docs/semantics.md section 1). A sliding window shortens them at the left. The forward needs nothing else: the keys of a
tile of queries lie between the smallest start and the largest end of its rows, and a tile of keys between the largest
start and the smallest end needs no mask.

The backward walks the other way. Slots whose intervals start and end ever later form a run, so the readers of a tile
of keys are one range of slots per run: all blocks of one view are a run, as are all clean tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import Schedule, flat_input
from flarec.errors import LayoutError
from flarec.layout import CAUSAL, Layout

KEY_TILE = 128
QUERY_STEP = 64


@flat_input
@dataclass(frozen=True)
class AttentionSchedule(Schedule):
    """All tensors are int32 on one device. Slots are those of the lowered graph, 0..T-1, clean first.

    intervals [4, B, T]: clean start, clean end, noisy start, noisy end of the slots that a token reads; an empty
    interval is [T, 0), and padding has two of them.
    reader_offsets [2, B * tiles + 1], reader_ranges [n, 2]: which tokens read a tile of `key_tile` keys. Tiles of a row
    are counted over its clean slots, then over its noisy slots; tile i of the batch has the ranges (first slot, last
    slot + 1) `reader_offsets[0, i]` to `reader_offsets[0, i + 1]` of tokens that read it or a part of it, and by row 1
    of the offsets those of tokens that read all of it: multiples of QUERY_STEP long, they need no mask.
    """

    clean_length: int
    length: int
    key_tile: int
    window: int | None
    intervals: Tensor
    reader_offsets: Tensor
    reader_ranges: Tensor

    @property
    def rows(self) -> int:
        return self.intervals.shape[1]

    @staticmethod
    def from_layout(layout: Layout, *, window: int | None = None, key_tile: int = KEY_TILE) -> AttentionSchedule:
        """Derive the schedule on the layout's device; waits for it a few times, because sizes depend on the layout.

        window: a key is read only if its position > query position - window. Raises `LayoutError` for a layout that
        continues a cache.
        """
        if bool((layout.cached > 0).any()):
            raise LayoutError("this layout continues a cache; its attention goes through `cached`, not the schedule")
        if window is not None and window < 1:
            raise LayoutError(f"the sliding window is {window} tokens wide; it must be at least 1")
        clean = _clean_intervals(layout, window)
        noisy = _noisy_intervals(layout, window)
        partial, full = _readers(clean, noisy, layout.clean_length, key_tile)
        whole = (full[0] + partial[0][-1], full[1])  # behind the partial ranges in one tensor
        return AttentionSchedule(
            clean_length=layout.clean_length,
            length=layout.length,
            key_tile=key_tile,
            window=window,
            intervals=torch.stack([*clean, *noisy]).int(),
            reader_offsets=torch.stack([partial[0], whole[0]]).int(),
            reader_ranges=torch.cat([partial[1], whole[1]]).int(),
        )


Interval = tuple[Tensor, Tensor]  # starts and ends [B, T] int64
Ranges = tuple[Tensor, Tensor]  # offsets [tiles + 1] and (first, last + 1) [n, 2] int64


def _empty_as(start: Tensor, end: Tensor, length: int) -> Interval:
    empty = end <= start
    return start.masked_fill(empty, length), end.masked_fill(empty, 0)


def _clean_intervals(layout: Layout, window: int | None) -> Interval:
    clean, length = layout.clean_length, layout.length
    slot = torch.arange(clean, device=layout.device).expand(layout.rows, -1)
    documents = 1 + max([int(x.amax()) for x in (layout.clean_document, layout.block_document) if x.numel()], default=0)
    # Slot of every document's position 0. Without clean tokens a document keeps the large value; its anchors are 0.
    base = torch.full((layout.rows, max(documents, 1)), length, device=layout.device)
    owner = layout.clean_document.clamp_min(0)
    real = layout.clean_document >= 0
    base.scatter_reduce_(1, owner, torch.where(real, slot - layout.clean_position, length), "amin")

    document = layout.token_document()
    start = base.gather(1, document.clamp_min(0))
    anchor = layout.per_noisy(layout.block_anchor)
    readable = torch.cat([layout.clean_position + 1, anchor], dim=1)
    end = (start + readable).masked_fill(document < 0, 0)
    if window is not None:
        start = start + (layout.position_ids() - window + 1).clamp_min(0)
    return _empty_as(start, end, length)


def _noisy_intervals(layout: Layout, window: int | None) -> Interval:
    noisy, length = layout.noisy_length, layout.length
    slot = torch.arange(layout.clean_length, length, device=layout.device).expand(layout.rows, -1)
    anchor = layout.per_noisy(layout.block_anchor)
    first = slot - (layout.noisy_position - anchor)
    real = layout.noisy_block >= 0
    size = torch.zeros(layout.rows, max(layout.blocks, 1), dtype=torch.int64, device=layout.device)
    size.scatter_add_(1, layout.noisy_block.clamp_min(0), real.long())
    last = first + (size.gather(1, layout.noisy_block.clamp_min(0)) if noisy else 0)
    causal = layout.per_noisy(layout.block_readout) == CAUSAL
    end = torch.where(causal, slot + 1, last).masked_fill(~real, 0)
    start = first if window is None else torch.maximum(first, slot - window + 1)
    start, end = _empty_as(start, end, length)
    none = torch.zeros(layout.rows, layout.clean_length, dtype=torch.int64, device=layout.device)
    return torch.cat([none + length, start], dim=1), torch.cat([none, end], dim=1)


def _readers(clean: Interval, noisy: Interval, clean_length: int, key_tile: int) -> tuple[Ranges, Ranges]:
    """Ranges of slots whose reading of each tile of keys needs a mask, and of those that read all of it."""
    rows, length = clean[0].shape
    clean_tiles = -(-clean_length // key_tile)
    tiles = clean_tiles + -(-(length - clean_length) // key_tile)
    found = [
        _region_readers(clean, 0, clean_length, key_tile, 0, tiles),
        _region_readers(noisy, clean_length, length, key_tile, clean_tiles, tiles),
    ]
    partial, full = (torch.cat([region[kind] for region in found]) for kind in (0, 1))
    return _as_ranges(partial, rows * tiles, length), _as_ranges(full, rows * tiles, length)


def _region_readers(
    interval: Interval, region_start: int, region_end: int, key_tile: int, first_tile: int, tiles: int
) -> tuple[Tensor, Tensor]:
    """(tile of the batch, first slot, last slot + 1) [n, 3] of masked and of full readers, for the keys of one
    region."""
    length = interval[0].shape[1]
    token = (interval[1] > interval[0]).reshape(-1).nonzero().squeeze(1)
    row, slot = token // max(length, 1), token % max(length, 1)
    low, high = (x.reshape(-1)[token] for x in interval)
    breaks = torch.ones_like(token, dtype=torch.bool)
    breaks[1:] = (row[1:] != row[:-1]) | (slot[1:] != slot[:-1] + 1) | (low[1:] < low[:-1]) | (high[1:] < high[:-1])
    run = breaks.cumsum(0) - 1  # of every token
    first, last = _edges(breaks)

    # One candidate per run and tile of keys between the run's first start and last end.
    tile_low, tile_high = ((x - region_start) // key_tile for x in (low[first], high[last] - 1))
    count = tile_high - tile_low + 1
    of_run = torch.repeat_interleave(torch.arange(len(first), device=token.device), count)
    offset = torch.arange(len(of_run), device=token.device) - (count.cumsum(0) - count)[of_run]
    tile = tile_low[of_run] + offset
    start = region_start + tile * key_tile
    end = start + key_tile

    # Starts and ends grow inside a run, so these searches over all runs at once stay inside their run.
    stride = length + 1
    lows, highs = run * stride + low, run * stride + high

    def first_token(keys: Tensor, bound: Tensor) -> Tensor:
        """First token of the run whose key is at least `bound`, or the run's end."""
        return torch.searchsorted(keys, of_run * stride + bound.clamp_max(length))

    some_first, some_last = first_token(highs, start + 1), first_token(lows, end)
    beyond = end > region_end  # no token reads all of a tile that the region does not fill
    all_first = torch.where(beyond, some_last, first_token(highs, end))
    all_last = torch.maximum(first_token(lows, start + 1), all_first)
    all_last = all_last - (all_last - all_first) % QUERY_STEP
    tile_of_batch = row[first][of_run] * tiles + first_tile + tile
    to_slot = (slot[first] - first)[of_run]

    def ranges(begin: Tensor, stop: Tensor) -> Tensor:
        kept = stop > begin
        return torch.stack([tile_of_batch, begin + to_slot, stop + to_slot], dim=1)[kept]

    partial = torch.cat([ranges(some_first, all_first.minimum(some_last)), ranges(all_last, some_last)])
    return partial, ranges(all_first, all_last)


def _edges(begins: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index of the groups that begin where `begins` [n] is true."""
    ends = torch.ones_like(begins)
    ends[:-1] = begins[1:]
    return begins.nonzero().squeeze(1), ends.nonzero().squeeze(1)


def _as_ranges(entries: Tensor, tiles: int, length: int) -> Ranges:
    """Entries grouped by tile; ranges that touch become one."""
    entries = entries[(entries[:, 0] * (length + 1) + entries[:, 1]).argsort()]
    heads = torch.ones(len(entries), dtype=torch.bool, device=entries.device)
    heads[1:] = (entries[1:, 0] != entries[:-1, 0]) | (entries[1:, 1] != entries[:-1, 2])
    first, last = _edges(heads)
    tile = entries[first, 0]
    offsets = torch.zeros(tiles + 1, dtype=torch.int64, device=entries.device)
    offsets[1:] = torch.bincount(tile, minlength=tiles).cumsum(0)
    return offsets, torch.stack([entries[first, 1], entries[last, 2]], dim=1)
