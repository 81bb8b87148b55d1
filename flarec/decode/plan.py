"""The shape of a mode's step: equal for all rows of the batch, so that a plan depends on it and on nothing else.

What differs between requests and from step to step (tokens, anchors, cached lengths) comes in tensors. A row that has
less to do than the shape holds computes the rest for nothing: a clean row that is not accepted leaves no trace, and
what a block drafts need not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from flarec.ir.slots import CacheSlot
from flarec.layout import READOUTS, Layout, SharedDerivations, StepLayout

from .cache import Cache

FAR = 64
"""Cached tokens from which on no token of a step reads what is before its document (a convolution reads 7)."""


class Lowered(Protocol):
    """What is known of a lowered decode program before it runs."""

    @property
    def cache_slots(self) -> Sequence[CacheSlot]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...


class DecodeProgram(Lowered, Protocol):
    """A lowered decode program. `step` follows the deferred commit described in `Cache`."""

    def step(self, input_ids: Tensor, layout: Layout, head_rows: Tensor, cache: Cache) -> Tensor:
        """input_ids [B, T] int64, head_rows [N] int64 = row * T + slot -> logits [N, V]."""
        ...


@dataclass(frozen=True)
class StepShape:
    """What a step looks like; hashable.

    rows        requests
    clean       clean rows of each, of which the last `heads` need logits
    blocks      noisy blocks of each, of block_size rows, of which the first `block_heads` need logits
    readout     of every block
    """

    rows: int
    clean: int
    heads: int
    blocks: int = 0
    block_size: int = 1
    block_heads: int = 0
    readout: str = "causal"

    @property
    def length(self) -> int:
        """Tokens per row of the lowered graph."""
        return self.clean + self.blocks * self.block_size


@lru_cache(maxsize=256)
def step_shape(
    rows: int, clean: int, heads: int, blocks: int = 0, block_size: int = 1, block_heads: int = 0,
    readout: str = "causal",
) -> StepShape:
    """The shape of these fields. Most steps are like the one before, and find its object."""
    return StepShape(rows, clean, heads, blocks, block_size, block_heads, readout)


class StepPlan:
    """Device tensors of a `StepShape`, and what programs derive from it once for all steps with the same anchors.

    head_rows [N] int64: clean rows with logits first, then those of the blocks.
    """

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape = shape
        rows, blocks, size = shape.rows, shape.blocks, shape.block_size
        slot, offset, index = (torch.arange(n, device=device) for n in (shape.clean, size, blocks))
        self._clean_document = torch.zeros(rows, shape.clean, dtype=torch.int64, device=device)
        self._block_document = torch.zeros(rows, blocks, dtype=torch.int64, device=device)
        self._noisy_block = index[:, None].expand(blocks, size).reshape(1, -1).repeat(rows, 1)
        self._readout = torch.full((rows, blocks), READOUTS[shape.readout], dtype=torch.int64, device=device)
        first = shape.length * torch.arange(rows, device=device)[:, None]
        clean = first + slot[shape.clean - shape.heads :]
        heads = shape.clean + size * index[:, None] + offset[: shape.block_heads]
        self.head_rows = torch.cat([clean.reshape(-1), (first + heads.reshape(-1)).reshape(-1)])
        self._slot, self._offset = slot, offset
        # positions minus `cached` where block i stands behind clean row i: of clean rows, noisy rows, blocks, all rows
        noisy = ((index + 1)[:, None] + offset).reshape(-1)
        parts = [part.expand(rows, -1) for part in (slot, noisy, index + 1, torch.cat([slot, noisy]))]
        self._widths = [part.shape[1] for part in parts]
        self._behind = torch.cat([part.reshape(-1) for part in parts])
        numbers = torch.arange(rows, device=device)
        self._row = torch.cat([numbers.repeat_interleave(part.shape[1]) for part in parts])
        self._kept = SharedDerivations(self.layout(torch.full((rows,), FAR, device=device), parts[2]))

    def layout(self, cached: Tensor, anchors: Tensor | None) -> StepLayout:
        """The layout of a step. cached [rows] = clean tokens in the cache, anchors [rows, blocks] = of the blocks,
        minus `cached`; int64. No anchors: block i stands behind clean row i, in every step of this shape."""
        if anchors is None:  # two operations: a device waits longer for the start of each than for its end
            sizes = [self.shape.rows * width for width in self._widths]
            found = (cached.index_select(0, self._row) + self._behind).split(sizes)
            clean, noisy, anchor, every = (part.view(self.shape.rows, -1) for part in found)
            return self._layout(cached, clean, noisy, anchor).keeping(self._kept, every)
        anchor = cached[:, None] + anchors
        noisy = (anchor[:, :, None] + self._offset).reshape(anchor.shape[0], -1)
        return self._layout(cached, cached[:, None] + self._slot, noisy, anchor)

    def _layout(self, cached: Tensor, clean: Tensor, noisy: Tensor, anchor: Tensor) -> StepLayout:
        return StepLayout(
            clean_document=self._clean_document,
            clean_position=clean,
            noisy_block=self._noisy_block,
            noisy_position=noisy,
            block_document=self._block_document,
            block_anchor=anchor,
            block_view=self._block_document,
            block_readout=self._readout,
            cached=cached,
        )

    def split(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, V] of `head_rows` as [rows, heads, V] of clean rows and [rows, blocks, block_heads, V] of blocks.
        """
        shape, vocab = self.shape, logits.shape[1]
        clean, noisy = logits.split([shape.rows * shape.heads, shape.rows * shape.blocks * shape.block_heads])
        return (
            clean.view(shape.rows, shape.heads, vocab),
            noisy.view(shape.rows, shape.blocks, shape.block_heads, vocab),
        )
