"""Running a decode program step by step: plans of steps, their input ids, and the cache between them.

The modes, evaluation, verification and estimates all step through this class; what they do with the logits is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import sent
from flarec.layout import Layout

from .cache import Cache
from .noise_ids import NoiseIds
from .pieces import PieceLayouts, PiecePlan, PieceShape
from .plan import DecodeProgram

MAX_PLANS = 256  # the plans kept for reuse must not grow forever


@dataclass(frozen=True)
class BlockSpec:
    """The noisy blocks of a step.

    size = noisy rows per block, heads = how many of its first rows need logits, readout = "causal" or "block_end",
    mask_token_id = input id of a masked position. noise = random ids in its place; None: there are none.
    """

    size: int
    heads: int
    readout: str
    mask_token_id: int
    noise: NoiseIds | None = None


NO_BLOCKS = BlockSpec(1, 0, "causal", 0)


class Stepper:
    """Requests that step together. Row b of every tensor belongs to the same request.

    cache holds what the requests have read: who steps makes room in it (`Cache.reserve`) and tells it after each step
    how many clean rows to keep (`Cache.accept`). blocks are None where no step has noisy blocks. layouts: of pieces,
    where others have read some.
    """

    def __init__(
        self, program: DecodeProgram, cache: Cache, blocks: BlockSpec | None = None,
        layouts: PieceLayouts | None = None,
    ) -> None:
        self.program = program
        self.cache = cache
        self.blocks = blocks
        self.device = program.device
        self._pieces: dict[PieceShape, PiecePlan] = {}
        self.layouts = PieceLayouts(self.device) if layouts is None else layouts

    def plan(
        self, counts: Sequence[int], anchors: Sequence[Sequence[int]] | None = None, heads: Sequence[int] | None = None
    ) -> PiecePlan:
        """The plan of a step with these clean rows, relative anchors and clean rows with logits (default: all)."""
        blocks = self.blocks or NO_BLOCKS
        shape = PieceShape(
            counts=tuple(counts),
            anchors=tuple(tuple(row) for row in anchors) if anchors is not None else ((),) * len(counts),
            heads=tuple(heads) if heads is not None else tuple(counts),
            block_size=blocks.size,
            block_heads=blocks.heads,
            readout=blocks.readout,
        )
        if shape not in self._pieces:
            if len(self._pieces) >= MAX_PLANS:
                self._pieces.clear()
            self._pieces[shape] = PiecePlan(shape, self.device)
        return self._pieces[shape]

    def clean(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Input ids [requests, longest piece] int64 of the clean rows: each request's tokens, zeros behind them."""
        width = max(len(piece) for piece in pieces)
        rows = [[*piece, *[0] * (width - len(piece))] for piece in pieces]
        return sent(torch.tensor(rows, dtype=torch.int64), self.device)

    def masked(self, plan: PiecePlan) -> Tensor:
        """Input ids [requests, noisy slots] int64 of fully masked blocks."""
        blocks = self.blocks or NO_BLOCKS
        shape = (self.cache.batch, plan.noisy_length)
        return torch.full(shape, blocks.mask_token_id, dtype=torch.int64, device=self.device)

    def run(
        self, plan: PiecePlan, ids: Tensor, head_rows: Tensor | None = None, program: DecodeProgram | None = None,
        cached: Sequence[int] | None = None,
    ) -> Tensor:
        """One step. ids [requests, T] int64, clean rows first; logits [N, V] of `head_rows` [N] int64 (the plan's).
        program: another one with the same caches that runs it. cached: what `cache.length` holds, where the host knows
        it: then the step waits for nothing that the device has to do."""
        wanted = plan.head_rows if head_rows is None else head_rows
        layout = self.layouts.of(plan.shape, self.cache.length, cached)
        return (program or self.program).step(self.noised(ids, layout), layout, wanted, self.cache)

    @property
    def seeds(self) -> Tensor:
        """[requests] int64: of what is drawn for each."""
        return torch.zeros_like(self.cache.length)

    def noised(self, ids: Tensor, layout: Layout) -> Tensor:
        """Input ids [requests, T] int64 with random ids as their noisy rows, where noise is that. Such rows are masked
        everywhere."""
        if self.blocks is None or self.blocks.noise is None or not layout.noisy_length:
            return ids
        drawn = self.blocks.noise.draw(self.seeds, layout.noisy_position)
        return torch.cat([ids[:, : layout.clean_length], drawn], dim=1)
