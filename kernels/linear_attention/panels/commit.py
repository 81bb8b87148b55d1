"""Commit: apply the accepted clean rows of a step to the state (docs/semantics.md section 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def commit(state: Tensor, k_rows: Tensor, d_rows: Tensor, g_rows: Tensor | None, accepted: Tensor) -> Tensor:
    """State [B, H, K, V] after the first accepted[b] rows; 0 rows change nothing. Later rows may hold anything.

    state [B, H, K, V]; k_rows [B, R, Hk, K] keys, d_rows [B, R, H, V] corrected values, g_rows None, [B, R, H] or
    [B, R, H, K] log decays, as `two_stream_step` returns them; accepted [B] int64, 0..R (R may be 0).

        exp(sum_{i < r} g_i) S + sum_{j < r} exp(sum_{j < i < r} g_i) k_j d_j^T,  r = accepted

    The inner sums are suffix sums, not differences of sums from the start: rows near the end, which matter most after
    a long prefill, keep full accuracy. Computes in float32 (float64 if the state is); returns that dtype.
    """
    dtype = torch.promote_types(state.dtype, torch.float32)
    state = state.to(dtype)
    length, group = d_rows.shape[1], d_rows.shape[2] // k_rows.shape[2]
    if length == 0:  # a prompt begins
        return state.clone()
    behind = (torch.arange(length, device=state.device) >= accepted[:, None])[:, :, None, None]  # [B, R, 1, 1]
    k = k_rows.to(dtype).masked_fill(behind, 0).repeat_interleave(group, dim=2).transpose(1, 2)  # [B, H, R, K]
    d = d_rows.to(dtype).masked_fill(behind, 0).transpose(1, 2)
    if g_rows is not None:
        g = (g_rows[..., None] if g_rows.ndim == 3 else g_rows).to(dtype).masked_fill(behind, 0).transpose(1, 2)
        # from_row[j] = sum over i >= j of g_i, j = 0..R, so that from_row[j + 1] is row j's own suffix
        from_row = torch.cat(
            [g, torch.zeros_like(g[:, :, :1])], 2
        )
        from_row = from_row.flip(2).cumsum(dim=2).flip(2)
        k = k * from_row[:, :, 1:].exp()
        state = (state * from_row[:, :, 0, :, None].exp()).contiguous()
    else:
        state = state.clone(memory_format=torch.contiguous_format)
    # one pass over the state, not three; `flatten` would copy a state in another memory order, and the rows be lost
    state.flatten(0, 1).baddbmm_(k.mT.flatten(0, 1), d.flatten(0, 1))
    return state
