"""What a graph computes from parameters alone is computed once, not in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from flarec.errors import PropertyError
from flarec.ir.constants import Constants
from flarec.ir.module import compile_now, graph_module
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, locate

ATEN = torch.ops.aten
BUFFER = "folded_"
"""Prefix of the buffers of folded constants."""
FREE = {
    ATEN.transpose.int, ATEN.t.default, ATEN.permute.default, ATEN.unsqueeze.default, ATEN.squeeze.dim,
    ATEN.reshape.default, ATEN.view.default, ATEN.expand.default, ATEN.slice.Tensor, ATEN.select.int,
    ATEN.detach.default,
}
"""Views, which cost nothing: alone they are no constant worth keeping."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Keep what depends on parameters alone as a buffer outside of the state dict.

    before   %w = get_attr[layers.0.norm.weight]   %f = to.dtype(%w, float32)   %s = add(%f, 1.0)
             %y = mul(%x, %s)
    after    %folded_0 = get_attr[folded_0]
             %y = mul(%x, %folded_0)

    largest: numbers of a constant; larger ones are computed in every step rather than kept beside their parameter.
    Parameters that change are noticed at the next call (`Constants.refresh`). For graphs without gradients.
    """

    largest: int = 2**20

    name: ClassVar[str] = "fold-constants"
    requires: ClassVar[Claims] = frozenset({"cached"})
    provides: ClassVar[Claims] = frozenset({"constants-folded"})
    targets: ClassVar[frozenset[str]] = frozenset({"decode"})
    may_be_empty: ClassVar[bool] = True  # a model whose norms are plain products

    def apply(self, program: Program) -> list[fx.Node]:
        sites = [node for node in foldable(program) if _size(node) <= self.largest]
        if not sites:
            return []
        folded, sources = _graph_of(program, sites)
        names = tuple(f"{BUFFER}{index}" for index in range(len(sites)))
        program.constants = program.constants or Constants()
        program.constants.fold(program.module, folded, names, sources)
        made = []
        for name, node in zip(names, sites, strict=True):
            with program.graph.inserting_before(node):
                constant = program.graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
            made.append(constant)
        program.graph.eliminate_dead_code()
        return made


def foldable(program: Program) -> list[fx.Node]:
    """Nodes computed from parameters and buffers alone that something else reads; views alone do not count."""
    constant: dict[fx.Node, bool] = {}  # whether something was computed on the way
    extra = set(program.extra)  # the mask vector and adapters are read by name
    for node in program.graph.nodes:
        if node.op == "get_attr":
            if isinstance(_tensor(program, node), torch.Tensor) and node.target not in extra:
                constant[node] = False
        elif _is_pure(node) and node.all_input_nodes and all(source in constant for source in node.all_input_nodes):
            constant[node] = node.target not in FREE or any(constant[source] for source in node.all_input_nodes)
    return [
        node for node, computed in constant.items() if computed and any(user not in constant for user in node.users)
    ]


def check_folded(program: Program) -> None:
    """Nothing small is computed from parameters alone, and the buffers hold what the parameters give."""
    folding = [record for record in program.history if record.name == FoldConstants.name]
    largest = folding[-1].options["largest"] if folding else FoldConstants.largest
    for node in foldable(program):
        if _size(node) <= largest:
            raise PropertyError(f"{locate(node)} is computed from parameters alone")
    if program.constants is not None and program.device.type != "meta" and not program.constants.is_current():
        raise PropertyError("a kept constant is not what its parameters give")


def _is_pure(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def _size(node: fx.Node) -> int:
    spec = node.meta.get("val")
    if spec is None or not all(type(size) is int for size in spec.shape):
        return 2**62
    return int(torch.Size(spec.shape).numel())


def _tensor(program: Program, node: fx.Node) -> object:
    found: object = program.module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found


def _graph_of(program: Program, sites: list[fx.Node]) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """A graph without inputs that computes the sites, and the tensors that it reads."""
    needed = set(sites)
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    sources: dict[str, torch.Tensor] = {}
    for node in program.graph.nodes:
        if node in needed:
            values[node] = graph.node_copy(node, lambda source: values[source])
            tensor = _tensor(program, node) if node.op == "get_attr" else None
            if isinstance(tensor, torch.Tensor):
                sources[str(node.target)] = tensor
    graph.output(tuple(values[site] for site in sites))
    folded = graph_module(program.module, graph)
    compile_now(folded)
    return folded, sources
