"""Lowered mixers for `--kernels triton`: what the graph calls after `lower-mixers(implementation='triton')`.

Thin calls of the Triton kernels with the operands in graph order; shapes as in `flarec.stream_ops`, schedules from
`flarec.derive`. Softmax attention over a cache, selective scans, gated recurrences and expert layers have no Triton
form: they stay with `flarec.lowered`. `refusal` says which sites these kernels cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import stream_ops
from .errors import PassError

try:
    import triton
except ModuleNotFoundError as error:
    raise PassError(
        "the Triton kernels need the package triton; install flarec[gpu], or use --kernels torch"
    ) from error

from .kernels.linear_attention.step import launch as triton_step
from .kernels.linear_attention.step.schedule import StepSchedule
from .kernels.linear_attention.tiles import train
from .kernels.linear_attention.tiles.prefill import linear_attention_prefill
from .kernels.linear_attention.tiles.schedule import TileSchedule
from .kernels.short_conv import triton_conv
from .kernels.short_conv.readers import WIDTHS, ConvSchedule
from .kernels.softmax_attention import triton_attention
from .kernels.softmax_attention.attention_schedule import AttentionSchedule
from .layout import PADDING, Layout


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: AttentionSchedule,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The sliding window is part of the schedule already."""
    return triton_attention.two_stream(q, k, v, schedule, scale=scale, softcap=softcap)


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, schedule: ConvSchedule, activation: str | None
) -> Tensor:
    return triton_conv.two_stream(x, weight, bias, schedule, activation=activation)


def short_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffer: Tensor,
    accepted: Tensor,
    schedule: ConvSchedule,
    layout: Layout,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    return triton_conv.step(x, weight, bias, buffer, accepted, schedule, layout.clean_length, activation=activation)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    schedule: TileSchedule,
    scale: float,
    delta: bool,
    l2norm: bool,
) -> Tensor:
    out: Tensor = train.two_stream(q, k, v, g, beta, schedule, scale=scale, delta=delta, l2norm=l2norm)
    return out


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
    schedule: StepSchedule | TileSchedule,
    layout: Layout,
    scale: float,
    delta: bool,
    l2norm: bool,
) -> tuple[Tensor, ...]:
    """One launch for a step; a prefill (`derive.StepTiles` gave it chunks) runs the forward kernels of training."""
    cache = (state, pending_k, pending_d, pending_g, accepted)
    if isinstance(schedule, TileSchedule):
        padding = layout.clean_document == PADDING
        return linear_attention_prefill(
            q, k, v, g, beta, *cache, schedule, clean_padding=padding, scale=scale, delta=delta, l2norm=l2norm
        )
    return triton_step.linear_attention_step(
        q, k, v, g, beta, *cache, schedule, clean_length=layout.clean_length, scale=scale, delta=delta, l2norm=l2norm
    )


def check_device(device: torch.device) -> None:
    """Raise `PassError` where Triton cannot run: it needs a GPU, or its interpreter (the meta device runs nothing)."""
    if device.type in ("cuda", "meta") or triton.knobs.runtime.interpret:
        return
    raise PassError(
        f"the Triton kernels run on CUDA devices, and this model is on '{device}'; use --device cuda or --kernels "
        "torch (TRITON_INTERPRET=1 runs them on the CPU, slowly, for tests)"
    )


def refusal(target: object, operands: Sequence[Any]) -> str | None:
    """Why the Triton form of a mixer cannot run a site, or None.

    target: a function of `flarec.stream_ops`; operands: its arguments, tensors as `TensorSpec`.
    """
    check = _REFUSALS.get(target)
    return check(operands) if check else None


def _refuse_attention(operands: Sequence[Any]) -> str | None:
    q, k, v, _, scale = operands[:5]
    return triton_attention.supports(q.dtype, q.size(1), k.size(1), q.size(3), v.size(3), scale=scale)


def _refuse_conv(operands: Sequence[Any]) -> str | None:
    x, weight, activation = operands[0], operands[1], operands[-1]
    if x.dtype not in triton_conv.DTYPES:
        return f"dtype {str(x.dtype).removeprefix('torch.')}"
    if weight.size(1) not in WIDTHS:
        return f"width {weight.size(1)} (widths {WIDTHS.start} to {WIDTHS.stop - 1} are supported)"
    return None if activation in (None, "silu", "swish") else f"activation '{activation}'"


def _refuse_linear(operands: Sequence[Any]) -> str | None:
    q, k, v = operands[:3]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return train.unsupported(dtype, q.size(3), v.size(3))


_REFUSALS: Mapping[object, Callable[[Sequence[Any]], str | None]] = {
    stream_ops.two_stream_softmax_attention: _refuse_attention,
    stream_ops.two_stream_short_conv: _refuse_conv,
    stream_ops.cached_short_conv: _refuse_conv,
    stream_ops.two_stream_linear_attention: _refuse_linear,
    stream_ops.cached_linear_attention: _refuse_linear,
}
