"""Fast two-stream gated recurrence in PyTorch with a hand-written backward: a walk along the clean rows, then one along
all blocks side by side. Any device.

A state is as large as one token, so all of them are kept: the clean ones are the output itself. The walk takes one
fused multiply-add per token over rows x channels; a scan in fewer, wider steps multiplies the decays too, and wins only
where a step is too small to matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flarec.kernels.diagonal.pending import pending_rows
from flarec.kernels.diagonal.schedule import Panel, ScanSchedule
from flarec.kernels.diagonal.streams import Streams
from flarec.layout import Layout

from .reference import compute_dtype

NEUTRAL = (0.0, 1.0)  # x and a of a token that changes nothing


def two_stream(
    x: Tensor,
    a: Tensor,
    schedule: ScanSchedule,
    *,
    initial_state: Tensor | None = None,
    frozen_clean: int | None = None,
) -> Tensor:
    """Output [B, T, C] in x's dtype; the same arguments and meaning as `reference`, with its layout's schedule, which
    must be one chunk (`chunk_size=None`).

    Differentiable (once) in x, a and initial_state. Padding slots are never read and output 0; their gradients are 0.
    frozen_clean (clean slots per row): gradients of clean tokens are 0.
    """
    assert schedule.chunks == 1, "a gated recurrence walks the row in one chunk"
    dtype = compute_dtype(x, a)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype)
    inputs = x.to(dtype), a.to(dtype), initial_state.to(dtype)
    out: Tensor = _TwoStream.apply(*inputs, schedule, frozen_clean is not None)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


@torch.no_grad()
def commit(state: Tensor, x_rows: Tensor, a_rows: Tensor, accepted: Tensor) -> Tensor:
    """State [B, C] after the first accepted[r] rows; 0 rows change nothing. Later rows may hold anything.

    state [B, C]; x_rows, a_rows [B, R, C]; accepted [B] int64, 0..R (R may be 0). Walks the rows one by one, so that
    the state does not depend on how they were divided into steps. No gradients.
    """
    dtype = compute_dtype(state)
    count = x_rows.shape[1]
    behind = (torch.arange(count, device=state.device)[:, None] >= accepted)[..., None]  # [R, B, 1]
    x, a = x_rows.to(dtype).transpose(0, 1), a_rows.to(dtype).transpose(0, 1)
    return walk(x.masked_fill(behind, 0), a.masked_fill(behind, 1), state.to(dtype))[-1].clone()


def step(
    x: Tensor,
    a: Tensor,
    state: Tensor,
    pending_x: Tensor,
    pending_a: Tensor,
    accepted: Tensor,
    schedule: ScanSchedule,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """(y, state, pending_x, pending_a): the arguments and meaning of `reference_step`."""
    state = commit(state, pending_x, pending_a, accepted)
    y = two_stream(x, a, schedule, initial_state=state)
    return (y, state, *(pending_rows(rows, layout, state.dtype) for rows in (x, a)))


def walk(x: Tensor, a: Tensor, first: Tensor) -> Tensor:
    """States [T + 1, R, C] of R independent rows: first [R, C], then after each token; x, a [T, R, C]."""
    states = first.new_empty(x.shape[0] + 1, *first.shape)
    states[0] = before = first
    states[1:] = x
    for now, decay in zip(states[1:].unbind(), a.unbind(), strict=True):
        before = now.addcmul_(decay, before)
    return states


def walk_back(grad_states: Tensor, a: Tensor) -> Tensor:
    """The adjoint of `walk`, in place: the gradient of each state [T + 1, R, C] with what later states pass back.

    Behind it, grad_states[0] is that of the first state, grad_states[1:] that of x, and times the states before that of
    a.
    """
    after = grad_states[-1]
    for now, decay in zip(reversed(grad_states[:-1].unbind()), reversed(a.unbind()), strict=True):
        after = now.addcmul_(decay, after)
    return grad_states


class _TwoStream(torch.autograd.Function):
    """Inputs in one dtype; state [B, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, initial_state: Tensor, schedule: ScanSchedule, frozen: bool) -> Tensor:
        streams = Streams((x, a), schedule)
        clean_x, clean_a = _clean(streams)
        states = walk(clean_x, clean_a, initial_state)
        out = streams.empty(x.shape[2])
        streams.put_chunk(out, 0, states[1:])
        for panel in schedule.panels[0]:
            block_x, block_a = streams.panel(panel, fills=NEUTRAL)
            block = walk(block_x, block_a, _first(streams, panel, states))
            streams.put_panel(out, panel, block[1:] if panel.causal else block[-1].expand_as(block[1:]))
        ctx.save_for_backward(x, a, states)
        ctx.schedule, ctx.frozen = schedule, frozen
        return streams.tokens(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, a, states = ctx.saved_tensors
        schedule: ScanSchedule = ctx.schedule
        streams, given = Streams((x, a), schedule), Streams((grad_out,), schedule)
        grad_x, grad_a = streams.empty(x.shape[2]), streams.empty(x.shape[2])
        grad_states = torch.zeros_like(states)
        if not ctx.frozen:
            (grad_states[1:],) = given.chunk(0)
        for panel in schedule.panels[0]:
            block_x, block_a = streams.panel(panel, fills=NEUTRAL)
            block = walk(block_x, block_a, _first(streams, panel, states))
            grad_block = torch.zeros_like(block)
            (grad_y,) = given.panel(panel)
            if panel.causal:
                grad_block[1:] = grad_y
            else:
                grad_block[-1] = grad_y.sum(dim=0)
            walk_back(grad_block, block_a)
            streams.put_panel(grad_x, panel, grad_block[1:])
            streams.put_panel(grad_a, panel, grad_block[1:] * block[:-1])
            if not (panel.fresh or ctx.frozen):
                grad_states.flatten(0, 1).index_add_(0, streams.entries(panel), grad_block[0])
        if ctx.frozen:
            return streams.tokens(grad_x), streams.tokens(grad_a), None, None, None
        _, clean_a = _clean(streams)
        walk_back(grad_states, clean_a)
        grad_decay = grad_states[1:] * states[:-1]
        resets = streams.resets(0)
        if resets is not None:
            grad_decay[resets] = 0
        streams.put_chunk(grad_x, 0, grad_states[1:])
        streams.put_chunk(grad_a, 0, grad_decay)
        return streams.tokens(grad_x), streams.tokens(grad_a), grad_states[0], None, None


def _clean(streams: Streams) -> tuple[Tensor, Tensor]:
    """x, a [Lc, B, C]; a document starts by forgetting."""
    x, a = streams.chunk(0)
    resets = streams.resets(0)
    return x, a if resets is None else a.index_put(resets, a.new_zeros(()))


def _first(streams: Streams, panel: Panel, states: Tensor) -> Tensor:
    """[n, C] states that the panel's blocks start from."""
    if panel.fresh:
        return states.new_zeros(panel.end - panel.begin, states.shape[2])
    return states.flatten(0, 1).index_select(0, streams.entries(panel))
