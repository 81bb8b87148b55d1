"""The graph of a training program ends before its head, so that the losses need no logits of all rows at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from flarec.errors import PassError, PropertyError
from flarec.ir.head import Head
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, locate

from .narrow_head import find_head

ATEN = torch.ops.aten
IMPLEMENTATIONS = ("torch", "triton", "reference")
CASTS = (ATEN.to.dtype, ATEN._to_copy.default)


@dataclass(frozen=True)
class SplitHead(Pass):
    """Return the gathered hidden rows instead of logits; `Program.head` is what makes logits of them.

    before   %rows = index_select(%flat, 0, %head_rows [N])
             %logits = mul(tanh(div(linear(%rows, %lm_head), 30)), 30)     return %logits [N, V]
    after    %rows = index_select(%flat, 0, %head_rows [N])               return %rows [N, D]
             head: linear(., lm_head), then div, tanh, mul

    A head that is not known stays in the graph, and the losses are computed from logits. implementation says what
    computes the losses of a chunk of rows: 'torch', 'triton' or 'reference'.
    """

    implementation: str = "torch"

    name: ClassVar[str] = "split-head"
    requires: ClassVar[Claims] = frozenset({"narrowed", "logits"})
    provides: ClassVar[Claims] = frozenset({"head-split"})
    invalidates: ClassVar[Claims] = frozenset({"logits"})
    targets: ClassVar[frozenset[str]] = frozenset({"train"})
    may_be_empty: ClassVar[bool] = True  # a head that it does not know stays (`head_refusal` says why)

    def apply(self, program: Program) -> list[fx.Node]:
        output = program.output_node()
        if self.implementation not in IMPLEMENTATIONS:
            raise PassError(
                f"pass '{self.name}': unknown implementation '{self.implementation}'; use {', '.join(IMPLEMENTATIONS)}"
            )
        if head_refusal(program) is not None:
            return []
        linear = find_head(program)
        assert linear is not None
        chain = _tail_nodes(program, linear)
        hidden, weight, *rest = linear.args
        bias = rest[0] if rest else None
        program.head = Head(
            str(weight.target),  # type: ignore[union-attr]
            None if bias is None else str(bias.target),  # type: ignore[union-attr]
            _tail(chain) if chain else None,
            self.implementation,
        )
        output.args = ((hidden, *output.args[0][1:]),)  # type: ignore[index, misc]
        program.outputs = ("hidden", *program.outputs[1:])
        sites = [linear, *chain]
        for node in [*reversed(sites), bias, weight]:
            if isinstance(node, fx.Node) and not node.users:
                program.graph.erase_node(node)
        return sites


def head_refusal(program: Program) -> str | None:
    """Why the head of a program (captured, or up to `narrow-head`) cannot be split off; None if it can."""
    linear = find_head(program)
    if linear is None:
        return "no linear layer makes the logits"
    if linear.target is not ATEN.linear.default:
        return f"{locate(linear)} makes the logits, and only a linear layer can be split off"
    for operand in linear.args[1:]:
        if operand is not None and not _is_parameter(program, operand):
            return f"the head {locate(linear)} has a computed weight or bias"
    chain = _tail_nodes(program, linear)
    for node in [linear, *chain]:
        if len(node.users) != 1:
            return f"{locate(node)} is read by more than the logits"
    for node in chain:
        pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        if not pointwise and node.target not in CASTS:
            return f"{locate(node)}, behind the head, is not elementwise"
    return None


def check_head_split(program: Program) -> None:
    """The graph returns the rows that `head_rows` gathers, and the head is a matrix of the program over them; or its
    head is one that cannot be split off."""
    if program.head is None:
        if head_refusal(program) is None:
            raise PropertyError("the head is in the graph, although it can be split off")
        return
    rows = program.output_node().args[0][0]  # type: ignore[index]
    if not isinstance(rows, fx.Node) or program.placeholder("head_rows") not in rows.all_input_nodes:
        raise PropertyError("the graph does not return the rows that head_rows gathers")
    named = dict(program.module.named_parameters(remove_duplicate=False))
    for name in filter(None, (program.head.weight, program.head.bias)):
        if name not in named:
            raise PropertyError(f"the head reads '{name}', which the program does not have")
    if named[program.head.weight].dim() != 2:
        raise PropertyError(f"the head's weight '{program.head.weight}' is no matrix")


def _tail_nodes(program: Program, linear: fx.Node) -> list[fx.Node]:
    """The nodes between the head and the output, in order; each has one operand that is a node."""
    chain: list[fx.Node] = []
    node = program.output_node().args[0][0]  # type: ignore[index]
    while node is not linear:
        assert isinstance(node, fx.Node)
        chain.append(node)
        (node,) = node.all_input_nodes
    return chain[::-1]


def _tail(chain: list[fx.Node]) -> fx.GraphModule:
    """The chain as a graph of its own, from one tensor to one tensor."""
    graph = fx.Graph()
    made = {chain[0].all_input_nodes[0]: graph.placeholder("results")}
    for node in chain:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[chain[-1]])
    return fx.GraphModule(nn.Module(), graph)


def _is_parameter(program: Program, operand: object) -> bool:
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return False
    return str(operand.target) in dict(program.module.named_parameters(remove_duplicate=False))
