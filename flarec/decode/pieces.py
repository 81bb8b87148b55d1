"""The plan of a forward over known texts: every request has its own number of clean rows and its own blocks.

Prefills, scores and verification read pieces of texts; the steps of a mode have one shape for all requests
(`flarec.decode.plan`). Who reads texts knows how many of their tokens are cached: layouts are on the device, and on the
host as well, where schedules are made of them, so that a piece never waits for the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flarec.base.flat import Schedule, sent
from flarec.base.recent import last_used
from flarec.layout import BLOCK_END, PADDING, READOUTS, SharedDerivations, StepLayout

from .plan import FAR

MOST_KEPT = 8
"""Arrangements of pieces of which is kept what is derived from them: a prompt's first piece, others, and last ones."""


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


@dataclass(frozen=True)
class PiecePlaces(Schedule):
    """Where the tokens of a piece are, whatever is cached: int64 tensors on one device.

    has_clean [requests, clean], has_block [requests, blocks]: 1 or 0
    slot [clean], offset [block size]: their numbers; anchor [requests, blocks]: of blocks, minus the cached tokens
    clean_document, block_document, noisy_block, readout: of the layout
    """

    has_clean: Tensor
    has_block: Tensor
    slot: Tensor
    offset: Tensor
    anchor: Tensor
    clean_document: Tensor
    block_document: Tensor
    noisy_block: Tensor
    readout: Tensor

    @staticmethod
    def of(shape: PieceShape) -> PiecePlaces:
        """On the host."""
        rows, size = len(shape.counts), shape.block_size
        blocks = max((len(anchors) for anchors in shape.anchors), default=0)
        slot, index = torch.arange(max(shape.counts, default=0)), torch.arange(blocks)
        counts, filled = (torch.tensor(n, dtype=torch.int64).view(rows, 1)
                          for n in (shape.counts, [len(anchors) for anchors in shape.anchors]))
        has_clean, has_block = (slot < counts).long(), (index < filled).long()
        padded = [[*anchors, *[0] * (blocks - len(anchors))] for anchors in shape.anchors]
        block_index = index[None, :, None].expand(rows, blocks, size)
        return PiecePlaces(
            has_clean, has_block, slot, torch.arange(size),
            anchor=torch.tensor(padded, dtype=torch.int64).view(rows, blocks),
            clean_document=has_clean - 1,
            block_document=has_block - 1,
            noisy_block=torch.where(has_block[:, :, None] > 0, block_index, PADDING).reshape(rows, -1),
            readout=has_block * READOUTS[shape.readout] + (1 - has_block) * BLOCK_END,
        )

    def layout(self, cached: Tensor) -> StepLayout:
        """With `cached` [requests] int64 clean tokens in the cache."""
        anchor = (self.anchor + cached[:, None]) * self.has_block
        noisy = (anchor[:, :, None] + self.offset) * self.has_block[:, :, None]
        return StepLayout(
            clean_document=self.clean_document,
            clean_position=(cached[:, None] + self.slot) * self.has_clean,
            noisy_block=self.noisy_block,
            noisy_position=noisy.reshape(noisy.shape[0], -1),
            block_document=self.block_document,
            block_anchor=anchor,
            block_view=self.block_document,
            block_readout=self.readout,
            cached=cached,
        )


class PieceLayouts:
    """Layouts of pieces, and what programs derive from them alike: those of equal shape share it, whichever rows need
    logits, and however many tokens are cached (0 and some are not the same).

    Of the `MOST_KEPT` that were used last. For one device; threads that share one may derive something twice.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._places: dict[PieceShape, tuple[PiecePlaces, PiecePlaces]] = {}
        self._kept: dict[tuple[PieceShape, tuple[int, ...]], SharedDerivations] = {}

    def of(self, shape: PieceShape, cached: Tensor, known: Sequence[int] | None = None) -> StepLayout:
        """cached [requests] int64 on the device; known: the same numbers, if the host has them. Then the device is
        asked for nothing."""
        shape = replace(shape, heads=(), block_heads=0)

        def made() -> tuple[PiecePlaces, PiecePlaces]:
            here = PiecePlaces.of(shape)
            return here, here.to(self.device)

        here, there = last_used(self._places, shape, made, MOST_KEPT)
        layout = there.layout(cached)
        if known is None:
            return layout
        near = tuple(min(count, FAR) for count in known)
        kept = last_used(
            self._kept, (shape, near), lambda: SharedDerivations(here.layout(_numbers(near))), MOST_KEPT
        )
        return layout.known(here.layout(_numbers(known)), kept)


def _numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


class PiecePlan:
    """Which rows of a `PieceShape` have logits, as tensors on a device.

    Logits come out as [N, V] with N = clean + noisy: first the clean rows, request by request, then the blocks' rows,
    by request, block and offset.

    clean_request, clean_slot [clean]    request and clean slot of every clean row with logits
    head_rows [clean + noisy]            their places, request * T + slot
    counts [requests]                    clean rows
    """

    def __init__(self, shape: PieceShape, device: torch.device) -> None:
        self.shape = shape
        size = shape.block_size
        self.clean_length = max(shape.counts, default=0)
        self.noisy_length = size * max((len(anchors) for anchors in shape.anchors), default=0)
        length = self.clean_length + self.noisy_length
        clean = [
            (row, slot)
            for row, (count, heads) in enumerate(zip(shape.counts, shape.heads, strict=True))
            for slot in range(count - heads, count)
        ]
        noisy = [
            row * length + self.clean_length + block * size + offset
            for row, anchors in enumerate(shape.anchors)
            for block in range(len(anchors))
            for offset in range(shape.block_heads)
        ]
        self.clean_rows = len(clean)
        places = [row * length + slot for row, slot in clean]
        numbers = [row for row, _ in clean], [slot for _, slot in clean], [*places, *noisy], shape.counts
        self.clean_request, self.clean_slot, self.head_rows, self.counts = (
            sent(_numbers(values), device) for values in numbers
        )
