"""Short convolutions and recurrences: which state every block starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program

from .give_layout import give_layout


@dataclass(frozen=True)
class ScheduleStates(Pass):
    """Start every noisy block from its document's clean state and conv window at the anchor; reset at documents.

    before   %y = flarec.short_conv(x=%x, weight=%w, ...)  %o = flarec.linear_attention(q=%q, k=%k, v=%v, ...)
    after    %y = stream_ops.two_stream_short_conv(x=%x, weight=%w, ..., layout=%layout)
             %o = stream_ops.two_stream_linear_attention(q=%q, k=%k, v=%v, ..., layout=%layout)

    So does every other op whose `mixing` is "state" (`flarec.ops`).
    """

    name: ClassVar[str] = "schedule-states"
    requires: ClassVar[Claims] = frozenset({"two-stream"})
    provides: ClassVar[Claims] = frozenset({"state-scheduled"})
    may_be_empty: ClassVar[bool] = True  # a softmax-only model has no recurrence

    def apply(self, program: Program) -> list[fx.Node]:
        return give_layout(program, "state")
