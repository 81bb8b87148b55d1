"""Losses of rows of logits, with their gradient: `reference` (the specification), `torch_rows` and `triton_rows`."""

from __future__ import annotations

from collections.abc import Callable

from .chain import FLOOR, Chain, accepted, slot_weights
from .reference import RowLosses, RowWeights, reference
from .torch_rows import row_losses

__all__ = [
    "FLOOR", "Chain", "RowLosses", "RowWeights", "accepted", "implementation", "reference", "row_losses",
    "slot_weights",
]


def implementation(name: str) -> Callable[..., RowLosses]:
    """The function of that name: "torch", "reference", or "triton" (imported only here)."""
    if name == "triton":
        from . import triton_rows

        return triton_rows.row_losses
    return {"torch": row_losses, "reference": reference}[name]
