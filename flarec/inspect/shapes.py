"""Shapes of a captured graph as text: `rows` and `T` (tokens per row) for what depends on the input."""

from __future__ import annotations

import re

from torch import fx

from flarec.ir.spec import LENGTH, ROWS, Size, TensorSpec

_NAME = re.compile(rf"\b{LENGTH}\b")
_PRODUCT = re.compile(r"\w+(\*\w+)*")


def shape_text(node: fx.Node) -> str:
    """`[rows, T, 16, 128]`, or an empty string if the node has no tensor value."""
    spec = node.meta.get("val")
    if not isinstance(spec, TensorSpec):
        return ""
    return "[" + ", ".join(size_text(size) for size in spec.shape) + "]"


def size_text(size: Size) -> str:
    """One dimension; factors of a product are written `rows*T*4`."""
    text = _NAME.sub("T", str(size))
    return "*".join(sorted(text.split("*"), key=_order)) if _PRODUCT.fullmatch(text) else text


def _order(factor: str) -> tuple[int, str]:
    return (0 if factor == ROWS else 1 if factor == "T" else 2), factor
