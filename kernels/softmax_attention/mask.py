"""The softmax mask of a layout: who reads whom (docs/semantics.md section 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.errors import LayoutError
from flarec.layout import BLOCK_END, Layout


def visibility(layout: Layout, window: int | None = None, cache_length: int | None = None) -> Tensor:
    """Boolean mask [B, T, S], True where query t reads key s.

    Without a cache the keys are the slots themselves, S = T (clean | noisy). With a cache of M slots S = M + Ln
    (cache | noisy), for a cache in which the clean tokens of this layout have ALREADY been written at their positions;
    then every clean token must belong to document 0. window: only keys at positions > query position - window.
    A padding query sees exactly one key, itself (clean padding with a cache: cache slot 0), so that its softmax is
    finite; nothing reads a padding key but that key's own query.
    Raises `LayoutError` if the layout, one on the host, does not fit the cache: nothing waits for a GPU.
    """
    clean, length = layout.clean_length, layout.length
    anchor, whole_block = layout.per_noisy(layout.block_anchor), layout.per_noisy(layout.block_readout) == BLOCK_END
    document, position = layout.token_document(), layout.position_ids()  # [B, T]
    readable = torch.cat([layout.clean_position + 1, anchor], dim=1)  # clean tokens at positions below this are read
    device = layout.device

    if cache_length is None:
        if device.type == "cpu" and bool((layout.cached > 0).any()):
            raise LayoutError(
                "this layout continues a cache; build its mask with cache_length, the number of cache slots"
            )
        key_document, key_position = layout.clean_document, layout.clean_position
    else:
        if device.type == "cpu":
            _check_cache(layout, cache_length)
        key_position = torch.arange(cache_length, device=device).expand(layout.rows, -1)
        key_document = torch.zeros_like(key_position)
    same_document = (document[:, :, None] == key_document[:, None, :]) & (document >= 0)[:, :, None]
    to_clean = same_document & (key_position[:, None, :] < readable[:, :, None])

    block = layout.noisy_block
    same_block = (block[:, :, None] == block[:, None, :]) & (block >= 0)[:, :, None]
    earlier = layout.noisy_position[:, None, :] <= layout.noisy_position[:, :, None]
    to_noisy = torch.zeros(layout.rows, length, layout.noisy_length, dtype=torch.bool, device=device)
    to_noisy[:, clean:] = same_block & (whole_block[:, :, None] | earlier)

    mask = torch.cat([to_clean, to_noisy], dim=2)
    if window is not None:
        keys = torch.cat([key_position, layout.noisy_position], dim=1)
        mask &= keys[:, None, :] > position[:, :, None] - window

    own_key = torch.arange(length, device=device)
    if cache_length is not None:
        own_key = torch.where(own_key < clean, 0, own_key - clean + cache_length)
    padding = document < 0
    own = torch.nn.functional.one_hot(own_key, mask.shape[2]).to(torch.bool) if length else mask[0]
    return mask | (padding[:, :, None] & own)


def _check_cache(layout: Layout, cache_length: int) -> None:
    if bool((layout.clean_document > 0).any()) or bool((layout.block_document > 0).any()):
        raise LayoutError(
            "a layout that continues a cache may hold document 0 of each row only; split the other documents off"
        )
    needed = (
        int(torch.cat([(layout.clean_position + 1).amax(1), layout.cached]).amax())
        if layout.clean_length
        else int(layout.cached.amax())
    )
    if needed > cache_length:
        raise LayoutError(
            f"the layout needs {needed} cache slots, the cache has {cache_length}; allocate a longer cache"
        )
