"""Conv windows: which token every token reads at each lag (docs/semantics.md section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.layout import Layout


def conv_windows(layout: Layout, width: int, *, continues: bool = False) -> Tensor:
    """Indices [B, T, W] int64 into the axis [window (W-1) | slots (T) | one zero column]; entry [.., i] is lag i.

    Lag 0 is the token itself. Where nothing is read (before the document starts, padding) the index is W-1+T, the zero
    column. Clean tokens of document 0 before `layout.cached` are window entries: position p is column p - cached + W
    - 1.

    continues: the layout continues a cache and holds document 0 of each row only; nothing then waits for a GPU.
    """
    zero_column = width - 1 + layout.length
    lag = torch.arange(width, device=layout.device)
    document, position = layout.token_document(), layout.position_ids()  # [B, T]
    source = position[:, :, None] - lag  # [B, T, W] document position read at each lag
    slot = torch.arange(layout.length, device=layout.device)[None, :, None] - lag

    # noisy tokens read their own block from its anchor on, the clean stream before it
    own_start = torch.cat([torch.zeros_like(layout.clean_position), layout.per_noisy(layout.block_anchor)], dim=1)
    is_noisy = (torch.arange(layout.length, device=layout.device) >= layout.clean_length)[None, :, None]
    own_block = is_noisy & (source >= own_start[:, :, None])

    clean_slot = source + _slot_minus_position(layout, continues).gather(1, document.clamp_min(0))[:, :, None]
    in_window = (document == 0)[:, :, None] & (source < layout.cached[:, None, None])
    window_column = source - layout.cached[:, None, None] + width - 1

    index = torch.where(own_block, slot, clean_slot) + width - 1
    index = torch.where(in_window & ~own_block, window_column, index)
    nothing = (document < 0)[:, :, None] | (source < 0) | (index < 0)
    return torch.where(nothing, zero_column, index)


def _slot_minus_position(layout: Layout, continues: bool) -> Tensor:
    """[B, documents + 1]: clean slot minus document position, constant inside a document; the last column is
    scratch."""
    documents = 1
    if not continues:
        documents = int(layout.token_document().amax()) + 1 if layout.rows * layout.length else 0
    table = torch.zeros(layout.rows, documents + 1, dtype=torch.int64, device=layout.device)
    slots = torch.arange(layout.clean_length, device=layout.device)
    column = layout.clean_document.where(layout.clean_document >= 0, documents)
    return table.scatter_(1, column, slots - layout.clean_position)
