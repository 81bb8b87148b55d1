"""Shapes of a captured graph as text: the symbols of rows and sequence length get their names back."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from flarec.program import Program


class ShapeNames:
    """Prints shapes with `rows` and `T` (tokens per row, clean and noisy) in place of the capture's symbols."""

    def __init__(self, program: Program) -> None:
        value = program.placeholder("input_ids").meta.get("val")
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        if isinstance(value, torch.Tensor):
            for size, name in zip(value.shape, ("rows", "T"), strict=True):
                if isinstance(size, torch.SymInt):
                    self.names[size.node.expr] = sympy.Symbol(name)

    def of(self, node: fx.Node) -> str:
        """`[rows, T, 16, 128]`, or an empty string if the node has no tensor value."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return ""
        return "[" + ", ".join(self.size(size) for size in value.shape) + "]"

    def size(self, size: int | torch.SymInt) -> str:
        """One dimension; factors of a product are written `rows*T*4`."""
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr.xreplace(self.names)
        factors = sorted((str(factor) for factor in expression.as_ordered_factors()), key=_order)
        return "*".join(factors)


def _order(factor: str) -> tuple[int, str]:
    return (0 if factor == "rows" else 1 if factor == "T" else 2), factor
