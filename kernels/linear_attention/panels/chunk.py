"""Fast two-stream linear attention in PyTorch: chunk-parallel WY form with a hand-written backward. Any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flarec.base.flat import save_structure, saved_structure

from ..reference import l2_normalise
from . import clean as clean_chunks
from . import noisy as noisy_panels
from .rows import (
    Gathered,
    PanelRows,
    gather,
    scatter,
    scatter_noisy,
    split_rows,
    take_noisy,
    undo_normalise,
)
from .schedule import StateSchedule


def two_stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    schedule: StateSchedule,
    *,
    scale: float,
    delta: bool,
    l2norm: bool,
    initial_state: Tensor | None = None,
    frozen_clean: int | None = None,
) -> Tensor:
    """Output [B, T, H, V] in q's dtype; the same arguments and meaning as `reference`, with its layout's schedule.

    Differentiable (once) in q, k, v, g, beta and initial_state. Padding slots are never read and output 0; their
    gradients are 0. Log decays must be finite. frozen_clean (clean slots per row): gradients of clean tokens are 0;
    of the clean stream, only the keys, values and states that noisy rows read are kept.
    """
    dtype = _compute_dtype(q, v, initial_state)
    inputs = (_cast(x, dtype) for x in (q, k, v, g, beta, initial_state))
    function = _FrozenClean if frozen_clean is not None else _TwoStream
    out: Tensor = function.apply(*inputs, schedule, scale, delta, l2norm)  # type: ignore[no-untyped-call]
    return out.to(q.dtype)


@torch.no_grad()
def two_stream_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    schedule: StateSchedule,
    *,
    scale: float,
    delta: bool,
    l2norm: bool,
    initial_state: Tensor | None,
    clean_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`two_stream` without gradients, and what a later `commit` needs of the clean slots (0 on padding):

    out [B, T, H, V]; k_rows [B, Lc, Hk, K] keys as the state sees them (normalised); d_rows [B, Lc, H, V] corrected
    values; g_rows [B, Lc, H] or [B, Lc, H, K] log decays, None without a gate. All rows in float32 (float64 for
    float64 inputs).
    """
    dtype = _compute_dtype(q, v, initial_state)
    out_dtype = q.dtype
    q, k, v, beta = q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype)
    g, state = _cast(g, dtype), _cast(initial_state, dtype)
    rows = gather(q, k, v, g, beta, schedule, l2norm=l2norm)
    clean_out, noisy_out, chunks, _ = _forward(rows, schedule, scale, delta, state)
    out = scatter(clean_out, noisy_out, schedule)
    corrected = scatter(chunks.corrected, torch.zeros_like(noisy_out), schedule)[:, :clean_length]
    padding = schedule.token_padding.view(schedule.rows, schedule.length, 1)[:, :clean_length]
    k_rows = k[:, :clean_length].masked_fill(padding[..., None], 0)
    if l2norm:
        k_rows = l2_normalise(k_rows)
    g_rows = None
    if g is not None:
        g_rows = g[:, :clean_length]
        g_rows = g_rows.masked_fill(padding if g_rows.ndim == 3 else padding[..., None], 0)
    return out.to(out_dtype), k_rows, corrected, g_rows


def _compute_dtype(q: Tensor, v: Tensor, initial_state: Tensor | None) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _forward(
    rows: Gathered, schedule: StateSchedule, scale: float, delta: bool, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, clean_chunks.CleanChunks, noisy_panels.NoisyPanels | None]:
    chunks = clean_chunks.forward(rows.clean, schedule, delta=delta, initial_state=initial_state)
    clean_out = clean_chunks.outputs(rows.clean, chunks, scale)
    if schedule.panels == 0:
        return clean_out, torch.zeros_like(rows.noisy.v), chunks, None
    noisy_out, panels = noisy_panels.forward(rows.noisy, rows.clean, chunks, schedule, delta=delta, scale=scale)
    return clean_out, noisy_out, chunks, panels


