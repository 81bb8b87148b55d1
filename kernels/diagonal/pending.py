"""What a decode step keeps of its clean rows until the next one commits some of them."""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.layout import PADDING, Layout


def pending_rows(rows: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The clean slots of rows [B, T, D], [B, Lc, D] in `dtype`; padding slots hold 0."""
    padding = layout.clean_document == PADDING
    return rows[:, : layout.clean_length].to(dtype).masked_fill(padding[:, :, None], 0)
