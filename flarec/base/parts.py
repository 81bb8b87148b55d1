"""Steps of many requests, some at a time: what one operator writes is then still near when the next reads it."""

from __future__ import annotations

import torch

NEAR = 1 << 20
"""Bytes of a tensor of one part: caches of cores hold a few such tensors, and operators are called seldom enough."""


def requests_at_a_time(requests: int, size: int, device: torch.device) -> list[slice]:
    """Parts of the requests, of about `NEAR` bytes where one has `size`; all of them on a GPU or in a compiler."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, requests)]
    parts = max(1, min(requests, round(requests * size / NEAR)))
    each = -(-requests // parts) if requests else 1
    return [slice(start, min(start + each, requests)) for start in range(0, requests, each)]