class _TwoStream(torch.autograd.Function):
    """Gather rows, run chunks and panels, scatter outputs; the backward mirrors it, noisy panels first."""

    @staticmethod
    def forward(  # ctx is torch's own untyped object
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        initial_state: Tensor | None,
        schedule: StateSchedule,
        scale: float,
        delta: bool,
        l2norm: bool,
    ) -> Tensor:
        rows = gather(q, k, v, g, beta, schedule, l2norm=l2norm)
        clean_out, noisy_out, chunks, panels = _forward(rows, schedule, scale, delta, initial_state)
        save_structure(ctx, (rows, chunks, panels))
        ctx.schedule, ctx.scale = schedule, scale
        ctx.key_heads = k.shape[2]
        ctx.gate_dims = 0 if g is None else g.ndim
        ctx.rows_of_state = None if initial_state is None else initial_state.shape[0]
        return scatter(clean_out, noisy_out, schedule)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, chunks, panels = saved_structure(ctx)
        schedule, scale = ctx.schedule, ctx.scale
        heads, key_heads = grad_out.shape[2], ctx.key_heads
        index = schedule.heads(heads, key_heads)
        taken = grad_out.reshape(-1, grad_out.shape[-1]).index_select(0, index.value)
        if schedule.rows_padded:
            taken.index_fill_(0, index.padding, 0)
        clean_grad, noisy_grad = split_rows(taken, schedule, heads)
        shared = None
        noisy = rows.noisy  # stands for the gradients of zero rows
        if panels is not None:
            noisy, shared = noisy_panels.backward(noisy_grad, rows.noisy, panels, schedule, scale=scale)
        clean, starts = clean_chunks.backward(clean_grad, rows.clean, chunks, shared, schedule, scale=scale)

        def raw(grads: tuple[Tensor, Tensor], units: tuple[Tensor, Tensor], norm: Tensor | None) -> Tensor:
            if norm is not None:
                norms = split_rows(norm, schedule, heads)
                grads = (undo_normalise(grads[0], units[0], norms[0]), undo_normalise(grads[1], units[1], norms[1]))
            return scatter(*grads, schedule, key_heads)

        grad_q = raw((clean.q, noisy.q), (rows.clean.q, rows.noisy.q), rows.q_norm)
        grad_k = raw((clean.k, noisy.k), (rows.clean.k, rows.noisy.k), rows.k_norm)
        grad_v = scatter(clean.v, noisy.v, schedule)
        grad_beta = scatter(clean.beta, noisy.beta, schedule).squeeze(-1)
        grad_g = None
        if ctx.gate_dims:
            grad_g = scatter(clean.g, noisy.g, schedule)
            grad_g = grad_g.squeeze(-1) if ctx.gate_dims == 3 else grad_g
        grad_state = None
        if ctx.rows_of_state is not None:
            grad_state = starts.new_zeros(ctx.rows_of_state, *starts.shape[1:])
            grad_state.index_copy_(0, schedule.first_row, starts.index_select(0, schedule.first_chunk))
        return grad_q, grad_k, grad_v, grad_g, grad_beta, grad_state, None, None, None, None


class _FrozenClean(torch.autograd.Function):
    """As `_TwoStream`, with a backward over noisy panels alone."""

    @staticmethod
    def forward(  # ctx is torch's own untyped object
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        initial_state: Tensor | None,
        schedule: StateSchedule,
        scale: float,
        delta: bool,
        l2norm: bool,
    ) -> Tensor:
        rows = gather(q, k, v, g, beta, schedule, l2norm=l2norm)
        clean_out, noisy_out, _, panels = _forward(rows, schedule, scale, delta, initial_state)
        own = rows.noisy  # copies: views would keep the clean rows alive
        kept = PanelRows(*(x.clone() for x in (own.q, own.k, own.v, own.g, own.beta)))
        norms = tuple(
            None if x is None else split_rows(x, schedule, v.shape[2])[1].clone() for x in (rows.q_norm, rows.k_norm)
        )
        save_structure(ctx, (kept, norms, panels))
        ctx.schedule, ctx.scale = schedule, scale
        ctx.key_heads = k.shape[2]
        ctx.gate_dims = 0 if g is None else g.ndim
        return scatter(clean_out, noisy_out, schedule)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, (q_norm, k_norm), panels = saved_structure(ctx)
        schedule, scale = ctx.schedule, ctx.scale
        found = rows  # of no rows
        if panels is not None:
            grad = take_noisy(grad_out, schedule)
            found, _ = noisy_panels.backward(grad, rows, panels, schedule, scale=scale, frozen=True)

        def raw(grad: Tensor, unit: Tensor, norm: Tensor | None) -> Tensor:
            grad = grad if norm is None else undo_normalise(grad, unit, norm)
            return scatter_noisy(grad, schedule, ctx.key_heads)

        grad_g = scatter_noisy(found.g, schedule) if ctx.gate_dims else None
        return (
            raw(found.q, rows.q, q_norm), raw(found.k, rows.k, k_norm), scatter_noisy(found.v, schedule),
            grad_g.squeeze(-1) if grad_g is not None and ctx.gate_dims == 3 else grad_g,
            scatter_noisy(found.beta, schedule).squeeze(-1), None, None, None, None, None,
        )
