"""Writes in place: what a node has to wait for although it reads no result of it.

Captured graphs hold a few (a buffer that is filled by `copy_`, scores that are scaled by `div_`). Whoever moves nodes
keeps them behind what is said here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx


def is_write(node: fx.Node) -> bool:
    """Whether a node changes one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that a node changes."""
    if not is_write(node):
        return []
    assert isinstance(node.target, torch._ops.OpOverload)
    found = []
    for place, argument in enumerate(node.target._schema.arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            found.append(value)
    return found


def memory_of(nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node that made the memory which each node's result lies in, as far as schemas say it; views are followed."""
    found: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        found[node] = node
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        made = source if node.target is operator.getitem else node  # results of one call are apart, but for views
        if _is_view(made) or (made is source and not isinstance(made.target, torch._ops.OpOverload)):
            found[node] = found[source]
    return found


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(x.alias_info is not None for x in target._schema.returns)


def behind(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By node those that run before it because of memory: the last write to what it reads, and for a write all that
    read before."""
    nodes = list(nodes)
    memory = memory_of(nodes)
    last, readers = dict[fx.Node, fx.Node](), dict[fx.Node, list[fx.Node]]()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        places = {memory[source] for source in node.all_input_nodes}
        changed = {memory[source] for source in written(node)}
        waits = [last[place] for place in places if place in last]
        for place in changed:
            waits += readers.pop(place, [])
            last[place] = node
        for place in places - changed:
            readers.setdefault(place, []).append(node)
        if waits:
            found[node] = list(dict.fromkeys(waits))
    return found
