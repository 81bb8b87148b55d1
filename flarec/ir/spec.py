"""What a program remembers about a tensor: sizes and dtype as plain data, without the tracer's symbols behind them.

A size that depends on the input is text: an expression over `rows`, `length` (tokens per row; `clean` and `noisy` of
one stream) and `head_rows` (gathered for the head), such as "length" or "2*length*rows". Two sizes of one program are
equal if their text is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ROWS, LENGTH, HEAD_ROWS = "rows", "length", "head_rows"
CLEAN, NOISY = "clean", "noisy"
"""Tokens of one stream per row, where the streams are computed apart."""
Size = int | str


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor; sizes are numbers, or text for those that depend on the input."""

    shape: tuple[Size, ...]
    dtype: torch.dtype

    def size(self, dim: int) -> int:
        """A size that has to be a number: of a weight or of a feature dimension."""
        size = self.shape[dim]
        assert isinstance(size, int), f"dimension {dim} of {self} depends on the input"
        return size


def spec_of(tensor: torch.Tensor, names: Mapping[Any, Any]) -> TensorSpec:
    """The spec of a traced tensor; `names` gives the tracer's (sympy) symbols their names."""
    return TensorSpec(tuple(_size(size, names) for size in tensor.shape), tensor.dtype)


def symbol_names(input_ids: torch.Tensor) -> dict[Any, Any]:
    """The tracer's symbols of the traced `input_ids` [rows, length], as symbols with these names."""
    import sympy  # slow to import, and only a fresh capture comes here

    sizes: list[Any] = list(input_ids.shape)
    return {
        size.node.expr: sympy.Symbol(name)
        for size, name in zip(sizes, (ROWS, LENGTH), strict=True)
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol)
    }


def _size(size: int | torch.SymInt, names: Mapping[Any, Any]) -> Size:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr.xreplace(names)
    return int(expression) if expression.is_Integer else str(expression)
