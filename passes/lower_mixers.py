"""Choose the implementation of every mixer, explicitly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from flarec import lowered, ops
from flarec.derive import AttentionIntervals, ConvOrder, ConvWindows, Scan, Schedule, SoftmaxMask, StepTiles, Tiles
from flarec.errors import PassError
from flarec.ir.pipeline import Pass
from flarec.ir.program import Derivation, Program, locate
from flarec.kernels.linear_attention.tiles.schedule import largest_chunk
from flarec.stream_ops import (
    cached_gated_recurrence,
    cached_linear_attention,
    cached_selective_scan,
    cached_short_conv,
    cached_softmax_attention,
    two_stream_gated_recurrence,
    two_stream_linear_attention,
    two_stream_selective_scan,
    two_stream_short_conv,
    two_stream_softmax_attention,
)

IMPLEMENTATIONS = ("torch", "triton", "reference")
CHUNK_SIZES = (16, 32, 64)
"""Clean tokens per chunk that the Triton kernels are made for."""

LAYOUT_OPERAND = {
    two_stream_softmax_attention: 3,
    two_stream_short_conv: 3,
    two_stream_linear_attention: 5,
    two_stream_selective_scan: 5,
    two_stream_gated_recurrence: 2,
    cached_softmax_attention: 5,
    cached_short_conv: 5,
    cached_linear_attention: 10,
    cached_selective_scan: 10,
    cached_gated_recurrence: 6,
}
TORCH: dict[object, Callable[..., Any]] = {
    two_stream_softmax_attention: lowered.softmax_attention,
    two_stream_short_conv: lowered.short_conv,
    two_stream_linear_attention: lowered.linear_attention,
    cached_softmax_attention: lowered.softmax_attention_step,
    cached_short_conv: lowered.short_conv_step,
    cached_linear_attention: lowered.linear_attention_step,
    two_stream_selective_scan: lowered.selective_scan,
    cached_selective_scan: lowered.selective_scan_step,
    two_stream_gated_recurrence: lowered.gated_recurrence,
    cached_gated_recurrence: lowered.gated_recurrence_step,
}


CONTIGUOUS = torch.ops.aten.contiguous.default
CACHED = (
    cached_softmax_attention,
    cached_short_conv,
    cached_linear_attention,
    cached_selective_scan,
    cached_gated_recurrence,
)


@dataclass(frozen=True)
class LowerMixers(Pass):
    """Replace layout-reading mixers by kernels that read tensors derived from the layout once per batch.

    before   %o = stream_ops.two_stream_softmax_attention(%q, %k, %v, %layout, scale, window, softcap)
    after    %softmax_mask = derived from layout
             %o = lowered.softmax_attention(%q, %k, %v, %softmax_mask, scale, softcap)

    implementation 'triton' calls `lowered_triton` in training and decoding; softmax attention over a cache, selective
    scans, gated recurrences and expert layers have no Triton form and become those of 'torch' (the nodes' names say
    which is which). A site that the Triton kernels cannot run is an error.
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
                f"use {', '.join(IMPLEMENTATIONS[:-1])} or {IMPLEMENTATIONS[-1]}"
            )
        if self.implementation == "reference":
            return program.calls(*LAYOUT_OPERAND)
        targets = self._triton(program) if self.implementation == "triton" else TORCH
        sites = [self._lower(program, node, targets) for node in program.calls(*LAYOUT_OPERAND)]
        for node in program.calls(ops.MOE_EXPERTS):
            node.target = lowered.moe_experts
            sites.append(node)
        layout = program.placeholder("layout")
        if not layout.users and "cached" not in program.properties:
            program.graph.erase_node(layout)
        return sites

    def _triton(self, program: Program) -> dict[object, Callable[..., Any]]:
        """The Triton targets, once every site is known to be one that they can run."""
        from flarec import lowered_triton  # it imports triton, which the other implementations do without

        lowered_triton.check_device(program.device)
        if self.chunk_size not in CHUNK_SIZES:
            raise PassError(
                f"pass '{self.name}': the Triton kernels take chunks of {', '.join(map(str, CHUNK_SIZES))} tokens, "
                f"not {self.chunk_size}"
            )
        for node in program.calls(*LAYOUT_OPERAND):
            operands = [value.meta.get("val") if isinstance(value, fx.Node) else value for value in node.args]
            why = lowered_triton.refusal(node.target, operands)
            if why is not None:
                raise PassError(
                    f"pass '{self.name}': the Triton kernels cannot run {locate(node)}: {why}; use --kernels torch"
                )
        return TORCH | {
            two_stream_softmax_attention: lowered_triton.softmax_attention,
            two_stream_short_conv: lowered_triton.short_conv,
            two_stream_linear_attention: lowered_triton.linear_attention,
            cached_short_conv: lowered_triton.short_conv_step,
            cached_linear_attention: lowered_triton.linear_attention_step,
        }

    def _lower(self, program: Program, node: fx.Node, targets: dict[object, Callable[..., Any]]) -> fx.Node:
        position = LAYOUT_OPERAND[node.target]  # type: ignore[index]
        name, derivation = self._derivation(node)
        operand = program.placeholder(name)
        program.derivations[name] = derivation
        args = list(node.args)
        args[position] = operand
        if self.implementation == "triton" and node.target in (two_stream_short_conv, cached_short_conv):
            args[0] = _in_place(program, node)
        if node.target in CACHED:
            args.insert(position + 1, program.placeholder("layout"))
        node.args = tuple(args)
        node.target = targets[node.target]
        return node

    def _derivation(self, node: fx.Node) -> tuple[str, Derivation]:
        """What a site reads from the layout; sites that read the same share one input of the graph."""
        triton = self.implementation == "triton"
        if node.target in (two_stream_softmax_attention, cached_softmax_attention):
            window = node.args[-2]
            assert window is None or isinstance(window, int)
            suffix = "" if window is None else f"_{window}"
            if triton and node.target is two_stream_softmax_attention:
                return f"attention_intervals{suffix}", AttentionIntervals(window)
            return f"softmax_mask{suffix}", SoftmaxMask(window)
        if node.target in (two_stream_short_conv, cached_short_conv):
            width = int(node.args[1].meta["val"].size(-1))  # type: ignore[union-attr]
            if triton:
                return f"conv_order_{width}", ConvOrder(width)
            return f"conv_windows_{width}", ConvWindows(width)
        if node.target in (two_stream_selective_scan, cached_selective_scan):
            return "scan_schedule", Scan()
        if node.target in (two_stream_gated_recurrence, cached_gated_recurrence):
            return "row_schedule", Scan(chunk_size=None)
        if not triton:
            return "state_schedule", Schedule(self.chunk_size)
        step = node.target is cached_linear_attention
        q, _, v = (arg.meta["val"] for arg in node.args[:3])  # type: ignore[union-attr]
        dtype = torch.float32 if step else q.dtype  # a prefill computes in float32
        chunk = min(self.chunk_size, largest_chunk(dtype, int(q.size(-1)), int(v.size(-1))))
        suffix = "" if chunk == self.chunk_size else f"_{chunk}"
        return (f"step_tiles{suffix}", StepTiles(chunk)) if step else (f"state_tiles{suffix}", Tiles(chunk))


def _in_place(program: Program, node: fx.Node) -> fx.Node:
    """The conv's input before a copy into another memory order: the Triton kernels read a projection where it lies."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if x.target is not CONTIGUOUS:
        return x
    source = x.args[0]
    assert isinstance(source, fx.Node)
    node.replace_input_with(x, source)
    if not x.users:
        program.graph.erase_node(x)
    return source
