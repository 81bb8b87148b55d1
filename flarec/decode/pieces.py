"""The plan of a forward over known texts: every request has its own number of clean rows and its own blocks.

Prefills, scores and verification read pieces of texts; the steps of a mode have one shape for all requests
(`flarec.decode.plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.layout import BLOCK_END, PADDING, READOUTS, Layout, StepLayout


@dataclass(frozen=True)
class PieceShape:
    """What a forward looks like, per request; hashable.

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


class PiecePlan:
    """Device tensors of a `PieceShape`.

    Logits come out as [N, V] with N = clean + noisy: first the clean rows, request by request, then the blocks' rows,
    by request, block and offset.

    clean_request, clean_slot [clean]    request and clean slot of every clean row with logits
    counts [requests]                    clean rows
    """

    def __init__(self, shape: PieceShape, device: torch.device) -> None:
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
            (row, block * size + offset)
            for row, anchors in enumerate(shape.anchors)
            for block in range(len(anchors))
            for offset in range(shape.block_heads)
        ]
        self.clean_rows = len(clean)
        self.clean_request = tensor([row for row, _ in clean], len(clean))
        self.clean_slot = tensor([slot for _, slot in clean], len(clean))
        noisy_flat = tensor([row * length + self.clean_length + slot for row, slot in noisy], len(noisy))
        self.head_rows = torch.cat([self.clean_request * length + self.clean_slot, noisy_flat])
        self.counts = tensor(list(shape.counts), rows)

    def layout(self, cached: Tensor) -> Layout:
        """The layout of this step for requests with `cached` [requests] int64 clean tokens in the cache."""
        anchor = (self._anchor + cached[:, None]) * self._has_block
        noisy = (anchor[:, :, None] + self._offset) * self._has_block[:, :, None]
        return StepLayout(
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
