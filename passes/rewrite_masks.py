"""Softmax attention over the layout instead of over one causal document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program

from .give_layout import give_layout


@dataclass(frozen=True)
class RewriteMasks(Pass):
    """Give every softmax attention the layout's visibility (clean: causal per document; noisy: prefix and own block).

    before   %o = flarec.softmax_attention(q=%q, k=%k, v=%v, scale, window, softcap)
    after    %o = stream_ops.two_stream_softmax_attention(q=%q, k=%k, v=%v, scale, window, softcap, layout=%layout)
    """

    name: ClassVar[str] = "rewrite-masks"
    requires: ClassVar[Claims] = frozenset({"two-stream"})
    provides: ClassVar[Claims] = frozenset({"masked"})
    may_be_empty: ClassVar[bool] = True  # a purely recurrent model has no softmax attention

    def apply(self, program: Program) -> list[fx.Node]:
        return give_layout(program, "attention")
