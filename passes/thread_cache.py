"""Decode state: every mixer reads what earlier forwards left and returns what the next one needs."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from flarec import ops
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, layer_of, placeholder_name
from flarec.ir.slots import CacheSlot


@dataclass(frozen=True)
class ThreadCache(Pass):
    """Thread KV, conv and recurrent caches through the graph; commits are deferred to the next step's `accepted` rows.

    before   %o = two_stream_linear_attention(q=%q, ..., layout=%layout)
    after    (%o, %state', %pending') = cached_linear_attention(q=%q, ..., state=%state, pending_k=%pending, ...,
                                                                accepted=%accepted, layout=%layout)
             return (%logits, ..., %state', %pending')
    """

    name: ClassVar[str] = "thread-cache"
    requires: ClassVar[Claims] = frozenset({"masked", "state-scheduled", "narrowed"})
    provides: ClassVar[Claims] = frozenset({"cached"})

    def apply(self, program: Program) -> list[fx.Node]:
        numbers: Counter[str] = Counter()
        return [
            _thread(program, node, mixer, _prefix(node, mixer, numbers))
            for node, mixer in ops.sites(program.graph)
            if isinstance(node.target, ops.Call) and not node.target.step
        ]


def _thread(program: Program, node: fx.Node, mixer: ops.Mixer, prefix: str) -> fx.Node:
    """One mixer reads its slots; those that it does not write in place come back as outputs of the program."""
    graph, slots = program.graph, tuple(mixer.slots(ops.site_of(node)))
    operands = dict(node.kwargs)
    layout = operands.pop("layout")
    for slot in slots:
        name = f"{prefix}.{slot.kind or slot.operand}"
        program.cache_slots += (CacheSlot(name, slot.kind or slot.operand, slot.shape, slot.dtype),)
        operands[slot.operand] = program.placeholder(placeholder_name(name))
    returned = [f"{prefix}.{slot.kind or slot.operand}" for slot in slots if not slot.in_place]
    if returned:
        operands["accepted"] = program.placeholder("accepted")
    with graph.inserting_before(node):
        new = value = graph.call_function(mixer.call(ops.REFERENCE, step=True), kwargs=operands | {"layout": layout})
        if returned:
            value, *parts = [graph.call_function(operator.getitem, (new, i)) for i in range(1 + len(returned))]
            program.add_outputs(zip(returned, parts, strict=True))
    new.meta = dict(node.meta)
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    return new


def _prefix(node: fx.Node, mixer: ops.Mixer, numbers: Counter[str]) -> str:
    """`layers.3.linear_attention`, numbered if a layer has several mixers of one kind."""
    base = f"layers.{layer_of(node)}.{mixer.name}"
    numbers[base] += 1
    return base if numbers[base] == 1 else f"{base}{numbers[base]}"
