"""Two-stream linear attention in Triton, forward and backward: `two_stream`, as torch.library custom ops.

The schedule crosses the op boundary as integers and tensors, so that torch.compile and torch.export see plain ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flarec.errors import UsageError

from . import launch
from .launch import Saved
from .schedule import MIN_ROWS, TileSchedule, bytes_needed, largest_chunk, shared_memory

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_DIM = 256


def unsupported(dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why these inputs cannot run here, or None."""
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} (bfloat16, float16 and float32 are supported)"
    if max(key_dim, value_dim) > LARGEST_DIM:
        return f"head dims K = {key_dim}, V = {value_dim} (at most {LARGEST_DIM} are supported)"
    if not largest_chunk(dtype, key_dim, value_dim):
        needed, room = bytes_needed(MIN_ROWS, dtype, key_dim, value_dim), shared_memory()
        return (
            f"head dims K = {key_dim}, V = {value_dim} in {str(dtype).removeprefix('torch.')} on this GPU: the "
            f"smallest tiles take {needed >> 10} KiB of shared memory, and it has {room >> 10}"
        )
    return None


def two_stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    schedule: TileSchedule,
    *,
    scale: float,
    delta: bool,
    l2norm: bool,
    initial_state: Tensor | None = None,
    final_state: bool = False,
    frozen_clean: int | None = None,
) -> Any:
    """Output [B, T, H, V] in q's dtype; the same arguments and meaning as `reference`, with its layout's schedule.

    q, k [B, T, Hk, K], v [B, T, H, V] in one of bfloat16, float16, float32 (mixed: the widest); g and beta of any
    floating dtype; initial_state [B, H, K, V] float32. With final_state also the clean state of document 0 of each row
    after the layout's clean tokens, [B, H, K, V] float32 (0 for a row without document 0).
    Products take operands of the input dtype (float32: three TF32 products) and sum in float32; gates, solves and the
    state inside a document are float32, chunk entry states are stored in the input dtype.
    Differentiable (once). Padding slots are never read and output 0. Deterministic. frozen_clean (clean slots per row):
    gradients of clean tokens and of the initial state are 0, and only kernels over noisy rows run in the backward.
    Raises `UsageError` for unsupported dtypes and head dims.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    why = unsupported(dtype, q.shape[3], v.shape[3])
    if why:
        raise UsageError(f"Triton linear attention does not support {why}; use the torch kernels")
    most = largest_chunk(dtype, q.shape[3], v.shape[3])
    if max(schedule.chunk_size, schedule.tile_rows) > most:
        raise UsageError(
            f"the schedule has chunks of {schedule.chunk_size} and tiles of {schedule.tile_rows} rows, but "
            f"{str(dtype).removeprefix('torch.')} rows of this width leave room for {most}; build it with "
            f"chunk_size={most}"
        )
    out, final, *_ = _forward(
        q.to(dtype), k.to(dtype), v.to(dtype), g, beta, initial_state, *schedule.flat(), scale, delta, l2norm,
        final_state, frozen_clean is not None,
    )
    out = out.to(q.dtype)
    return (out, final) if final_state else out


@torch.library.custom_op("flarec::linear_attention_two_stream", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    sizes: list[int],
    index: list[Tensor],
    scale: float,
    delta: bool,
    l2norm: bool,
    final: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    schedule = TileSchedule.rebuild(sizes, index)
    out, last, saved = launch.forward(
        q, k, v, g, beta, initial, schedule, scale=scale, delta=delta, l2norm=l2norm, final=final
    )
    return out, last, list(saved.tensors())


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    sizes: list[int],
    index: list[Tensor],
    scale: float,
    delta: bool,
    l2norm: bool,
    final: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    schedule = TileSchedule.rebuild(sizes, index)
    heads, key_dim, value_dim, size = v.shape[2], q.shape[3], v.shape[3], schedule.chunk_size
    out = q.new_empty(v.shape)
    last = q.new_empty((schedule.rows, heads, key_dim, value_dim) if final else (0,), dtype=torch.float32)
    states = q.new_empty(schedule.chunks, heads, key_dim, value_dim)
    values = q.new_empty(v.shape if delta else (0,))
    inverse = q.new_empty((schedule.chunks, heads, size, size) if delta else (0,))
    gates = launch.new_gates(schedule, heads, g is not None and g.ndim == 3, q.device)
    return out, last, [states, values, inverse, *gates]


@torch.library.custom_op("flarec::linear_attention_two_stream_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: bool,
    saved: list[Tensor],
    sizes: list[int],
    index: list[Tensor],
    scale: float,
    delta: bool,
    l2norm: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    schedule = TileSchedule.rebuild(sizes, index)
    return launch.backward(
        grad_out, grad_final, q, k, v, g, beta, initial, Saved.of(saved), schedule, scale=scale, delta=delta,
        l2norm=l2norm, frozen=frozen,
    )


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: bool,
    saved: list[Tensor],
    sizes: list[int],
    index: list[Tensor],
    scale: float,
    delta: bool,
    l2norm: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0) if g is None else g.new_empty(g.shape),
        beta.new_empty(beta.shape),
        q.new_empty(shape, dtype=torch.float32) if initial else q.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, g, beta, initial, sizes, index, scale, delta, l2norm, final, frozen = inputs
    states, values, inverse, *gates = output[2]
    if frozen:  # read by the backward of clean rows alone
        inverse = inverse.new_empty(0)
    ctx.save_for_backward(q, k, v, g, beta, *index, states, values, inverse, *gates)
    ctx.index = len(index)
    ctx.initial = None if initial is None else initial.dtype
    ctx.options = (sizes, scale, delta, l2norm, frozen)
    ctx.final = final
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    q, k, v, g, beta, *rest = ctx.saved_tensors
    index, saved = rest[: ctx.index], rest[ctx.index :]
    sizes, scale, delta, l2norm, frozen = ctx.options
    grad_out = q.new_zeros(v.shape) if grads[0] is None else grads[0]
    grad_final = grads[1] if ctx.final else None
    result = _backward(
        grad_out, grad_final, q, k, v, g, beta, ctx.initial is not None, saved, sizes, index, scale, delta,
        l2norm, frozen,
    )
    grad_q, grad_k, grad_v, grad_g, grad_beta, grad_initial = result
    return (
        grad_q, grad_k, grad_v, None if g is None else grad_g, grad_beta,
        None if ctx.initial is None else grad_initial.to(ctx.initial), None, [None] * len(index), None, None, None,
        None, None,
    )


_forward.register_autograd(_gradients, setup_context=_setup)
