"""Softmax attention over a layout: `reference` (specification), `visibility` (mask), `two_stream`, `cached`."""

from .mask import visibility
from .reference import reference
from .torch_sdpa import cached, two_stream, write_cache

__all__ = ["cached", "reference", "two_stream", "visibility", "write_cache"]
