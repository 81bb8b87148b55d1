"""Choose the implementation of every mixer, explicitly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from flarec import lowered, ops
from flarec.derive import ConvWindows, Schedule, SoftmaxMask
from flarec.errors import PassError
from flarec.pipeline import Pass
from flarec.program import Derivation, Program
from flarec.stream_ops import (
    cached_linear_attention,
    cached_short_conv,
    cached_softmax_attention,
    two_stream_linear_attention,
    two_stream_short_conv,
    two_stream_softmax_attention,
)

IMPLEMENTATIONS = ("torch", "reference")

LAYOUT_OPERAND = {
    two_stream_softmax_attention: 3,
    two_stream_short_conv: 3,
    two_stream_linear_attention: 5,
    cached_softmax_attention: 5,
    cached_short_conv: 5,
    cached_linear_attention: 10,
}
TORCH: dict[object, Callable[..., Any]] = {
    two_stream_softmax_attention: lowered.softmax_attention,
    two_stream_short_conv: lowered.short_conv,
    two_stream_linear_attention: lowered.linear_attention,
    cached_softmax_attention: lowered.softmax_attention_step,
    cached_short_conv: lowered.short_conv_step,
    cached_linear_attention: lowered.linear_attention_step,
}


@dataclass(frozen=True)
class LowerMixers(Pass):
    """Replace layout-reading mixers by kernels that read tensors derived from the layout once per batch.

    before   %o = stream_ops.two_stream_softmax_attention(%q, %k, %v, %layout, scale, window, softcap)
    after    %softmax_mask = derived from layout
             %o = lowered.softmax_attention(%q, %k, %v, %softmax_mask, scale, softcap)
    """

    implementation: str = "torch"
    chunk_size: int = 64

    name: ClassVar[str] = "lower-mixers"
    requires: ClassVar[frozenset[str]] = frozenset({"masked", "state-scheduled"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def apply(self, program: Program) -> list[fx.Node]:
        if self.implementation not in IMPLEMENTATIONS:
            raise PassError(
                f"pass '{self.name}': unknown implementation '{self.implementation}'; "
                f"use {' or '.join(IMPLEMENTATIONS)}"
            )
        if self.implementation == "reference":
            return program.calls(*LAYOUT_OPERAND)
        sites = [self._lower(program, node) for node in program.calls(*LAYOUT_OPERAND)]
        for node in program.calls(ops.MOE_EXPERTS):
            node.target = lowered.moe_experts
            sites.append(node)
        layout = program.placeholder("layout")
        if not layout.users and "cached" not in program.properties:
            program.graph.erase_node(layout)
        return sites

    def _lower(self, program: Program, node: fx.Node) -> fx.Node:
        position = LAYOUT_OPERAND[node.target]  # type: ignore[index]
        name, derivation = self._derivation(node)
        operand = program.placeholder(name)
        program.derivations[name] = derivation
        args = list(node.args)
        args[position] = operand
        if node.target in (cached_softmax_attention, cached_short_conv, cached_linear_attention):
            args.insert(position + 1, program.placeholder("layout"))
        node.args = tuple(args)
        node.target = TORCH[node.target]
        return node

    def _derivation(self, node: fx.Node) -> tuple[str, Derivation]:
        if node.target in (two_stream_softmax_attention, cached_softmax_attention):
            window = node.args[-2]
            assert window is None or isinstance(window, int)
            return ("softmax_mask" if window is None else f"softmax_mask_{window}"), SoftmaxMask(window)
        if node.target in (two_stream_short_conv, cached_short_conv):
            width = int(node.args[1].meta["val"].size(-1))  # type: ignore[union-attr]
            return f"conv_windows_{width}", ConvWindows(width)
        return "state_schedule", Schedule(self.chunk_size)
