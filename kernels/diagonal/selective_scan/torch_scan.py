"""Fast two-stream selective scan in PyTorch with a hand-written backward: a walk along the clean rows, chunk by chunk,
and side by side the blocks that start from the chunk's states. Any device.

Products of tokens, states and channels exist for one chunk or one panel of blocks at a time. What the backward keeps
beside the inputs is one state per row and chunk; it walks each chunk again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flarec.kernels.diagonal.pending import pending_rows
from flarec.kernels.diagonal.schedule import Panel, ScanSchedule
from flarec.kernels.diagonal.streams import Streams
from flarec.layout import Layout

from . import walk
from .reference import compute_dtype
from .walk import Tokens, Walk

COMMIT_ROWS = 32


def two_stream(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    schedule: ScanSchedule,
    *,
    initial_state: Tensor | None = None,
    frozen_clean: int | None = None,
) -> Tensor:
    """Output [B, T, C] in x's dtype; the same arguments and meaning as `reference`, with its layout's schedule.

    Differentiable (once) in x, dt, a, b, c and initial_state. Padding slots are never read and output 0; their
    gradients are 0. frozen_clean (clean slots per row): gradients are those through noisy tokens; the states that
    blocks start from are computed again, not kept.
    """
    dtype = compute_dtype(x, dt, a, b, c)
    operands = (operand.to(dtype) for operand in (x, dt, a, b, c))
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *a.shape, dtype=dtype)
    out: Tensor = _TwoStream.apply(*operands, initial_state.to(dtype), schedule, frozen_clean is not None)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


@torch.no_grad()
def commit(state: Tensor, x_rows: Tensor, dt_rows: Tensor, b_rows: Tensor, a: Tensor, accepted: Tensor) -> Tensor:
    """State [B, C, N] after the first accepted[r] rows; 0 rows change nothing. Later rows may hold anything.

    state [B, C, N]; x_rows, dt_rows [B, R, C], b_rows [B, R, N]; a [C, N]; accepted [B] int64, 0..R (R may be 0).
    Walks the rows one by one, so that the state does not depend on how they were divided into steps. No gradients.
    """
    dtype = compute_dtype(state)
    count = x_rows.shape[1]
    behind = (torch.arange(count, device=state.device)[:, None] >= accepted)[..., None]  # [R, B, 1]
    x, dt, b = (rows.to(dtype).transpose(0, 1).masked_fill(behind, 0) for rows in (x_rows, dt_rows, b_rows))
    current, decays = state.to(dtype).mT, a.to(dtype).t()
    for begin in range(0, count, COMMIT_ROWS):
        part = slice(begin, begin + COMMIT_ROWS)
        current = walk.forward(Tokens(x[part], dt[part], b[part], b[part]), decays, current).states[-1]
    return current.mT.clone(memory_format=torch.contiguous_format)


def step(
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
    schedule: ScanSchedule,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """(y, state, pending_x, pending_dt, pending_b): the arguments and meaning of `reference_step`."""
    state = commit(state, pending_x, pending_dt, pending_b, a, accepted)
    y = two_stream(x, dt, a, b, c, schedule, initial_state=state)
    return (y, state, *(pending_rows(rows, layout, state.dtype) for rows in (x, dt, b)))


class _TwoStream(torch.autograd.Function):
    """Inputs in one dtype; state [B, C, N]. Clean rows walk from chunk to chunk, panels beside them."""

    @staticmethod
    def forward(  # ctx is torch's own untyped object
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        initial_state: Tensor,
        schedule: ScanSchedule,
        frozen: bool,
    ) -> Tensor:
        streams = Streams((x, dt, b, c), schedule)
        decays = a.t().contiguous()
        out = streams.empty(x.shape[2])
        state = initial_state.mT
        entry = x.new_empty(schedule.chunks, *state.shape)
        for chunk in range(schedule.chunks):
            entry[chunk] = state
            tokens = Tokens(*streams.chunk(chunk))
            walked = walk.forward(tokens, decays, state, streams.resets(chunk))
            streams.put_chunk(out, chunk, walk.read(walked.states, tokens.c))
            for panel in schedule.panels[chunk]:
                mine, block = _walk_panel(streams, panel, decays, walked)
                read = walk.read if panel.causal else walk.read_end
                streams.put_panel(out, panel, read(block.states, mine.c))
            state = walked.states[-1]
        ctx.save_for_backward(x, dt, a, b, c, entry)
        ctx.schedule, ctx.frozen = schedule, frozen
        return streams.tokens(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, entry = ctx.saved_tensors
        schedule: ScanSchedule = ctx.schedule
        streams = Streams((x, dt, b, c), schedule)
        given = Streams((grad_out,), schedule)
        grads = [streams.empty(part.shape[2]) for part in (x, dt, b, c)]
        decays = a.t().contiguous()
        grad_decays = torch.zeros_like(decays)
        grad_state = torch.zeros_like(entry[0])
        for chunk in reversed(range(schedule.chunks)):
            if ctx.frozen and not schedule.panels[chunk]:
                continue
            tokens = Tokens(*streams.chunk(chunk))
            walked = walk.forward(tokens, decays, entry[chunk], streams.resets(chunk))
            if not ctx.frozen:
                (grad_y,) = given.chunk(chunk)
                grad_states, grad_c = walk.read_back(grad_y, walked.states, tokens.c)
                grad_states[-1] += grad_state
            for panel in schedule.panels[chunk]:
                (grad_y,) = given.panel(panel)
                found, panel_c = _panel_back(streams, panel, decays, walked, grad_y)
                grad_decays += found.a
                if not (panel.fresh or ctx.frozen):
                    grad_states.flatten(0, 1).index_add_(0, streams.entries(panel), found.first)
                for flat, part in zip(grads, (found.x, found.dt, found.b, panel_c), strict=True):
                    streams.put_panel(flat, panel, part)
            if ctx.frozen:
                continue
            found = walk.backward(grad_states, tokens, decays, walked)
            grad_decays += found.a
            grad_state = found.first
            for flat, part in zip(grads, (found.x, found.dt, found.b, grad_c), strict=True):
                streams.put_chunk(flat, chunk, part)
        grad_x, grad_dt, grad_b, grad_c = (streams.tokens(flat) for flat in grads)
        return grad_x, grad_dt, grad_decays.t(), grad_b, grad_c, grad_state.mT, None, None


def _walk_panel(streams: Streams, panel: Panel, decays: Tensor, clean: Walk) -> tuple[Tokens, Walk]:
    tokens = Tokens(*streams.panel(panel))
    if panel.fresh:
        first = clean.states.new_zeros(panel.end - panel.begin, *decays.shape)
    else:
        first = clean.states.flatten(0, 1).index_select(0, streams.entries(panel))
    return tokens, walk.forward(tokens, decays, first)


def _panel_back(
    streams: Streams, panel: Panel, decays: Tensor, clean: Walk, grad_y: Tensor
) -> tuple[walk.Gradients, Tensor]:
    """(gradients of the panel's walk, gradient of its c)."""
    tokens, block = _walk_panel(streams, panel, decays, clean)
    back = walk.read_back if panel.causal else walk.read_end_back
    grad_states, grad_c = back(grad_y, block.states, tokens.c)
    return walk.backward(grad_states, tokens, decays, block), grad_c
