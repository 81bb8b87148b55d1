"""Short causal convolution over a layout: `reference` (specification), `conv_windows` (indices), `two_stream`."""

from .reference import reference
from .torch_gather import commit_window, next_buffer, two_stream
from .windows import conv_windows

__all__ = ["commit_window", "conv_windows", "next_buffer", "reference", "two_stream"]
