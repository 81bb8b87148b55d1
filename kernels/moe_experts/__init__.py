"""Mixture-of-experts feed-forward: `reference` (specification, a loop over experts) and `grouped` (sorted by expert)."""

from .reference import reference
from .torch_grouped import grouped

__all__ = ["grouped", "reference"]
