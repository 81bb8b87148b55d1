"""Regions: what lies between the mixers of a graph, in parts that a compiler can make few kernels of.

A region is a set of plain ATen nodes that can be called at one moment. It is a mark in `node.meta`, so that the graph
stays flat for passes, checkers and reports; `flarec.ir.compiled` runs regions as functions. How nodes are grouped:

* A node that no region takes (a mixer, an embedding, a gather of rows; these two are taken where there are no
  gradients) begins a new level for what reads it; nodes of one level that read one another are a region. No value
  leaves a region and comes back.
* What is made of parameters alone, or elementwise of one tensor, is computed where it is read, if that is one level.
* Views at the end of a region stay outside: they cost nothing, and results that share memory cost a compiler much.
* Fewer than two operations that compute are not worth a region.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import fx

from .effects import behind, is_write, memory_of, written

MARK = "region"
"""Key of `node.meta`: the number of a node's region."""
ATEN = torch.ops.aten
VIEWS = frozenset({
    ATEN.transpose.int, ATEN.t.default, ATEN.permute.default, ATEN.unsqueeze.default, ATEN.squeeze.dim,
    ATEN.squeeze.dims, ATEN.reshape.default, ATEN.view.default, ATEN.expand.default, ATEN.slice.Tensor,
    ATEN.select.int, ATEN.detach.default, ATEN.alias.default, ATEN.flatten.using_ints, ATEN.unflatten.int,
    ATEN.split_with_sizes.default, ATEN.split.Tensor, ATEN.chunk.default, ATEN.unbind.int, ATEN.narrow.default,
    ATEN.view_as.default, ATEN.expand_as.default, ATEN.movedim.int, ATEN.numpy_T.default, operator.getitem,
})
"""What computes nothing; `reshape` where its operand's memory order allows."""
CASTS = frozenset({ATEN.to.dtype, ATEN.type_as.default, ATEN._to_copy.default})
TABLES = frozenset({
    ATEN.embedding.default, ATEN.index_select.default, ATEN.index.Tensor, ATEN.index_put.default,
    ATEN.index_add.default, ATEN.scatter_add.default,
})
"""Reads of rows by number: compiled, their gradients would be added up in no fixed order."""
READS = (ATEN.embedding.default, ATEN.index_select.default)
READ = "region_may_read"
"""Key of `node.meta`: a read of rows that no gradient runs through, which a region may hold."""
FEWEST = 2


def is_plain(node: fx.Node) -> bool:
    """Whether a region may hold this node: a call of ATEN that is no read by number, no random number, and whose sizes
    do not depend on values."""
    target = node.target
    if node.op != "call_function":
        return False
    if target is operator.getitem or target is ATEN.sym_size.int:  # of a tensor from outside it is no work
        return isinstance(node.args[0], fx.Node) and is_plain(node.args[0])
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if target in TABLES and READ not in node.meta:
        return False
    return not {
        torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
    } & set(target.tags)


def is_elementwise(node: fx.Node) -> bool:
    target = node.target
    if target in CASTS or target in VIEWS:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags and not is_write(node)


def mark(graph: fx.Graph) -> list[list[fx.Node]]:
    """Mark the nodes of every region, and return the regions in the order of their first nodes."""
    found = regions(graph)
    for node in graph.nodes:
        node.meta.pop(MARK, None)
    for number, region in enumerate(found):
        for node in region:
            node.meta[MARK] = number
    return found


def marked(graph: fx.Graph) -> list[list[fx.Node]]:
    """The regions as nodes are marked."""
    members: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if MARK in node.meta:
            members[node.meta[MARK]].append(node)
    return list(members.values())


def regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """The regions of a graph (see the module), each in the order of the graph. There are none if a node writes into a
    tensor that something outside of its region reads before: its place in the order would matter (`leaking`)."""
    levels = _levels(graph)
    _sink(graph, levels)
    groups = _connected(levels)
    found = [region for group in groups for region in [_without_last_views(group)] if _computes(region) >= FEWEST]
    place = {node: index for index, node in enumerate(graph.nodes)}
    found = sorted((sorted(region, key=place.__getitem__) for region in found), key=lambda region: place[region[0]])
    return [] if leaking(graph, found) else found


def leaking(graph: fx.Graph, found: Iterable[Iterable[fx.Node]]) -> fx.Node | None:
    """A plain node that writes into what its region did not make, or what others read before; or None."""
    region_of = {node: number for number, region in enumerate(found) for node in region}
    memory, waits = memory_of(graph.nodes), behind(graph.nodes)
    for node in graph.nodes:
        if is_plain(node) and is_write(node):
            own = region_of.get(node)
            touched = [*(memory[place] for place in written(node)), *waits.get(node, ())]
            if own is None or any(region_of.get(other) != own for other in touched):
                writer: fx.Node = node
                return writer
    return None


def _levels(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many nodes that no region takes lie one behind the other before a node, at most."""
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        inputs = [
            levels[source] + (source.op not in ("placeholder", "get_attr") and not _is_free(source))
            for source in node.all_input_nodes
        ]
        levels[node] = max(inputs, default=0)
    return levels


def _is_free(node: fx.Node) -> bool:
    """Whether what reads a node may be in one region with what the node reads."""
    return is_plain(node) or node.target in (ATEN.sym_size.int, operator.getitem)


def _sink(graph: fx.Graph, levels: dict[fx.Node, int]) -> None:
    """Move what costs a region less to compute than to be handed to where it is read."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (is_plain(node) and all(source in constant for source in node.all_input_nodes)):
            constant.add(node)
    for node in reversed(graph.nodes):
        if not is_plain(node) or is_write(node) or any(is_write(user) for user in node.users):
            continue
        readers = {levels[user] for user in node.users}
        sized = {source for source in node.all_input_nodes if source.target is ATEN.sym_size.int}
        moving = [source for source in node.all_input_nodes if source not in constant and source not in sized]
        cheap = not moving or (len(moving) == 1 and is_elementwise(node) and all(map(is_plain, node.users)))
        if cheap and len(readers) == 1:
            levels[node] = max(levels[node], *readers)


def _connected(levels: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """Plain nodes of one level that read one another."""
    group: dict[fx.Node, list[fx.Node]] = {}
    for node, level in levels.items():
        if not is_plain(node):
            continue
        own = group[node] = [node]
        for source in node.all_input_nodes:
            other = group.get(source)
            if other is not None and levels[source] == level and other is not own:
                small, own = sorted((own, other), key=len)
                own += small
                for member in small:
                    group[member] = own
    return list({id(members): members for members in group.values()}.values())


def _without_last_views(group: list[fx.Node]) -> list[fx.Node]:
    """The group without views that only others read, one behind the other."""
    inside = dict.fromkeys(group)
    waiting = list(group)
    while waiting:
        node = waiting.pop()
        beside = [node]
        if node.target is operator.getitem:  # all parts of a tensor, or none: a region returns tensors
            assert isinstance(node.args[0], fx.Node)
            beside = list(node.args[0].users) if node.args[0].target in VIEWS else []
        last = beside and not any(user in inside for part in beside for user in part.users)
        if node in inside and node.target in VIEWS and last:
            for part in beside:
                inside.pop(part, None)
            waiting += node.all_input_nodes
    return list(inside)


def _computes(region: Iterable[fx.Node]) -> int:
    return sum(node.target not in VIEWS for node in region)
