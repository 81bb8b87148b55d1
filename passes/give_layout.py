"""Shared rewrite: a captured mixer becomes its definition over the layout, which it reads as one more operand."""

from __future__ import annotations

from torch import fx

from flarec import ops
from flarec.ir.program import Program
from flarec.ops.mixer import Mixing


def give_layout(program: Program, mixing: Mixing) -> list[fx.Node]:
    """Let every captured op of that kind read the layout; returns the new nodes."""
    layout, graph = program.placeholder("layout"), program.graph
    made = []
    for node, mixer in ops.sites(graph):
        if mixer.mixing != mixing or isinstance(node.target, ops.Call):
            continue
        operands = mixer.bind(node.args, node.kwargs)
        with graph.inserting_before(node):
            new = graph.call_function(mixer.call(ops.REFERENCE), kwargs=operands | {"layout": layout})
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        made.append(new)
    return made
