"""Mixture-of-experts feed-forward: `reference` (the specification) and `grouped` (sorted by expert)."""

from .reference import reference
from .torch_grouped import grouped

__all__ = ["grouped", "reference"]
