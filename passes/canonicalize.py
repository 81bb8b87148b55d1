"""Remove what export leaves behind and no later pass should have to know."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program

ATEN = torch.ops.aten
ASSERTS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_assert_async")
NO_OPS = (ATEN.alias.default, ATEN.lift_fresh_copy.default)
STOPS = (ATEN.detach.default, ATEN.detach_.default)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Strip guards, inline grad regions, drop device constants, no-op slices and dead code; view becomes reshape, and
    a product over one number that no gradient runs through (rotary angles in some models) a multiplication, which is
    no library's matrix product with copies of its operands.

    before   %s = slice(%h, 1, 0, 9223372036854775807)   %d = to.device(%s, cpu, float32)   %v = view(%d, [2, 24, -1])
             %f = matmul(%frequencies[2, 8, 1], %positions[2, 1, 24])
    after    %d = to.dtype(%h, float32)
             %v = reshape(%d, [2, 24, -1])
             %f = mul(%frequencies, %positions)
    """

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[Claims] = frozenset({"captured"})
    provides: ClassVar[Claims] = frozenset({"canonical"})

    def apply(self, program: Program) -> list[fx.Node]:
        graph = program.graph
        sites: list[fx.Node] = []
        for node in list(graph.nodes):
            if _is_assert(node):
                sites.append(node)
                graph.erase_node(node)
            elif _is_region(node):
                sites.append(node)
                _inline(program, node)
        learned = _learned(program)
        for node in list(graph.nodes):
            replacement = _simplify(graph, node, learned)
            if replacement is not None:
                sites.append(node)
                node.replace_all_uses_with(replacement)
                graph.erase_node(node)
        before = list(graph.nodes)
        graph.eliminate_dead_code()
        known = {*graph.nodes, *sites}
        return sites + [node for node in before if node not in known]


def _is_assert(node: fx.Node) -> bool:
    if node.op == "call_module" and node.target == "_guards_fn":
        return True
    return node.op == "call_function" and any(name in str(node.target) for name in ASSERTS)


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in (
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
    )


def _learned(program: Program) -> set[fx.Node]:
    """Nodes through which a parameter gets a gradient."""
    parameters = program.parameters()
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        own = node.op == "get_attr" and node.target in parameters
        if own or (node.target not in STOPS and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _inline(program: Program, node: fx.Node) -> None:
    """Copy the body of a grad-mode or disabled-autocast region into the graph; what no_grad gives is detached."""
    graph = program.graph
    position = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    holder = node.args[position]
    assert isinstance(holder, fx.Node)
    body = program.module.get_submodule(str(holder.target))
    assert isinstance(body, fx.GraphModule)
    inputs = iter(node.args[position + 1 :])
    values: dict[fx.Node, object] = {}
    result: object = None
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = next(inputs)
            elif inner.op == "output":
                result = fx.map_arg(inner.args[0], lambda a: values[a])  # type: ignore[arg-type, return-value]
            elif not _is_assert(inner):
                values[inner] = graph.node_copy(inner, lambda a: values[a])  # type: ignore[arg-type, return-value]
    assert isinstance(result, (tuple, list))
    without_gradient = getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled" and node.args[0] is False
    for user in list(node.users):
        assert user.target is operator.getitem
        value = result[user.args[1]]  # type: ignore[index]
        if without_gradient and isinstance(value, fx.Node):
            with graph.inserting_before(node):
                value = _like(graph.call_function(ATEN.detach.default, (value,)), value)
        user.replace_all_uses_with(value)
        graph.erase_node(user)
    graph.erase_node(node)
    if not holder.users:
        graph.erase_node(holder)


def _simplify(graph: fx.Graph, node: fx.Node, learned: set[fx.Node]) -> fx.Node | None:
    """A node that can stand for `node`, or None if it stays. A detach stays where it stops a gradient."""
    if node.op != "call_function":
        return None
    args = node.args
    if node.target in NO_OPS and isinstance(args[0], fx.Node):
        return args[0]
    if node.target in STOPS and isinstance(args[0], fx.Node) and args[0] not in learned:
        return args[0]
    if node.target is ATEN.slice.Tensor and isinstance(args[0], fx.Node) and _keeps_everything(node):
        return args[0]
    with graph.inserting_before(node):
        if node.target is ATEN.to.device:
            return _like(graph.call_function(ATEN.to.dtype, (args[0], args[2])), node)
        if node.target is ATEN.to.dtype_layout or node.target is ATEN._to_copy.default:
            if "dtype" in node.kwargs:
                return _like(graph.call_function(ATEN.to.dtype, (args[0], node.kwargs["dtype"])), node)
            return args[0] if isinstance(args[0], fx.Node) else None
        if node.target is ATEN.view.default and not _written_through(node):
            return _like(graph.call_function(ATEN.reshape.default, args), node)
        if node.target is ATEN.matmul.default and _is_outer(node) and not learned.intersection(node.all_input_nodes):
            return _like(graph.call_function(ATEN.mul.Tensor, args), node)
    return None


def _is_outer(node: fx.Node) -> bool:
    """A product of columns [..., n, 1] and rows [..., 1, m], each of whose numbers is one multiplication, and on whose
    order in memory nobody relies: a multiplication may have another one."""
    if _written_through(node) or any(_written_through(user) for user in node.users):
        return False
    column, row = (operand.meta.get("val") for operand in node.args if isinstance(operand, fx.Node))
    if column is None or row is None or min(len(column.shape), len(row.shape)) < 2:
        return False
    inner = column.shape[-1], row.shape[-2]
    return all(type(size) is int and size == 1 for size in inner)


def _keeps_everything(node: fx.Node) -> bool:
    """A slice with step 1 that is as long as its operand (also as a symbol: `x[:, -length:]`) takes all of it."""
    args = node.args
    step = args[4] if len(args) > 4 else 1
    before, after = (n.meta.get("val") for n in (args[0], node) if isinstance(n, fx.Node))
    if node.kwargs or step != 1 or before is None or after is None:
        return False
    return bool(before.shape == after.shape)


def _written_through(node: fx.Node) -> bool:
    """True if a user writes in place: then the view must stay a view."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return True
    return False


def _like(new: fx.Node, old: fx.Node) -> fx.Node:
    new.meta = dict(old.meta)
    return new
