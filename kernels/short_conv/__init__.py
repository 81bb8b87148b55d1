"""Short causal convolution over a layout: `reference` is the specification."""

from .reference import reference

__all__ = ["reference"]
