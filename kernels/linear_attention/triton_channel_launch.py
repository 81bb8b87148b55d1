"""Launches of the kernels for key-channel gates: what the forward reads instead of q, k and g, and the whole backward.

The backward computes the forward's weights again rather than keeping them: they are about as large as q and k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import triton_channel, triton_channel_finish, triton_channel_grad, triton_clean_grad
from .tile_schedule import TileSchedule

if TYPE_CHECKING:
    from .triton_launch import Problem, Saved


@dataclass(frozen=True)
class Launch:
    """Width of a program's tile (channels of K, or columns of V), warps, depth of the software pipeline."""

    tile: int
    warps: int
    stages: int


LAUNCHES = {
    "channel_clean": Launch(32, 8, 1),
    "channel_block": Launch(32, 8, 1),
    "channel_prefix": Launch(32, 4, 1),
    "channel_noisy_grad": Launch(128, 8, 1),
    "channel_chunk_grad": Launch(128, 8, 1),
    "channel_clean_grad": Launch(128, 8, 1),
    "channel_prefix_finish": Launch(32, 8, 1),
    "channel_block_finish": Launch(32, 8, 1),
    "channel_clean_finish": Launch(32, 8, 1),
}


@dataclass(frozen=True)
class Decayed:
    """Of clean and noisy rows alike, but tail_k and total.

    cumulative [B, T, H, K] float32 log2 decays since the chunk's or block's start; decayed_q, decayed_k [B, T, H, K];
    tail_k [N * C, H, K]; total [N, H, K] float32; weights, query_weights [N, H, C, C] (A, A_q); clean_weights
    [M, H, 2, R, C] (P, Pq); block_weights [M, H, 2, R, R] (N, M).
    """

    cumulative: Tensor
    decayed_q: Tensor
    decayed_k: Tensor
    tail_k: Tensor
    total: Tensor
    weights: Tensor
    query_weights: Tensor
    clean_weights: Tensor
    block_weights: Tensor


