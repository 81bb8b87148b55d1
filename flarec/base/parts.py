"""Steps of many requests, some of them at a time: what one operator writes is then still near when the next reads it."""

from __future__ import annotations

import torch

NEAR = 1 << 20
"""Bytes of one tensor of a part: a core's own cache holds a few such tensors, and operators are called seldom enough."""


def requests_at_a_time(requests: int, size: int, device: torch.device) -> list[slice]:
    """Parts of the requests, of about `NEAR` bytes where one has `size`; on a CPU, and as one where a compiler looks."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, requests)]
    parts = max(1, min(requests, round(requests * size / NEAR)))
    each = -(-requests // parts) if requests else 1
    return [slice(start, min(start + each, requests)) for start in range(0, requests, each)]
