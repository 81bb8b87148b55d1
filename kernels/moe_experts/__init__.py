"""Mixture-of-experts feed-forward: `reference` is the specification."""

from .reference import reference

__all__ = ["reference"]
