"""The shape of one step: which clean rows and noisy blocks each request has, and which rows need logits.

Everything about a step except the numbers `cached` is known on the host before it runs: how many clean rows, and where
blocks are anchored relative to the cache. A plan turns that into device tensors once; a step of the same shape then
needs a handful of additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flarec.ir.slots import CacheSlot
from flarec.layout import BLOCK_END, PADDING, READOUTS, Layout

from .cache import Cache


class DecodeProgram(Protocol):
    """A lowered decode program. `step` follows the deferred commit described in `Cache`."""

    @property
    def cache_slots(self) -> Sequence[CacheSlot]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def step(self, input_ids: Tensor, layout: Layout, head_rows: Tensor, cache: Cache) -> Tensor:
        """input_ids [B, T] int64, head_rows [N] int64 = row * T + slot -> logits [N, V]."""
        ...


@dataclass(frozen=True)
class StepShape:
    """What a step looks like, per request; hashable.

    counts      clean rows
    anchors     anchors of its noisy blocks minus the clean tokens cached before the step
    heads       how many of its LAST clean rows need logits
    block_size  noisy rows per block
    block_heads how many of the first rows of each block need logits
    readout     of every block
    """

    counts: tuple[int, ...]
    anchors: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]
    block_size: int
    block_heads: int
    readout: str


class StepPlan:
    """Device tensors of a `StepShape`.

    Logits come out as [N, V] with N = clean + noisy: first the clean rows, request by request, then the blocks' rows,
    by request, block and offset.

    clean_request, clean_slot [clean]    request and clean slot of every clean row with logits
    noisy_request, noisy_ahead [noisy]   request and (position minus `cached`) of every noisy row with logits
    first_block [requests]               index of the request's first block among all blocks
    """

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape = shape
        rows, size = len(shape.counts), shape.block_size
        self.clean_length = max(shape.counts, default=0)
        blocks = max((len(anchors) for anchors in shape.anchors), default=0)
        self.noisy_length = blocks * size
        length = self.clean_length + self.noisy_length

        def tensor(values: Sequence[object], *sizes: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).reshape(sizes).to(device)

        slots = range(self.clean_length)
        has_clean = tensor([[slot < count for slot in slots] for count in shape.counts], rows, self.clean_length)
        padded = [[*anchors, *[0] * (blocks - len(anchors))] for anchors in shape.anchors]
        has_block = tensor([[b < len(anchors) for b in range(blocks)] for anchors in shape.anchors], rows, blocks)
        self._has_clean, self._has_block = has_clean, has_block
        self._slot = torch.arange(self.clean_length, device=device)
        self._anchor = tensor(padded, rows, blocks)
        self._offset = torch.arange(size, device=device)
        block_index = torch.arange(blocks, device=device)[None, :, None].expand(rows, blocks, size)
        self._clean_document = has_clean - 1
        self._block_document = has_block - 1
        self._noisy_block = torch.where(has_block[:, :, None] > 0, block_index, PADDING).reshape(rows, -1)
        self._readout = has_block * READOUTS[shape.readout] + (1 - has_block) * BLOCK_END

        clean = [
            (row, slot)
            for row, (count, heads) in enumerate(zip(shape.counts, shape.heads, strict=True))
            for slot in range(count - heads, count)
        ]
        noisy = [
            (row, block * size + offset, anchor + offset)
            for row, anchors in enumerate(shape.anchors)
            for block, anchor in enumerate(anchors)
            for offset in range(shape.block_heads)
        ]
        self.clean_rows = len(clean)
        self.clean_request = tensor([row for row, _ in clean], len(clean))
        self.clean_slot = tensor([slot for _, slot in clean], len(clean))
        self.noisy_request = tensor([row for row, _, _ in noisy], len(noisy))
        self.noisy_ahead = tensor([ahead for _, _, ahead in noisy], len(noisy))
        noisy_slot = tensor([slot for _, slot, _ in noisy], len(noisy))
        clean_flat = self.clean_request * length + self.clean_slot
        noisy_flat = self.noisy_request * length + self.clean_length + noisy_slot
        self.head_rows = torch.cat([clean_flat, noisy_flat])
        starts = [sum(len(anchors) for anchors in shape.anchors[:row]) for row in range(rows)]
        self.first_block = tensor(starts, rows)
        self.counts = tensor(list(shape.counts), rows)

    def layout(self, cached: Tensor) -> Layout:
        """The layout of this step for requests with `cached` [requests] int64 clean tokens in the cache."""
        anchor = (self._anchor + cached[:, None]) * self._has_block
        noisy = (anchor[:, :, None] + self._offset) * self._has_block[:, :, None]
        return Layout(
            clean_document=self._clean_document,
            clean_position=(cached[:, None] + self._slot) * self._has_clean,
            noisy_block=self._noisy_block,
            noisy_position=noisy.reshape(noisy.shape[0], -1),
            block_document=self._block_document,
            block_anchor=anchor,
            block_view=self._block_document,
            block_readout=self._readout,
            cached=cached,
        )
