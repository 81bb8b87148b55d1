"""Softmax attention over a layout, as a loop over tokens: the specification (docs/semantics.md sections 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.layout import BLOCK_END, PADDING, Layout


def visible_keys(layout: Layout, row: int, slot: int, window: int | None, cache_length: int) -> list[int]:
    """Keys that the token in `slot` of `row` reads, as indices into the axis [cache slots | clean slots | noisy
    slots]."""
    clean_document = layout.clean_document[row].tolist()
    clean_position = layout.clean_position[row].tolist()
    noisy_block = layout.noisy_block[row].tolist()
    noisy_position = layout.noisy_position[row].tolist()
    if slot < layout.clean_length:
        document, position = clean_document[slot], clean_position[slot]
        readable = position + 1  # clean tokens at positions below this
    else:
        block, position = noisy_block[slot - layout.clean_length], noisy_position[slot - layout.clean_length]
        if block == PADDING:
            return []
        document, readable = int(layout.block_document[row, block]), int(layout.block_anchor[row, block])
    if document == PADDING:
        return []

    keys = []  # (index, position)
    if document == 0:
        keys += [(j, j) for j in range(min(int(layout.cached[row]), readable))]
    for j, (key_document, key_position) in enumerate(zip(clean_document, clean_position, strict=True)):
        if key_document == document and key_position < readable:
            keys.append((cache_length + j, key_position))
    if slot >= layout.clean_length:
        whole_block = int(layout.block_readout[row, block]) == BLOCK_END
        for j, (key_block, key_position) in enumerate(zip(noisy_block, noisy_position, strict=True)):
            if key_block == block and (whole_block or key_position <= position):
                keys.append((cache_length + layout.clean_length + j, key_position))
    return [index for index, key_position in keys if window is None or key_position > position - window]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
) -> Tensor:
    """Attention output [B, T, H, Dv]; padding slots are 0.

    q [B, H, T, Dqk], k [B, Hkv, T, Dqk], v [B, Hkv, T, Dv]; H % Hkv == 0, head h reads key head h // (H // Hkv).
    k_cache, v_cache [B, Hkv, M, D]: slot j holds document 0's clean token at position j, for j < layout.cached.
    window: a key is read only if its position > query position - window. softcap: scores become softcap * tanh(s /
    softcap). Computes in float32, or float64 for float64 inputs, and returns q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    cache_length = 0 if k_cache is None else k_cache.shape[2]
    if k_cache is not None and v_cache is not None:
        k, v = torch.cat([k_cache.to(k.dtype), k], dim=2), torch.cat([v_cache.to(v.dtype), v], dim=2)
    rows = []
    for row in range(layout.rows):
        outputs = []
        for slot in range(layout.length):
            keys = visible_keys(layout, row, slot, window, cache_length)
            if not keys:
                outputs.append(torch.zeros(q.shape[1], v.shape[3], dtype=dtype, device=q.device))
                continue
            key = k[row, :, keys].to(dtype).repeat_interleave(group, dim=0)  # [H, keys, Dqk]
            value = v[row, :, keys].to(dtype).repeat_interleave(group, dim=0)
            scores = scale * torch.einsum("hd,hjd->hj", q[row, :, slot].to(dtype), key)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            outputs.append(torch.einsum("hj,hjd->hd", scores.softmax(dim=1), value))
        rows.append(torch.stack(outputs))
    return torch.stack(rows).to(q.dtype)


def reference_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`reference` over the caches, which then take this step's clean keys and values at their positions, in place."""
    out = reference(q, k, v, layout, scale=scale, window=window, softcap=softcap, k_cache=k_cache, v_cache=v_cache)
    for row in range(layout.rows):
        for slot in range(layout.clean_length):
            if int(layout.clean_document[row, slot]) == PADDING:
                continue
            position = int(layout.clean_position[row, slot])
            k_cache[row, :, position], v_cache[row, :, position] = k[row, :, slot], v[row, :, slot]
    return out
