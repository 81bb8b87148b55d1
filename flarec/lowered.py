"""Lowered mixers for `--kernels torch`: what the graph calls after `lower-mixers(implementation='torch')`. Those that
have no Triton form serve `--kernels triton` too.

Thin calls of `flarec.kernels` with the operands in graph order. Shapes as in `flarec.stream_ops`; `mask`, `windows` and
`schedule` are derived from the layout once per batch (`flarec.derive`).
"""

from __future__ import annotations

from torch import Tensor

from .kernels.diagonal.gated_recurrence import torch_walk
from .kernels.diagonal.schedule import ScanSchedule
from .kernels.diagonal.selective_scan import torch_scan
from .kernels.linear_attention.panels import chunk
from .kernels.linear_attention.panels.commit import commit
from .kernels.linear_attention.panels.schedule import StateSchedule
from .kernels.moe_experts import torch_grouped
from .kernels.short_conv import torch_gather
from .kernels.softmax_attention import torch_sdpa
from .layout import Layout
from .stream_ops import pending_rows


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The sliding window is part of the mask already."""
    return torch_sdpa.two_stream(q, k, v, mask, scale=scale, softcap=softcap)


def softmax_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return torch_sdpa.cached(q, k, v, k_cache, v_cache, mask, layout, scale=scale, softcap=softcap)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, activation: str | None) -> Tensor:
    return torch_gather.two_stream(x, weight, bias, windows, activation=activation)


def short_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffer: Tensor,
    accepted: Tensor,
    windows: Tensor,
    layout: Layout,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    window = torch_gather.commit_window(buffer, accepted, weight.shape[-1])
    y = torch_gather.two_stream(x, weight, bias, windows, activation=activation, window=window)
    return y, torch_gather.next_buffer(x, window, layout.clean_length)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    schedule: StateSchedule,
    scale: float,
    delta: bool,
    l2norm: bool,
) -> Tensor:
    return chunk.two_stream(q, k, v, g, beta, schedule, scale=scale, delta=delta, l2norm=l2norm)


def linear_attention_step(
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
    schedule: StateSchedule,
    layout: Layout,
    scale: float,
    delta: bool,
    l2norm: bool,
) -> tuple[Tensor, ...]:
    state = commit(state, pending_k, pending_d, pending_g, accepted)
    out, *rows = chunk.two_stream_step(
        q,
        k,
        v,
        g,
        beta,
        schedule,
        scale=scale,
        delta=delta,
        l2norm=l2norm,
        initial_state=state,
        clean_length=layout.clean_length,
    )
    return (out, state, *(row for row in rows if row is not None))


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, schedule: ScanSchedule) -> Tensor:
    return torch_scan.two_stream(x, dt, a, b, c, schedule)


def selective_scan_step(
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
    state = torch_scan.commit(state, pending_x, pending_dt, pending_b, a, accepted)
    y = torch_scan.two_stream(x, dt, a, b, c, schedule, initial_state=state)
    return (y, state, *(pending_rows(rows, layout, state.dtype) for rows in (x, dt, b)))


def gated_recurrence(x: Tensor, a: Tensor, schedule: ScanSchedule) -> Tensor:
    return torch_walk.two_stream(x, a, schedule)


def gated_recurrence_step(
    x: Tensor,
    a: Tensor,
    state: Tensor,
    pending_x: Tensor,
    pending_a: Tensor,
    accepted: Tensor,
    schedule: ScanSchedule,
    layout: Layout,
) -> tuple[Tensor, ...]:
    state = torch_walk.commit(state, pending_x, pending_a, accepted)
    y = torch_walk.two_stream(x, a, schedule, initial_state=state)
    return (y, state, *(pending_rows(rows, layout, state.dtype) for rows in (x, a)))


def moe_experts(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool = True
) -> Tensor:
    return torch_grouped.grouped(x, index, weight, up, down, activation=activation, gated=gated)
