"""Logits only where there is a target or a draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program

ATEN = torch.ops.aten


@dataclass(frozen=True)
class NarrowHead(Pass):
    """Gather the wanted rows before the language-model head, the largest matrix of most small models.

    before   %logits = linear(%hidden [rows, T, D], %lm_head)                     -> [rows, T, V]
    after    %rows = index_select(reshape(%hidden, [-1, D]), 0, %head_rows [N])
             %logits = linear(%rows, %lm_head)                                    -> [N, V]
    """

    name: ClassVar[str] = "narrow-head"
    requires: ClassVar[Claims] = frozenset({"two-stream"})
    provides: ClassVar[Claims] = frozenset({"narrowed", "logits"})

    def apply(self, program: Program) -> list[fx.Node]:
        head = find_head(program)
        if head is None:
            return []
        hidden = head.args[0]
        assert isinstance(hidden, fx.Node)
        rows = program.placeholder("head_rows")
        width = hidden.meta["val"].size(-1)
        graph = program.graph
        with graph.inserting_before(head):
            flat = graph.call_function(ATEN.reshape.default, (hidden, [-1, width]))
            picked = graph.call_function(ATEN.index_select.default, (flat, 0, rows))
        for node in (flat, picked):
            node.meta = {key: value for key, value in head.meta.items() if key != "val"}
        head.replace_input_with(hidden, picked)
        return [head]


def find_head(program: Program) -> fx.Node | None:
    """The linear layer that makes the logits, found from the output through one-operand (scaling, capping) nodes."""
    node = program.output_node().args[0][0]  # type: ignore[index]
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in (ATEN.linear.default, ATEN.matmul.default):
            return node
        operands = node.all_input_nodes
        if len(operands) != 1:
            return None
        node = operands[0]
    return None
