"""Linear layers that read the same rows become one product over one weight."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from flarec.errors import PropertyError
from flarec.ir.constants import Constants
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, locate

ATEN = torch.ops.aten
LINEAR = ATEN.linear.default
BUFFER = "merged_"
"""Prefix of the buffers of merged weights and biases."""
ADAPTED = "noisy-adapted"


@dataclass(frozen=True)
class MergeProjections(Pass):
    """One product in place of several that read the same rows; the parameters become views of one buffer.

    before   %q = linear(%x, q_proj.weight)   %k = linear(%x, k_proj.weight)
    after    %y = linear(%x, merged_0)   %q = slice(%y, -1, 0, Q)   %k = slice(%y, -1, Q, Q + K)

    Merged are layers with weights of their own, all with a bias or all without. Parameters keep their names and values.
    With an adapter on noisy rows the graph stays as it is: its layers are compared with the source's.
    """

    name: ClassVar[str] = "merge-projections"
    requires: ClassVar[Claims] = frozenset({"cached"})
    provides: ClassVar[Claims] = frozenset({"projections-merged"})
    targets: ClassVar[frozenset[str]] = frozenset({"decode"})
    may_be_empty: ClassVar[bool] = True  # a model that merged its projections itself

    def apply(self, program: Program) -> list[fx.Node]:
        groups = mergeable(program)
        if not groups:
            return []
        constants = program.constants = program.constants or Constants()
        made, number = [], 0
        for group in groups:
            operands = []
            for place in (1, 2)[: len(_parameters(program, group[0]))]:
                name, number = f"{BUFFER}{number}", number + 1
                named = {str(node.args[place].target): _parameter(program, node.args[place]) for node in group}  # type: ignore[union-attr]
                constants.merge(program.module, name, {key: value for key, value in named.items() if value is not None})
                operands.append(name)
            made.append(_merge(program, group, operands))
        program.graph.eliminate_dead_code()
        constants.refresh()
        return made


def mergeable(program: Program) -> list[list[fx.Node]]:
    """Groups of two and more linear layers that read the same node, in graph order."""
    if ADAPTED in program.properties:
        return []
    uses: dict[int, int] = defaultdict(int)
    for node in program.graph.nodes:
        if node.op == "get_attr" and (parameter := _parameter(program, node)) is not None:
            uses[id(parameter)] += len(node.users)
    groups: dict[tuple[fx.Node, int, torch.dtype], list[fx.Node]] = defaultdict(list)
    for node in program.calls(LINEAR):
        parameters = _parameters(program, node)
        own = all(parameter is not None and uses[id(parameter)] == 1 for parameter in parameters)
        names = {str(arg.target) for arg in node.args[1:] if isinstance(arg, fx.Node)}
        if own and parameters and not node.kwargs and not names & set(program.extra):
            assert isinstance(node.args[0], fx.Node) and parameters[0] is not None
            groups[node.args[0], len(parameters), parameters[0].dtype].append(node)
    return [group for group in groups.values() if len(group) > 1]


def check_merged(program: Program) -> None:
    """No two linear layers with weights of their own read the same rows, and parameters are parts of what is read."""
    for group in mergeable(program):
        raise PropertyError(f"{locate(group[1])} reads the same rows as '{group[0].name}'")
    constants = program.constants
    if constants is not None and program.device.type != "meta" and not constants.is_current():
        raise PropertyError("a merged weight does not hold its parameters")


def _merge(program: Program, group: list[fx.Node], buffers: list[str]) -> fx.Node:
    """The product of a group in front of its first layer, and a part of it in place of every layer."""
    graph, first = program.graph, group[0]
    spec = first.meta["val"]
    with graph.inserting_before(first):
        whole = graph.call_function(LINEAR, (first.args[0], *(graph.get_attr(name) for name in buffers)))
        start, parts = 0, []
        for node in group:
            stop = start + int(node.meta["val"].shape[-1])
            parts.append(graph.call_function(ATEN.slice.Tensor, (whole, len(spec.shape) - 1, start, stop)))
            start = stop
    for node, part in zip(group, parts, strict=True):
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    whole.meta = {key: value for key, value in first.meta.items() if key != "val"}
    return whole


def _parameters(program: Program, node: fx.Node) -> list[nn.Parameter | None]:
    """Weight and bias of a linear layer; None for what is no parameter."""
    return [_parameter(program, argument) for argument in node.args[1:] if argument is not None]


def _parameter(program: Program, node: object) -> nn.Parameter | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: object = program.module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Parameter) else None
