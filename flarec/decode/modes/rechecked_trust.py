"""Diffusion-Trust with a recheck: the clean rows that commit a block may take back a part of it.

What was taken back leaves one clean row for the next step, the clean stream's own token, and a block behind it. A token
is emitted when it cannot be taken back any more. Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from flarec.base.flat import sent

from ..plan import StepShape, step_shape
from ..recheck import Recheck
from ..request import Request
from ..rows import Rows
from ..stepper import BlockSpec
from .diffusion_trust import DiffusionTrustMode


class RecheckedTrustMode(DiffusionTrustMode):
    """State beside that of Diffusion-Trust: count [rows], how many tokens of the block the next step commits if it
    keeps them; 0 while the block is filled. ends: ids that end the requests: behind one nothing needs to be filled.

    `Request.ready`: its count.
    """

    def __init__(
        self, blocks: BlockSpec, threshold: float, steps: int, recheck: Recheck, ends: Collection[int],
        device: torch.device,
    ) -> None:
        super().__init__(blocks, threshold, steps)
        self.recheck = recheck
        self.ends = sent(torch.tensor(sorted(ends), dtype=torch.int64), device)

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        super().start(rows, clean, noisy)
        state = rows.state
        state["count"] = self._finished(rows)
        rows.notes = state.get("first_note")
        return torch.stack([state["count"], torch.ones_like(state["count"]), state["first"]], dim=1)

    def shape(self, rows: Rows) -> StepShape:
        size, most = self.blocks.size, max(request.ready for request in rows.requests)
        clean = size if most > 1 else most  # three shapes: few graphs
        return step_shape(rows.width, clean, clean, 1, size, self.blocks.heads, self.blocks.readout)

    def inputs(self, rows: Rows, shape: StepShape) -> tuple[Tensor, Tensor]:
        block, count = rows.state["block"], self._count(rows, shape)[:, None]
        slot = torch.arange(shape.clean, device=rows.device)
        clean = block[:, : shape.clean].where(slot < count, 0)
        ids = torch.cat([clean, block.masked_fill(count > 0, self.blocks.mask_token_id)], dim=1)
        return ids.clamp_min(0), count

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        state, count = rows.state, self._count(rows, shape)
        if not shape.clean:
            rows.accept(count)
            self._denoise(rows, noisy[:, 0])
            state["count"] = self._finished(rows)
            return state["count"][:, None]
        tokens = state["block"][:, : shape.clean]
        checked = self.recheck.look(rows, clean, tokens, count, state.get("notes"), confidence=True)
        rows.accept(checked.kept)
        self._begin(rows, count > 0)
        note = None if checked.notes is None else checked.last(checked.notes)
        first = checked.last(checked.choice)[:, 0]
        self._choose_first(rows, count > 0, first, checked.last(checked.confidence)[:, 0], note)
        self._denoise(rows, noisy[:, 0])
        state["count"] = self._finished(rows)
        self._take_back(rows, checked.again, first)
        rows.notes = checked.notes
        return torch.cat([state["count"][:, None], checked.told], dim=1)

    def _take_back(self, rows: Rows, again: Tensor, first: Tensor) -> None:
        """Where again [rows] bool: nothing of the step's block counts, and the next one commits the first token [rows]
        alone."""
        state = rows.state
        block = torch.full_like(state["block"], self.blocks.mask_token_id)
        block[:, 0] = first
        state["block"] = torch.where(again[:, None], block, state["block"])
        state["masked"] = state["masked"] | again[:, None]
        state["steps"] = state["steps"].masked_fill(again, 0)
        state["count"] = state["count"].masked_fill(again, 1)

    def _count(self, rows: Rows, shape: StepShape) -> Tensor:
        """[rows] clean rows. A slot that nobody is in may believe to have more than the step has."""
        return rows.state["count"].clamp_max(shape.clean)

    def _finished(self, rows: Rows) -> Tensor:
        """[rows] tokens of blocks that are finished: all of them, or those up to an end; else 0."""
        masked, block = rows.state["masked"], rows.state["block"]
        whole = ~masked.any(dim=1) * block.shape[1]
        ends = (block[..., None] == self.ends).any(dim=2) & ~masked.cumsum(dim=1).bool()
        return torch.where(ends.any(dim=1), ends.long().argmax(dim=1) + 1, whole)

    def report(self, request: Request, values: list[int]) -> None:
        pending, *told = values
        count, request.ready = request.ready, pending
        self.recheck.emit(request, told, count)
