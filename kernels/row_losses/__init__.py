"""Losses of rows of logits, with their gradient: `reference` (the specification), `torch_rows` and `triton_rows`."""

from __future__ import annotations

from collections.abc import Callable

from .reference import RowLosses, reference
from .torch_rows import row_losses

__all__ = ["RowLosses", "implementation", "reference", "row_losses"]


def implementation(name: str) -> Callable[..., RowLosses]:
    """The function of that name: "torch", "reference", or "triton" (imported only here)."""
    if name == "triton":
        from . import triton_rows

        return triton_rows.row_losses
    return {"torch": row_losses, "reference": reference}[name]