def options(p: Problem, name: str, kernel: Any) -> dict[str, Any]:
    """Constexpr arguments and launch parameters of a kernel of this file."""
    launch, block_k = LAUNCHES[name], p.block_k
    tile_k = min(launch.tile, block_k)
    tile_v = _tile_v(p, name)
    largest = 1 << (max(p.largest_block, 1) - 1).bit_length()
    flags = {
        "H": p.heads,
        "GROUP": p.group,
        "BK": block_k,
        "BS": tile_k,
        "NS": -(-p.key_dim // tile_k),
        "BV": tile_v,
        "NV": -(-p.value_dim // tile_v),
        "C": p.chunk_size,
        "R": p.tile_rows,
        "LEVELS": p.chunk_size.bit_length() - 1,
        "BLOCK_LEVELS": largest.bit_length(),
        "LARGEST": largest,
        "DELTA": p.delta,
        "L2NORM": p.l2norm,
        "EXACT_K": p.key_dim == block_k,
        "EXACT_S": p.key_dim % tile_k == 0,
        "EXACT_V": p.value_dim % tile_v == 0,
        "PRECISION": "tf32x3" if p.dtype == torch.float32 else "tf32",
        "PIECES": 3 if p.dtype == torch.float32 else 2,
    }
    known = set(kernel.arg_names)
    return {n: x for n, x in flags.items() if n in known} | {"num_warps": launch.warps, "num_stages": launch.stages}


def _tile_v(p: Problem, name: str) -> int:
    wide = p.block_k > 128 or p.dtype == torch.float32
    most = min(LAUNCHES[name].tile, 64) if wide else LAUNCHES[name].tile
    return min(most, max(16, 1 << (p.value_dim - 1).bit_length()))


def _run(p: Problem, name: str, programs: int, *arguments: object) -> None:
    kernel = _KERNELS[name]
    if programs:
        kernel[(programs,)](*arguments, **options(p, name, kernel))


_KERNELS: dict[str, Any] = {
    "channel_clean": triton_channel.channel_clean_kernel,
    "channel_block": triton_channel.channel_block_kernel,
    "channel_prefix": triton_channel.channel_prefix_kernel,
    "channel_noisy_grad": triton_channel_grad.channel_noisy_grad_kernel,
    "channel_chunk_grad": triton_channel_grad.channel_chunk_grad_kernel,
    "channel_clean_grad": triton_channel_grad.channel_clean_grad_kernel,
    "channel_prefix_finish": triton_channel_finish.channel_prefix_finish_kernel,
    "channel_block_finish": triton_channel_finish.channel_block_finish_kernel,
    "channel_clean_finish": triton_channel_finish.channel_clean_finish_kernel,
}


def decay(p: Problem, q: Tensor, k: Tensor, g: Tensor, schedule: TileSchedule) -> Decayed:
    """Decayed vectors and pair weights of all chunks and tiles; q, k, g [B, T, heads, K] with collapsing rows."""
    s, heads, size, rows = schedule, p.heads, p.chunk_size, p.tile_rows
    tokens = (s.rows, s.length, heads, p.key_dim)
    single = {"dtype": torch.float32, "device": q.device}
    keys = tokens if p.delta else (0,)
    made = Decayed(
        cumulative=torch.empty(tokens, **single),
        decayed_q=q.new_empty(tokens),
        decayed_k=q.new_empty(keys),
        tail_k=q.new_empty(s.chunks * size, heads, p.key_dim),
        total=torch.empty(s.chunks, heads, p.key_dim, **single),
        weights=q.new_empty((s.chunks, heads, size, size) if p.delta else (0,)),
        query_weights=q.new_empty(s.chunks, heads, size, size),
        clean_weights=q.new_empty(s.tiles, heads, 2, rows, size),
        block_weights=q.new_empty(s.tiles, heads, 2, rows, rows),
    )
    strides = (q.stride(1), q.stride(2), k.stride(1), k.stride(2))
    gate_strides = (g.stride(1), g.stride(2))
    _run(
        p, "channel_clean", s.chunks * heads, q, k, g, made.cumulative, made.decayed_q, made.decayed_k, made.tail_k,
        made.total, made.weights, made.query_weights, s.chunk_token, s.chunk_length, p.key_dim, *strides, *gate_strides,
    )  # fmt: skip
    _run(
        p, "channel_block", s.tiles * heads, q, k, g, made.cumulative, made.block_weights, s.tile_token, s.tile_start,
        s.tile_stop, p.key_dim, *strides, *gate_strides,
    )  # fmt: skip
    _run(
        p, "channel_prefix", s.tiles * heads, q, k, made.cumulative, made.decayed_q, made.decayed_k, made.clean_weights,
        s.chunk_token, s.chunk_length, s.tile_chunk, s.tile_token, s.tile_anchor, s.tile_stop, p.key_dim, *strides,
    )  # fmt: skip
    return made


def backward(
    p: Problem,
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    z: Tensor,
    saved: Saved,
    schedule: TileSchedule,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_g: Tensor,
    grad_beta: Tensor,
    grad_initial: Tensor,
) -> None:
    """Write the gradients (per value head), all token-major, padding slots untouched; z is Z (delta) or v.

    grad_q and grad_k hold the gradients of decayed_q and decayed_k in between, the weights' memory their gradients.
    """
    s, heads, size, key_dim = schedule, p.heads, p.chunk_size, p.key_dim
    chunks, tiles, dims = s.chunks, s.tiles, (p.key_dim, p.value_dim)
    strides = (q.stride(1), q.stride(2), k.stride(1), k.stride(2))
    z_strides = (z.stride(1), z.stride(2))
    empty = q.new_empty(0)
    made = decay(p, q, k, g, schedule)

    grad_clean_weights = torch.empty_like(made.clean_weights)
    _run(
        p, "channel_noisy_grad", tiles * heads, beta, z, saved.states, z, grad_out, made.block_weights, grad_v, grad_beta,
        grad_q, grad_k, grad_clean_weights, made.block_weights, s.chunk_token, s.chunk_length, s.tile_chunk, s.tile_token,
        s.tile_start, tiles, scale, *dims, *z_strides, beta.stride(1),
    )  # fmt: skip
    grad_states = torch.empty_like(saved.states)
    grad_corrected = q.new_empty(chunks * size, heads, p.value_dim)
    _run(
        p, "channel_chunk_grad", chunks * heads * -(-p.value_dim // _tile_v(p, "channel_chunk_grad")), grad_out, grad_v,
        made.decayed_q, made.decayed_k, made.query_weights, made.clean_weights, grad_states, grad_corrected, s.chunk_token,
        s.chunk_length, s.chunk_tile, s.tile_token, chunks, scale, *dims,
    )  # fmt: skip
    kernel: Any = triton_clean_grad.states_grad_kernel
    programs = s.documents * heads * p.tiles_of_v("states_grad")
    if programs:
        kernel[(programs,)](
            k, empty, beta, made.decayed_k, made.tail_k, made.total, saved.inverse,
            empty if grad_final is None else grad_final.contiguous(), grad_corrected, grad_states, grad_v, grad_initial,
            s.document_token, s.document_length, s.document_chunk, s.document_row, *dims, k.stride(1), k.stride(2), 0,
            beta.stride(1), INITIAL=grad_initial.numel() > 0, FINAL=grad_final is not None,
            **p.options("states_grad", kernel),
        )  # fmt: skip

    grad_tail = torch.empty_like(made.tail_k)
    grad_total = torch.empty_like(made.total)
    _run(
        p, "channel_clean_grad", chunks * heads, beta, z, saved.states, grad_out, grad_states, grad_v, grad_beta, grad_q,
        grad_k, grad_tail, grad_total, made.weights, made.query_weights, s.chunk_token, s.chunk_length, chunks, scale,
        *dims, *z_strides, beta.stride(1),
    )  # fmt: skip
    grad_keys = q.new_empty(tiles * size, heads, key_dim)
    grad_gates = torch.empty_like(grad_keys)
    _run(
        p, "channel_prefix_finish", tiles * heads, q, k, made.cumulative, made.decayed_q, made.decayed_k, grad_clean_weights,
        grad_q, grad_k, grad_g, grad_keys, grad_gates, s.chunk_token, s.chunk_length, s.tile_chunk, s.tile_token,
        s.tile_anchor, s.tile_start, s.tile_stop, key_dim, *strides,
    )  # fmt: skip
    _run(
        p, "channel_block_finish", tiles * heads, q, k, made.cumulative, made.block_weights, grad_q, grad_k, grad_g,
        s.tile_token, s.tile_start, s.tile_stop, key_dim, *strides,
    )  # fmt: skip
    _run(
        p, "channel_clean_finish", chunks * heads, q, k, made.cumulative, made.decayed_q, made.decayed_k, made.tail_k,
        made.total, grad_tail, grad_total, made.weights, made.query_weights, grad_keys, grad_gates, grad_q, grad_k, grad_g,
        s.chunk_token, s.chunk_length, s.chunk_tile, key_dim, *strides,
    )  # fmt: skip
