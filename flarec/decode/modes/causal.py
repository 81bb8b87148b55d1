"""Causal decoding: one token per forward, from the clean stream alone."""

from __future__ import annotations

from torch import Tensor

from ..plan import StepShape, step_shape
from ..request import Request
from ..rows import Rows
from ..stepper import BlockSpec


class CausalMode:
    """State: token [rows], emitted and not yet in the cache."""

    blocks: BlockSpec | None = None
    pending = 1
    lasting = True

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        token, _ = rows.choose(clean, rows.cache.length)
        rows.note(clean, token)
        rows.state["token"] = token[:, 0].clamp_min(0)
        return token

    def shape(self, rows: Rows) -> StepShape:
        return step_shape(rows.width, clean=1, heads=1)

    def inputs(self, rows: Rows, shape: StepShape) -> tuple[Tensor, Tensor | None]:
        return rows.state["token"][:, None], None

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        rows.accept(rows.constant(1, shape.rows))
        return self.start(rows, clean, noisy)

    def report(self, request: Request, values: list[int]) -> None:
        request.emit(values, ["clean"])

    def timed(self, shape: StepShape, seconds: float) -> None:
        pass
