"""Shared rewrite: a captured mixer becomes its two-stream form, which reads the layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from flarec.ir.program import Program


def rewrite(
    program: Program,
    target: object,
    replacement: Callable[..., Any],
    arguments: Callable[[dict[str, Any]], tuple[Any, ...]],
) -> list[fx.Node]:
    """Replace every call of `target` by `replacement(*arguments(operands by name))`; returns the new nodes."""
    sites = []
    graph = program.graph
    for node in program.calls(target):
        with graph.inserting_before(node):
            new = graph.call_function(replacement, arguments(operands(node)))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        sites.append(new)
    return sites


def operands(node: fx.Node) -> dict[str, Any]:
    """Operands of a custom-op call by schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {argument.name: argument.default_value for argument in schema.arguments}
    values.update(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    values.update(node.kwargs)
    return values
