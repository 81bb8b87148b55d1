"""Softmax attention through PyTorch's scaled_dot_product_attention, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flarec.layout import Layout


def two_stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    real: Tensor | None = None,
    frozen_clean: int | None = None,
) -> Tensor:
    """Attention output [B, T, H, Dv] in q's dtype. q [B, H, T, Dqk], k [B, Hkv, S, Dqk], v [B, Hkv, S, Dv], mask [B,
    T, S].

    `mask` comes from `visibility`. `real` [B, T] bool (`layout.token_document() >= 0`, S = T) zeroes q, k and v on
    padding slots first and the output there last; without it padding must hold finite numbers (0 * NaN is NaN in
    every softmax kernel), and its output is finite but meaningless. `frozen_clean` (clean slots per row, S = T): only
    noisy queries, keys and values take a gradient.
    """
    if real is not None:
        padding = ~real[:, None, :, None]
        q, k, v = q.masked_fill(padding, 0), k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    if frozen_clean is None:
        out = _attend(q, k, v, mask, scale, softcap).transpose(1, 2)
    else:
        out = _attend_apart(q, k, v, mask, scale, softcap, frozen_clean)
    return out if real is None else out.masked_fill(~real[:, :, None, None], 0)


def _attend_apart(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, clean: int
) -> Tensor:
    """[B, T, H, Dv] with clean queries apart: they read clean keys alone, and nothing is kept for their backward."""
    old = slice(None, clean)
    with torch.no_grad():
        first = _attend(q[:, :, old], k[:, :, old], v[:, :, old], mask[:, old, old], scale, softcap)
    if clean == mask.shape[1]:
        return first.transpose(1, 2)
    keys, values = (torch.cat([x[:, :, old].detach(), x[:, :, clean:]], dim=2) for x in (k, v))
    second = _attend(q[:, :, clean:], keys, values, mask[:, clean:], scale, softcap)
    return torch.cat([first, second], dim=2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[B, H, T, Dv]"""
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=grouped)
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    key, value = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = softcap * torch.tanh(scale / softcap * (q.to(dtype) @ key.mT))
    return (scores.masked_fill(~mask[:, None], float("-inf")).softmax(dim=-1) @ value).to(q.dtype)


@torch.no_grad()
def write_cache(k_cache: Tensor, k_clean: Tensor, positions: Tensor, valid: Tensor) -> None:
    """Write clean keys (or values) into the cache slots of their positions, in place; padding is never written.

    k_cache [B, Hkv, M, D], k_clean [B, Hkv, Lc, D], positions [B, Lc] int64, valid [B, Lc] bool with padding last.
    No host synchronisation: a padding slot repeats its row's last valid write; a row without any rewrites what is
    there.
    """
    rows, heads, length, dim = k_clean.shape
    if length == 0:
        return
    last = (valid.sum(dim=1, keepdim=True) - 1).clamp_min(0)
    source = torch.minimum(torch.arange(length, device=positions.device)[None], last)  # [B, Lc]
    slot = positions.gather(1, source).where(valid[:, :1], 0)

    def spread(index: Tensor) -> Tensor:
        return index[:, None, :, None].expand(rows, heads, length, dim)

    values = k_clean.to(k_cache.dtype).gather(2, spread(source))
    values = torch.where(valid[:, :1, None, None], values, k_cache.gather(2, spread(slot)))
    k_cache.scatter_(2, spread(slot), values)


def cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Write the layout's clean keys and values into the caches (in place), then attend to [cache | noisy]: [B, T, H,
    Dv].

    q [B, H, T, Dqk], k [B, Hkv, T, Dqk], v [B, Hkv, T, Dv]; caches [B, Hkv, M, D], allocated with finite numbers
    (zeros); mask [B, T, M + Ln] from `visibility(layout, window, cache_length=M)`. Noisy keys and values are never
    stored. Padding slots may hold anything, NaN included, and output 0.
    """
    clean, real = layout.clean_length, layout.token_document() >= 0
    for cache, new in ((k_cache, k), (v_cache, v)):
        write_cache(cache, new[:, :, :clean], layout.clean_position, real[:, :clean])
    hidden = ~real[:, None, :, None]
    keys = torch.cat([k_cache.to(k.dtype), k[:, :, clean:].masked_fill(hidden[:, :, clean:], 0)], dim=2)
    values = torch.cat([v_cache.to(v.dtype), v[:, :, clean:].masked_fill(hidden[:, :, clean:], 0)], dim=2)
    out = _attend(q.masked_fill(hidden, 0), keys, values, mask, scale, softcap)
    return out.transpose(1, 2).masked_fill(~real[:, :, None, None], 0)
