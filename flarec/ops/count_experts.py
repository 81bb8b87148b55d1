"""How often every expert of a layer is chosen, by stream: an op of its own, because it sums over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import PADDING, Layout

STREAMS = ("clean", "noisy")
_PADDED = len(STREAMS)


def token_streams(layout: Layout) -> Tensor:
    """[rows * T] int64: 0 for a clean token, 1 for a noisy one, 2 for padding."""
    clean = torch.where(layout.clean_document != PADDING, 0, _PADDED)
    noisy = torch.where(layout.noisy_block != PADDING, 1, _PADDED)
    return torch.cat([clean, noisy], dim=1).flatten()


@torch.library.custom_op("flarec::count_experts", mutates_args=())
def _count(index: Tensor, stream: Tensor, experts: int) -> Tensor:
    index = index.reshape(len(stream), -1).long()
    cells = (stream[:, None] * (experts + 1) + index).flatten()
    counts = cells.new_zeros((_PADDED + 1) * (experts + 1)).scatter_add_(0, cells, torch.ones_like(cells))
    return counts.reshape(_PADDED + 1, experts + 1)[:_PADDED, :experts].contiguous()


@_count.register_fake
def _count_fake(index: Tensor, stream: Tensor, experts: int) -> Tensor:
    return stream.new_empty(_PADDED, experts)


count_experts = _count._opoverload
"""(index [rows * T, k], stream [rows * T] of `token_streams`, experts) -> [2, experts] int64: choices by clean rows, by
noisy rows. Padding counts for neither; a choice that the router drops has the index `experts`."""
