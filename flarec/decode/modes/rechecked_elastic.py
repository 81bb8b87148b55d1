"""Elastic decoding with a recheck: taken drafts are emitted when the step that commits them has kept them.

Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import StepShape
from ..recheck import Recheck
from ..request import Request
from ..rows import Rows
from ..stepper import BlockSpec
from .elastic import ElasticMode


class RecheckedElasticMode(ElasticMode):
    """State beside that of elastic decoding: notes [rows, 1 + size, n] of its tokens, if log-probabilities are wanted.
    """

    def __init__(self, blocks: BlockSpec, threshold: float, vocabulary: int, recheck: Recheck) -> None:
        super().__init__(blocks, threshold, vocabulary)
        self.recheck = recheck

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        taken, first = super().start(rows, clean, noisy)[:, :2].split(1, dim=1)
        self._keep_notes(rows)
        return torch.cat([taken, torch.ones_like(first), first], dim=1)

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        state, count = rows.state, self._count(rows, shape)
        tokens, notes = state["tokens"][:, : shape.clean], state.get("notes")
        checked = self.recheck.look(rows, clean[..., : self.vocabulary], tokens, count, notes)
        rows.accept(checked.kept)
        taken = self._take(rows, checked.last(clean), noisy[:, 0])[:, :1].masked_fill(checked.again[:, None], 0)
        state["count"] = taken[:, 0] + 1  # behind what was taken back there are no drafts
        self._keep_notes(rows)
        rows.notes = checked.notes
        return torch.cat([taken, checked.told], dim=1)

    def _keep_notes(self, rows: Rows) -> None:
        """Until the tokens are emitted."""
        if rows.logprobs is not None:
            assert rows.notes is not None
            rows.state["notes"] = rows.notes

    def report(self, request: Request, values: list[int]) -> None:
        taken, *told = values
        count, request.ready = request.ready + 1, taken
        self.recheck.emit(request, told, count)
