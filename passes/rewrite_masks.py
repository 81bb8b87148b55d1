"""Softmax attention over the layout instead of over one causal document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from flarec import ops
from flarec.ir.pipeline import Pass
from flarec.ir.program import Program
from flarec.stream_ops import two_stream_softmax_attention

from .rewrite import rewrite


@dataclass(frozen=True)
class RewriteMasks(Pass):
    """Give every softmax attention the layout's visibility (clean: causal per document; noisy: prefix and own block).

    before   %o = flarec.softmax_attention(%q, %k, %v, scale, window, softcap)
    after    %o = stream_ops.two_stream_softmax_attention(%q, %k, %v, %layout, scale, window, softcap)
    """

    name: ClassVar[str] = "rewrite-masks"
    requires: ClassVar[frozenset[str]] = frozenset({"two-stream"})
    provides: ClassVar[frozenset[str]] = frozenset({"masked"})
    may_be_empty: ClassVar[bool] = True  # a purely recurrent model has no softmax attention

    def apply(self, program: Program) -> list[fx.Node]:
        layout = program.placeholder("layout")
        return rewrite(
            program,
            ops.SOFTMAX_ATTENTION,
            two_stream_softmax_attention,
            lambda o: (o["q"], o["k"], o["v"], layout, o["scale"], o["window"], o["softcap"]),
        )
