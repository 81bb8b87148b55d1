"""A decode step with its deferred commit, as loops: the specification of `panels.commit` and of the pending rows.

A step keeps, for every clean row, its key, its corrected value D = beta (v - [delta] S'^T k) and its log decay. The
state after the first r rows is then a walk over r outer products (docs/kernels.md, "Decode").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flarec.layout import PADDING, Layout

from .reference import l2_normalise, reference, update


def reference_rows(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    layout: Layout,
    *,
    delta: bool,
    l2norm: bool,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(k_rows [B, Lc, Hk, K], d_rows [B, Lc, H, V], g_rows [B, Lc, H(, K)] or None) of the clean slots of document 0.

    Arguments as in `reference`; initial_state [B, H, K, V]. Padding slots hold zeros. float32, or float64 if any input
    is.
    """
    dtype = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
    clean, group = layout.clean_length, v.shape[2] // k.shape[2]
    keys = k[:, :clean].to(dtype)
    keys = l2_normalise(keys) if l2norm else keys
    real = layout.clean_document != PADDING
    k_rows = keys.masked_fill(~real[:, :, None, None], 0)
    g_rows = None
    if g is not None:
        g_rows = g[:, :clean].to(dtype).masked_fill(~real.reshape(*real.shape, *[1] * (g.ndim - 2)), 0)
    d_rows = torch.zeros(k.shape[0], clean, *v.shape[2:], dtype=dtype, device=v.device)
    for row in range(layout.rows):
        state = initial_state[row].to(dtype)
        for slot in range(clean):
            if not real[row, slot]:
                break
            key = keys[row, slot].repeat_interleave(group, dim=0)
            gate = None if g_rows is None else g_rows[row, slot]
            value, weight = v[row, slot].to(dtype), beta[row, slot].to(dtype)
            if delta:
                decayed = state
                if gate is not None:
                    decayed = state * (gate[:, None, None] if gate.ndim == 1 else gate[:, :, None]).exp()
                value = value - torch.einsum("hkv,hk->hv", decayed, key)
            d_rows[row, slot] = weight[:, None] * value
            state = update(state, key, v[row, slot].to(dtype), gate, weight, delta)
    return k_rows, d_rows, g_rows


def reference_commit(state: Tensor, k_rows: Tensor, d_rows: Tensor, g_rows: Tensor | None, accepted: Tensor) -> Tensor:
    """State [B, H, K, V] after the first `accepted[b]` rows; 0 keeps the state. Shapes as in `reference_rows`."""
    group = d_rows.shape[2] // k_rows.shape[2]
    result = []
    for row in range(state.shape[0]):
        current = state[row]
        for slot in range(int(accepted[row])):
            if g_rows is not None:
                gate = g_rows[row, slot]
                current = current * (gate[:, None, None] if gate.ndim == 1 else gate[:, :, None]).exp()
            key = k_rows[row, slot].repeat_interleave(group, dim=0)
            current = current + torch.einsum("hk,hv->hkv", key, d_rows[row, slot])
        result.append(current)
    return torch.stack(result)


def reference_step(
    *,
    state: Tensor,
    pending_k: Tensor,
    pending_d: Tensor,
    pending_g: Tensor | None = None,
    accepted: Tensor,
    layout: Layout,
    **operands: Any,
) -> tuple[Tensor, ...]:
    """Commit the accepted pending rows, run from that state, and leave this step's clean rows pending.

    operands: those of `reference`, by name. state [B, H, K, V] float32; pending_k [B, R, Hk, K], pending_d [B, R, H,
    V], pending_g [B, R, H(, K)], None without a gate; accepted [B] int64, 0..R.
    Returns (o [B, T, H, V], state, pending_k, pending_d[, pending_g]). Noisy tokens never change the state.
    """
    state = reference_commit(state, pending_k, pending_d, pending_g, accepted)
    out = reference(**operands, layout=layout, initial_state=state)
    rows = reference_rows(
        **{name: value for name, value in operands.items() if name not in ("q", "scale")},
        layout=layout,
        initial_state=state,
    )
    return (out, state, *(row for row in rows if row is not None))
