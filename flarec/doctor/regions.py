"""Compiled regions in a simulation: what they keep, what they move, and what is there meanwhile.

A half of a region (`flarec.ir.partition`) is a graph of operations. Products, and whatever else a compiler leaves to a
library, are operations as they are elsewhere. What lies between them becomes kernels that read what comes from outside
of them once and write what others read: nothing between their operations takes memory or traffic.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flarec.ir.partition import PartitionedCodes, outputs_of

from .simulate import MEMORY, Simulation, Work, kind_of, moved_of

ATEN = torch.ops.aten
LEFT = {
    ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default, ATEN.convolution.default,
    ATEN.convolution_backward.default, ATEN._scaled_dot_product_flash_attention.default,
}
"""What a compiler does not make kernels of."""


def counted_codes(simulation: Simulation) -> PartitionedCodes:
    """Codes for a program that runs in `simulation`."""
    plans: dict[int, HalfPlan] = {}

    def what(half: fx.GraphModule, values: Sequence[Any]) -> list[Any]:
        if id(half) not in plans:
            plans[id(half)] = HalfPlan.of(half)
        plan, before = plans[id(half)], simulation.work.copy()
        found = plan.outputs(values)
        simulation.work = before + plan.work
        return found

    return PartitionedCodes(what)


@dataclass(frozen=True)
class HalfPlan:
    """What a half does, without its numbers.

    half       kept alive: plans are found by it
    places     of each result None, or (the input whose memory it is, or the first result with its memory; node)
    meanwhile  bytes that are there at the worst moment beside inputs and results
    """

    half: fx.GraphModule
    places: tuple[tuple[int | None, int | None, Tensor] | None, ...]
    work: Work
    meanwhile: int

    @staticmethod
    def of(half: fx.GraphModule) -> HalfPlan:
        inputs = {node: index for index, node in enumerate(half.graph.find_nodes(op="placeholder"))}
        places: list[tuple[int | None, int | None, Tensor] | None] = []
        first: dict[fx.Node, int] = {}
        for index, node in enumerate(outputs_of(half)):
            if not isinstance(node, fx.Node):
                places.append(None)
                continue
            base = base_of(node)
            places.append((inputs.get(base), first.get(base), node.meta["val"]))
            first.setdefault(base, index)
        work, meanwhile = _examined(half)
        return HalfPlan(half, tuple(places), work, meanwhile)

    def outputs(self, values: Sequence[Any]) -> list[Any]:
        """Tensors without numbers in the memory that the results have."""
        some = next(value for value in values if isinstance(value, Tensor))
        found: list[Any] = []
        for place in self.places:
            if place is None:
                found.append(None)
                continue
            given, earlier, like = place
            memory = values[given] if given is not None else found[earlier] if earlier is not None else None
            if memory is None:
                memory = some.new_empty_strided(like.shape, like.stride(), dtype=like.dtype)
            elif memory.shape != like.shape or memory.stride() != like.stride() or memory.dtype != like.dtype:
                memory = memory.as_strided(like.shape, like.stride(), like.storage_offset())
            found.append(memory)
        if self.meanwhile:
            some.new_empty(self.meanwhile, dtype=torch.uint8)
        return found


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while is_view(node):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def is_view(node: fx.Node) -> bool:
    target = node.target
    return node.op == "call_function" and (
        target is operator.getitem or (isinstance(target, torch._ops.OpOverload) and target.is_view)
    )


def _examined(half: fx.GraphModule) -> tuple[Work, int]:
    """The work of a half, and the bytes that its values have at the worst moment beside inputs and results."""
    nodes = [node for node in half.graph.nodes if node.op == "call_function" and not is_view(node)]
    kernel = _kernels(nodes)
    results = {base_of(node) for node in outputs_of(half) if isinstance(node, fx.Node)}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in half.graph.nodes:
        if node.op != "output" and not is_view(node):
            for source in dict.fromkeys(map(base_of, node.all_input_nodes)):
                readers.setdefault(source, []).append(node)
    work, reads, writes = Work(), dict[int, set[fx.Node]](), dict[int, set[fx.Node]]()
    real: list[fx.Node] = []
    for node in nodes:
        if node not in kernel:
            kind, flops = kind_of(node.target, *_values(node))
            work.add(kind, flops, sum(map(moved_of, _tensors([*node.all_input_nodes, node]))))
            real.append(node)
            continue
        own = kernel[node]
        reads.setdefault(own, set()).update(
            base for base in map(base_of, node.all_input_nodes) if kernel.get(base) != own
        )
        if node in results or any(kernel.get(reader) != own for reader in readers.get(node, ())):
            writes.setdefault(own, set()).add(node)
            real.append(node)
    for own in dict.fromkeys(kernel.values()):
        touched = [*reads.get(own, ()), *writes.get(own, ())]
        work.add(MEMORY, 0, sum(map(moved_of, _tensors(touched))))
    return work, _worst([node for node in nodes if node in set(real) - results], nodes, readers, kernel)


def _kernels(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """The number of the kernel of each operation that has none of its own: those that read one another, with no
    product between them, are one."""
    level: dict[fx.Node, int] = {}
    number: dict[fx.Node, int] = {}
    members: dict[int, list[fx.Node]] = {}
    for node in nodes:
        sources = [base for base in map(base_of, node.all_input_nodes) if base in level]
        level[node] = max((level[s] + (s.target in LEFT) for s in sources), default=0)
        if node.target in LEFT:
            continue
        number[node] = len(number)
        members[number[node]] = [node]
        for source in sources:
            if source in number and level[source] == level[node] and number[source] != number[node]:
                old = number[source]
                for member in members.pop(old):
                    number[member] = number[node]
                    members[number[node]].append(member)
    return number


def _worst(
    passing: Sequence[fx.Node], nodes: Sequence[fx.Node], readers: dict[fx.Node, list[fx.Node]],
    kernel: dict[fx.Node, int],
) -> int:
    """Bytes of the values that are no result at the moment when most of them are there."""
    place = {node: index for index, node in enumerate(nodes)}
    ends: dict[int, int] = {}
    for node, own in kernel.items():
        ends[own] = max(ends.get(own, 0), place[node])
    changes: dict[int, int] = {}
    for node in passing:
        size = sum(value.numel() * value.element_size() for value in _tensors([node]))
        last = max((ends[kernel[r]] if r in kernel else place[r] for r in readers.get(node, ())), default=place[node])
        changes[place[node]] = changes.get(place[node], 0) + size
        changes[last + 1] = changes.get(last + 1, 0) - size
    most = now = 0
    for at in sorted(changes):
        now += changes[at]
        most = max(most, now)
    return most


def _tensors(nodes: Sequence[fx.Node]) -> list[Tensor]:
    found = [node.meta.get("val") for node in nodes]
    return [value for each in found for value in (each if isinstance(each, (tuple, list)) else [each])
            if isinstance(value, Tensor)]


def _values(node: fx.Node) -> tuple[Any, Any, Any]:
    def value(source: fx.Node) -> Any:
        return source.meta.get("val")

    return fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value), node.meta.get("val")
