"""Two-stream softmax attention in Triton, for training: forward and backward visit only what the layout shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flarec.errors import UsageError

from .attention_schedule import AttentionSchedule
from .triton_backward import backward
from .triton_forward import forward
from .triton_tiles import launch_table

__all__ = ["AttentionSchedule", "supports", "two_stream"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST_DIM, LARGEST_DIM = 16, 256


def supports(
    dtype: torch.dtype, heads: int, key_heads: int, dim: int, value_dim: int, *, scale: float = 1.0
) -> str | None:
    """None if these kernels serve such an attention, or the reason why not."""
    if dtype not in DTYPES:
        return f"{dtype} is not among bfloat16, float16 and float32"
    for name, size in (("query", dim), ("value", value_dim)):
        if not SMALLEST_DIM <= size <= LARGEST_DIM:
            return f"a {name} head dim of {size} is outside {SMALLEST_DIM}..{LARGEST_DIM}"
    if key_heads == 0 or heads % key_heads:
        return f"{heads} heads are not a multiple of {key_heads} key heads"
    if scale <= 0:
        return f"a scale of {scale} is not positive"
    return None


def two_stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: AttentionSchedule,
    *,
    scale: float,
    softcap: float | None = None,
    frozen_clean: int | None = None,
) -> Tensor:
    """Attention output [B, T, H, Dv] in q's dtype, 0 on padding, which is never read; meaning as in `reference`.

    q [B, H, T, Dqk], k [B, Hkv, T, Dqk], v [B, Hkv, T, Dv], all bfloat16, float16 or float32, with any strides (a last
    stride other than 1 costs a copy); sums are float32. Differentiable once in q, k and v; gradients are laid out as
    these and 0 on padding. The sliding window is part of the schedule. frozen_clean (clean slots per row): gradients of
    clean tokens are 0, and the backward visits noisy queries and noisy keys alone. Raises `UsageError` for what
    `supports` refuses and for operands that do not belong together.
    """
    _check(q, k, v, schedule, scale, softcap)
    q, k, v = (_last_stride_one(x) for x in (q, k, v))
    out: Tensor
    out, _ = _forward(
        q,
        k,
        v,
        schedule.intervals,
        schedule.reader_offsets,
        schedule.reader_ranges,
        schedule.clean_length,
        schedule.key_tile,
        scale,
        softcap,
        frozen_clean is not None,
    )
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, schedule: AttentionSchedule, scale: float, softcap: float | None) -> None:
    rows, heads, length, dim = q.shape
    _, key_heads, _, value_dim = v.shape
    if k.shape != (rows, key_heads, length, dim) or v.shape != (rows, key_heads, length, value_dim):
        raise UsageError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit [B, H, T, Dqk], [B, Hkv, T, Dqk], "
            "[B, Hkv, T, Dv]"
        )
    if (schedule.rows, schedule.length) != (rows, length):
        raise UsageError(
            f"the schedule is of {schedule.rows} rows of {schedule.length} tokens, q of {rows} rows of {length}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise UsageError(f"q, k and v have different dtypes: {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == schedule.intervals.device:
        raise UsageError(
            f"q, k, v and the schedule are on different devices: {q.device}, {k.device}, {v.device}, "
            f"{schedule.intervals.device}"
        )
    if softcap is not None and softcap <= 0:
        raise UsageError(f"a softcap of {softcap} is not positive")
    reason = supports(q.dtype, heads, key_heads, dim, value_dim, scale=scale)
    if reason is not None:
        raise UsageError(f"the Triton attention cannot run this: {reason}; use the torch implementation")


def _last_stride_one(x: Tensor) -> Tensor:
    # Inside a tile, offsets are 32-bit: rows further apart than this are brought together.
    far = x.shape[2] > 1 and x.stride(2) >= 2**23
    return x.contiguous() if x.stride(-1) != 1 or far else x


@torch.library.custom_op("flarec::softmax_attention_fwd", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    reader_offsets: Tensor,
    reader_ranges: Tensor,
    clean_length: int,
    key_tile: int,
    scale: float,
    softcap: float | None,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    schedule = AttentionSchedule(clean_length, q.shape[2], key_tile, None, intervals, reader_offsets, reader_ranges)
    table = launch_table(q.shape[3], v.shape[3], q.dtype)
    return forward(q, k, v, schedule, scale=scale, softcap=softcap, tiles=table.forward)


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    reader_offsets: Tensor,
    reader_ranges: Tensor,
    clean_length: int,
    key_tile: int,
    scale: float,
    softcap: float | None,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = q.shape
    return q.new_empty(rows, length, heads, v.shape[3]), q.new_empty(rows, heads, length, dtype=torch.float32)


@torch.library.custom_op("flarec::softmax_attention_bwd", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Tensor,
    reader_offsets: Tensor,
    reader_ranges: Tensor,
    clean_length: int,
    key_tile: int,
    scale: float,
    softcap: float | None,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    schedule = AttentionSchedule(clean_length, q.shape[2], key_tile, None, intervals, reader_offsets, reader_ranges)
    table = launch_table(q.shape[3], v.shape[3], q.dtype)
    return backward(
        _last_stride_one(grad.transpose(1, 2)).transpose(1, 2),
        q,
        k,
        v,
        out,
        lse,
        schedule,
        scale=scale,
        softcap=softcap,
        query_tiles=table.query_gradient,
        key_tiles=table.key_gradient,
        frozen=frozen,
    )


@_backward.register_fake
def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Tensor,
    reader_offsets: Tensor,
    reader_ranges: Tensor,
    clean_length: int,
    key_tile: int,
    scale: float,
    softcap: float | None,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.options = inputs[6:]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if grad is None:
        return None, None, None, *nothing
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), *nothing


_forward.register_autograd(_autograd, setup_context=_setup_context)
