"""AR-Trust whose blocks stand where the horizon head expects a step to end (`flarec.decode.ends`).

Every request has its own places, so that all of them share a shape. What the head says decides which drafts there are,
and nothing else: drafts are verified as ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.kernels.drafts import Verified

from ..ends import likely_ends
from ..plan import StepShape
from ..policy import Drafting, DraftPolicy
from ..request import Request
from ..rows import Rows
from ..stepper import BlockSpec
from .ar_trust import ARTrustMode


class PlacedTrustMode(ARTrustMode):
    """State beside that of AR-Trust: horizon [rows, B + 1], of the row behind which the next step begins.

    The program's rows are those of `HorizonProgram`, logits of `vocabulary` tokens and the horizon. policy: one whose
    single blocks are placed ones.
    """

    def __init__(self, blocks: BlockSpec, policy: DraftPolicy, vocabulary: int) -> None:
        super().__init__(blocks, policy=policy)
        self.vocabulary = vocabulary
        self._whole = self._missed = 0  # requests of the step that verified all it can, and those without drafts now

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        values = super().start(rows, clean[..., : self.vocabulary], noisy[..., : self.vocabulary])
        rows.state["horizon"] = clean[:, 0, self.vocabulary :].float()
        return values

    def shape(self, rows: Rows) -> StepShape:
        self._whole = self._missed = 0
        return super().shape(rows)

    def drafting_of(self, shape: StepShape) -> Drafting:
        return Drafting(shape.block_heads, False, shape.blocks) if self._placed(shape) else super().drafting_of(shape)

    def inputs(self, rows: Rows, shape: StepShape) -> tuple[Tensor, Tensor | None]:
        ids, anchors = super().inputs(rows, shape)
        return ids, 1 + self._ends(rows, shape) if self._placed(shape) else anchors

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        values = super().read(rows, shape, clean[..., : self.vocabulary], noisy[..., : self.vocabulary])
        horizon = clean[:, :, self.vocabulary :]
        end = values[:, 0] if shape.blocks else rows.constant(0, shape.rows)
        place = end[:, None, None].expand(-1, 1, horizon.shape[2])
        rows.state["horizon"] = horizon.gather(1, place)[:, 0].float()
        return values

    def behind(self, rows: Rows, shape: StepShape, verified: Verified) -> tuple[Tensor | None, Tensor | None]:
        if not self._placed(shape):
            return super().behind(rows, shape, verified)
        here = self._ends(rows, shape) == verified.accepted[:, None]
        block = here.long().argmax(dim=1)
        first = torch.arange(shape.rows, device=rows.device) * shape.blocks + block
        source = first[:, None] * shape.block_heads + torch.arange(shape.block_heads, device=rows.device)
        return source.reshape(-1), here.any(dim=1)

    def report(self, request: Request, values: list[int]) -> None:
        verified = min(request.ready, self.verified)
        super().report(request, values)
        if len(values) > 1 and values[0] >= 0 and verified == self.verified:
            self._whole += 1
            self._missed += values[1] == 0

    def timed(self, shape: StepShape, seconds: float) -> None:
        super().timed(shape, seconds)
        if self._placed(shape) and self._whole:
            assert self.policy is not None
            self.policy.ended(self.drafting_of(shape), self._whole, self._missed)

    def _placed(self, shape: StepShape) -> bool:
        return 0 < shape.blocks < shape.clean

    def _ends(self, rows: Rows, shape: StepShape) -> Tensor:
        """[rows, blocks] of the step: from what the step before left."""
        return likely_ends(rows.state["horizon"], rows.state["have"], shape.clean - 1, shape.blocks)
