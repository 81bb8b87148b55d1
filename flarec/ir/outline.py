"""Parts of a graph as modules of their own, each called once: for running a part in another way than the rest.

The graph of the program stays as it is; what is made here runs in its place (`Program.run`). A part may be recomputed
in the backward pass, or compiled, while passes, checkers and reports go on looking at the one flat graph.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from .effects import behind
from .module import bind, graph_module

UnitOf = Callable[[fx.Node], str | None]


def outline(module: fx.GraphModule, unit_of: UnitOf) -> fx.GraphModule:
    """A module with the inputs and results of `module` that calls one submodule per unit; tensors stay shared.

    before   %a = f(%x, %w)    %b = g(%a)    %c = h(%b, %x)                   unit_of(%a) == unit_of(%b) == "layer_0"
    after    %layer_0 = layer_0(%x)    %b = layer_0[0]    %c = h(%b, %x)      layer_0: the nodes %a and %b

    unit_of: the unit of a call node, a Python identifier; None leaves a node where it is. Inputs and the output belong
    to none, and a unit reads parameters and buffers itself. `result.get_submodule(unit)` takes the values that the unit
    reads, in the order of its placeholders, and returns a tuple of those that are read outside of it; replace it with
    `setattr`. Nodes keep their names and `meta`. Units keep the order in which they end; the nodes between them may
    move, but never over a write in place to what they read.

    Raises `ValueError` if a value leaves a unit and comes back into it: there is no moment at which it can be called.
    """
    units: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            name = unit_of(node)
            if name is not None:
                units[node] = name
    members: dict[str, list[fx.Node]] = {}
    for node, name in units.items():
        members.setdefault(name, []).append(node)
    graph, values, tensors = fx.Graph(), dict[fx.Node, fx.Node](), _tensors(module, module.graph.nodes)
    for step in _ordered(module.graph, units, members):
        if isinstance(step, fx.Node):
            values[step] = graph.node_copy(step, lambda node: values[node])
            continue
        inside = members[step]
        results = [node for node in inside if any(units.get(user) != step for user in node.users)]
        if not results:
            continue
        unit, inputs = _unit(module, inside, results)
        tensors[step] = unit
        call = graph.create_node("call_module", step, tuple(values[node] for node in inputs), name=step)
        for place, node in enumerate(results):
            values[node] = graph.create_node("call_function", operator.getitem, (call, place), name=node.name)
            values[node].meta = dict(node.meta)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:  # units read it
            graph.erase_node(node)
    return graph_module(_root(tensors), graph)


def _unit(
    module: fx.GraphModule, inside: Iterable[fx.Node], results: list[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The module of a unit, and the nodes whose values it takes."""
    graph, values, inputs = fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
    inside = list(inside)
    own = set(inside)
    for node in dict.fromkeys(source for member in inside for source in member.all_input_nodes):
        if node not in own and node.op != "get_attr":
            inputs.append(node)
            values[node] = graph.placeholder(node.name)
            values[node].meta = dict(node.meta)
    for node in inside:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in values:
                values[source] = graph.node_copy(source)
        values[node] = graph.node_copy(node, lambda source: values[source])
    graph.output(tuple(values[node] for node in results))
    return graph_module(_root(_tensors(module, graph.nodes)), graph), inputs


def _ordered(graph: fx.Graph, units: dict[fx.Node, str], members: dict[str, list[fx.Node]]) -> list[fx.Node | str]:
    """Nodes of no unit, and units, each behind what it reads: in the order of the graph, a unit as its last node."""
    place = {node: index for index, node in enumerate(graph.nodes)}

    def step_of(node: fx.Node) -> fx.Node | str:
        return units.get(node, node)

    def at(step: fx.Node | str) -> int:
        return place[members[step][-1] if isinstance(step, str) else step]

    steps = dict.fromkeys(step_of(node) for node in graph.nodes)
    waits = behind(graph.nodes)
    reads = {
        step: {step_of(source) for node in (members[step] if isinstance(step, str) else [step])
               for source in (*node.all_input_nodes, *waits.get(node, ()))} - {step}
        for step in steps
    }
    readers: dict[fx.Node | str, list[fx.Node | str]] = {step: [] for step in steps}
    for step, sources in reads.items():
        for source in sources:
            readers[source].append(step)
    waiting = {step: len(sources) for step, sources in reads.items()}
    ready = [(at(step), step) for step, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    found: list[fx.Node | str] = []
    while ready:
        _, step = heapq.heappop(ready)  # places differ, so steps are never compared
        found.append(step)
        for reader in readers[step]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (at(reader), reader))
    if len(found) < len(steps):
        stuck = min((step for step in steps if waiting[step] and isinstance(step, str)), key=at)
        raise ValueError(f"a value of unit '{stuck}' goes through another part of the graph and comes back into it")
    return found


def _tensors(module: fx.GraphModule, nodes: Iterable[fx.Node]) -> dict[str, Any]:
    """What of `module` some nodes read or call, by name."""
    found: dict[str, Any] = {}
    for node in nodes:
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            found[str(node.target)] = getattr(module.get_submodule(path), leaf)
        elif node.op == "call_module":
            found[str(node.target)] = module.get_submodule(str(node.target))
    return found


def _root(tensors: dict[str, Any]) -> nn.Module:
    """A module that holds these under their names."""
    root = nn.Module()
    for name, value in tensors.items():
        bind(root, name, value)
    return root
