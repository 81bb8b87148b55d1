"""Two-stream and cached meaning of the semantic ops, as the graph's call targets after the stream passes.

Each function runs the reference over a layout: it is the definition that a lowered implementation must equal. `layout`
replaces "row of one document"; the cached forms read decode state and return the next one.

Shapes: B rows, T = Lc + Ln tokens (clean first), R pending rows, M cache slots; the rest as in `flarec.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels.diagonal.gated_recurrence.reference import reference as gated_recurrence_reference
from .kernels.diagonal.gated_recurrence.reference import reference_commit as gated_recurrence_commit
from .kernels.diagonal.selective_scan.reference import reference as selective_scan_reference
from .kernels.diagonal.selective_scan.reference import reference_commit as selective_scan_commit
from .kernels.linear_attention.reference import reference as linear_attention_reference
from .kernels.linear_attention.reference_step import reference_commit, reference_rows
from .kernels.short_conv.reference import reference as short_conv_reference
from .kernels.short_conv.torch_gather import commit_window, next_buffer
from .kernels.softmax_attention.reference import reference as softmax_attention_reference
from .kernels.softmax_attention.torch_sdpa import write_cache
from .layout import PADDING, Layout


def two_stream_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """q [B,H,T,Dqk], k [B,Hkv,T,Dqk], v [B,Hkv,T,Dv] -> [B,T,H,Dv], visibility of docs/semantics.md section 1."""
    return softmax_attention_reference(q, k, v, layout, scale=scale, window=window, softcap=softcap)


def two_stream_short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, activation: str | None
) -> Tensor:
    """x [B,C,T], weight [C,W] -> [B,C,T]; a noisy token reads its own block, then clean tokens before the anchor."""
    return short_conv_reference(x, weight, bias, layout, activation=activation)


def two_stream_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    layout: Layout,
    scale: float,
    delta: bool,
    l2norm: bool,
) -> Tensor:
    """q,k [B,T,Hk,K], v [B,T,H,V], g [B,T,H(,K)], beta [B,T,H] -> [B,T,H,V]."""
    return linear_attention_reference(q, k, v, g, beta, layout, scale=scale, delta=delta, l2norm=l2norm)


def two_stream_selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, layout: Layout) -> Tensor:
    """x, dt [B,T,C], a [C,N], b, c [B,T,N] -> [B,T,C]; a block starts from the clean state at its anchor."""
    return selective_scan_reference(x, dt, a, b, c, layout)


def two_stream_gated_recurrence(x: Tensor, a: Tensor, layout: Layout) -> Tensor:
    """x, a [B,T,C] -> [B,T,C]; a block starts from the clean state at its anchor."""
    return gated_recurrence_reference(x, a, layout)


def cached_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """As two-stream, with cached clean keys and values [B,Hkv,M,D]; this step's clean ones are written in place."""
    out = softmax_attention_reference(
        q, k, v, layout, scale=scale, window=window, softcap=softcap, k_cache=k_cache, v_cache=v_cache
    )
    clean = layout.clean_length
    for cache, rows in ((k_cache, k), (v_cache, v)):
        write_cache(cache, rows[:, :, :clean], layout.clean_position, layout.clean_document >= 0)
    return out


def cached_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffer: Tensor,
    accepted: Tensor,
    layout: Layout,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """buffer [B,C,W-1+R]: raw inputs before and in the previous step's clean rows -> (y [B,C,T], next buffer)."""
    window = commit_window(buffer, accepted, weight.shape[-1])
    y = short_conv_reference(x, weight, bias, layout, activation=activation, window=window)
    return y, next_buffer(x, window, layout.clean_length)


def cached_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    pending_k: Tensor,
    pending_d: Tensor,
    pending_g: Tensor | None,
    accepted: Tensor,
    layout: Layout,
    scale: float,
    delta: bool,
    l2norm: bool,
) -> tuple[Tensor, ...]:
    """Commit the accepted pending rows, run from that state, and leave this step's clean rows pending.

    state [B,H,K,V] float32; pending_k [B,R,Hk,K], pending_d [B,R,H,V], pending_g [B,R,H(,K)]; accepted [B].
    Returns (o [B,T,H,V], state, pending_k, pending_d[, pending_g]). Noisy tokens never change the state.
    """
    state = reference_commit(state, pending_k, pending_d, pending_g, accepted)
    options = {"scale": scale, "delta": delta, "l2norm": l2norm}
    out = linear_attention_reference(q, k, v, g, beta, layout, initial_state=state, **options)  # type: ignore[arg-type]
    rows = reference_rows(k, v, g, beta, layout, delta=delta, l2norm=l2norm, initial_state=state)
    return (out, state, *(row for row in rows if row is not None))


def cached_selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    pending_x: Tensor,
    pending_dt: Tensor,
    pending_b: Tensor,
    accepted: Tensor,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Commit the accepted pending rows, run from that state, and leave this step's clean rows pending.

    state [B,C,N] float32; pending_x, pending_dt [B,R,C], pending_b [B,R,N]; accepted [B].
    Returns (y [B,T,C], state, pending_x, pending_dt, pending_b). Noisy tokens never change the state.
    """
    state = selective_scan_commit(state, pending_x, pending_dt, pending_b, a, accepted)
    y = selective_scan_reference(x, dt, a, b, c, layout, initial_state=state)
    return (y, state, *(pending_rows(rows, layout, state.dtype) for rows in (x, dt, b)))


def cached_gated_recurrence(
    x: Tensor, a: Tensor, state: Tensor, pending_x: Tensor, pending_a: Tensor, accepted: Tensor, layout: Layout
) -> tuple[Tensor, ...]:
    """As `cached_selective_scan`: state [B,C] float32, pending_x, pending_a [B,R,C] -> (y, state, pending_x,
    pending_a)."""
    state = gated_recurrence_commit(state, pending_x, pending_a, accepted)
    y = gated_recurrence_reference(x, a, layout, initial_state=state)
    return (y, state, *(pending_rows(rows, layout, state.dtype) for rows in (x, a)))


def pending_rows(rows: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The clean slots of rows [B,T,D], [B,Lc,D] in `dtype`; padding slots hold 0."""
    padding = layout.clean_document == PADDING
    return rows[:, : layout.clean_length].to(dtype).masked_fill(padding[:, :, None], 0)


CACHED: dict[object, Callable[..., Any]] = {
    two_stream_softmax_attention: cached_softmax_attention,
    two_stream_short_conv: cached_short_conv,
    two_stream_linear_attention: cached_linear_attention,
    two_stream_selective_scan: cached_selective_scan,
    two_stream_gated_recurrence: cached_gated_recurrence,
}


def is_stream_op(target: object) -> bool:
    """True for a semantic op that reads a layout (not yet lowered)."""
    return target in CACHED or target in CACHED.values()


def clean_state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Recurrent states are float32 at least: a bf16 state costs 1-48 % (docs/kernels.md)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
