"""Short convolutions and recurrences: which state every block starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from flarec import ops
from flarec.ir.pipeline import Pass
from flarec.ir.program import Program
from flarec.stream_ops import (
    two_stream_gated_recurrence,
    two_stream_linear_attention,
    two_stream_selective_scan,
    two_stream_short_conv,
)

from .rewrite import rewrite


@dataclass(frozen=True)
class ScheduleStates(Pass):
    """Start every noisy block from its document's clean state and conv window at the anchor; reset at documents.

    before   %y = flarec.short_conv(%x, %w, %b, act)       %o = flarec.linear_attention(%q, %k, %v, %g, %beta, ...)
    after    %y = stream_ops.two_stream_short_conv(%x, %w, %b, %layout, act)
             %o = stream_ops.two_stream_linear_attention(%q, %k, %v, %g, %beta, %layout, ...)

    `selective_scan` and `gated_recurrence` become their two-stream forms in the same way, the layout last.
    """

    name: ClassVar[str] = "schedule-states"
    requires: ClassVar[frozenset[str]] = frozenset({"two-stream"})
    provides: ClassVar[frozenset[str]] = frozenset({"state-scheduled"})
    may_be_empty: ClassVar[bool] = True  # a softmax-only model has no recurrence

    def apply(self, program: Program) -> list[fx.Node]:
        layout = program.placeholder("layout")
        convs = rewrite(
            program,
            ops.SHORT_CONV,
            two_stream_short_conv,
            lambda o: (o["x"], o["weight"], o["bias"], layout, o["activation"]),
        )
        states = rewrite(
            program,
            ops.LINEAR_ATTENTION,
            two_stream_linear_attention,
            lambda o: (
                o["q"],
                o["k"],
                o["v"],
                o["g"],
                o["beta"],
                layout,
                o["scale"],
                o["delta"],
                o["l2norm"],
            ),
        )
        scans = rewrite(
            program,
            ops.SELECTIVE_SCAN,
            two_stream_selective_scan,
            lambda o: (o["x"], o["dt"], o["a"], o["b"], o["c"], layout),
        )
        recurrences = rewrite(
            program, ops.GATED_RECURRENCE, two_stream_gated_recurrence, lambda o: (o["x"], o["a"], layout)
        )
        return convs + states + scans + recurrences
