"""Launches of the training kernels: allocation, strides, tile sizes. The data flow of forward and backward in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_chunk_grad, triton_clean, triton_clean_grad, triton_noisy, triton_noisy_grad
from .tile_schedule import TileSchedule


@dataclass(frozen=True)
class Launch:
    """Columns of V per program, warps per program, depth of the software pipeline."""

    tile_v: int
    warps: int
    stages: int


# Measured on an H100 with K = V = 128 (benchmarks/NOTES.md); wider heads take narrower tiles of V.
LAUNCHES = {
    "clean_inverse": Launch(64, 4, 1),
    "clean_states": Launch(32, 4, 2),
    "clean_outputs": Launch(128, 4, 1),
    "noisy_outputs": Launch(128, 4, 1),
    "noisy_grad": Launch(128, 8, 1),
    "chunk_grad": Launch(128, 8, 1),
    "states_grad": Launch(32, 4, 2),
    "clean_grad": Launch(128, 8, 1),
}


@dataclass(frozen=True)
class Problem:
    """Sizes and flags of one call; `options(name)` are the constexpr arguments and launch parameters of a kernel."""

    heads: int
    group: int
    key_dim: int
    value_dim: int
    gate: int  # 0 none, 1 per head, 2 per key channel
    delta: bool
    l2norm: bool
    chunk_size: int
    tile_rows: int
    largest_block: int
    dtype: torch.dtype

    @staticmethod
    def of(q: Tensor, v: Tensor, g: Tensor | None, schedule: TileSchedule, delta: bool, l2norm: bool) -> Problem:
        gate = 0 if g is None else g.ndim - 2
        heads, key_dim, value_dim = v.shape[2], q.shape[3], v.shape[3]
        return Problem(
            heads, heads // q.shape[2], key_dim, value_dim, gate, delta, l2norm, schedule.chunk_size,
            schedule.tile_rows, schedule.largest_block, q.dtype,
        )  # fmt: skip

    @property
    def block_k(self) -> int:
        return max(16, triton.next_power_of_2(self.key_dim))

    def tile_v(self, name: str) -> int:
        wide = self.block_k > 128 or self.dtype == torch.float32
        most = min(LAUNCHES[name].tile_v, 64) if wide else LAUNCHES[name].tile_v
        return int(min(most, max(16, triton.next_power_of_2(self.value_dim))))

    def tiles_of_v(self, name: str) -> int:
        return -(-self.value_dim // self.tile_v(name))

    def options(self, name: str, kernel: Any) -> dict[str, Any]:
        launch = LAUNCHES[name]
        tile_v = self.tile_v(name)
        flags = {
            "H": self.heads,
            "GROUP": self.group,
            "BK": self.block_k,
            "BV": tile_v,
            "NV": self.tiles_of_v(name),
            "C": self.chunk_size,
            "R": self.tile_rows,
            "LARGEST": 1 if self.largest_block < 2 else triton.next_power_of_2(self.largest_block),
            "GATE": self.gate,
            "DELTA": self.delta,
            "L2NORM": self.l2norm,
            "EXACT_K": self.key_dim == self.block_k,
            "EXACT_V": self.value_dim % tile_v == 0,
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "tf32",
        }
        known = set(kernel.arg_names)
        return {n: x for n, x in flags.items() if n in known} | {"num_warps": launch.warps, "num_stages": launch.stages}


def token_strides(x: Tensor) -> tuple[int, int]:
    """Strides of token and head of [B, T, heads, D] seen as [B * T, heads, D]."""
    return x.stride(1), x.stride(2)


def flat_tokens(x: Tensor) -> Tensor:
    """x [B, T, ...] itself if batch and token collapse into one axis and the last axis is dense, else a dense copy."""
    dense_rows = x.stride(-1) == 1 or x.shape[-1] == 1
    collapses = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if dense_rows and collapses else x.contiguous()


@dataclass(frozen=True)
class Saved:
    """What the backward reads: chunk entry states [N, H, K, V], Z [B, T, H, V] (delta), inverses [N, H, C, C] (delta)."""

    states: Tensor
    values: Tensor
    inverse: Tensor


def _tokens(like: Tensor, schedule: TileSchedule, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """[B, T, *shape]; zeros if there are padding slots, which no kernel writes."""
    make = torch.zeros if schedule.tokens_padded else torch.empty
    return make(schedule.rows, schedule.length, *shape, dtype=dtype or like.dtype, device=like.device)


def run(kernel: Any, programs: int, *arguments: object, **options: object) -> None:
    if programs:
        kernel[(programs,)](*arguments, **options)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    schedule: TileSchedule,
    *,
    scale: float,
    delta: bool,
    l2norm: bool,
    final: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """(out [B, T, H, V], final states [B, H, K, V] float32 or empty, what the backward reads)."""
    p = Problem.of(q, v, g, schedule, delta, l2norm)
    chunks, heads, size = schedule.chunks, p.heads, p.chunk_size
    q, k, v, g, beta = flat_tokens(q), flat_tokens(k), flat_tokens(v), _flat(g), _flat(beta)
    empty = q.new_empty(0)
    out = _tokens(q, schedule, heads, p.value_dim)
    values = q.new_empty(schedule.rows, schedule.length, heads, p.value_dim) if delta else q.new_empty(0)
    states = q.new_empty(chunks, heads, p.key_dim, p.value_dim)
    inverse = q.new_empty(chunks, heads, size, size) if delta else q.new_empty(0)
    last = q.new_empty(0, dtype=torch.float32)
    if final:
        last = q.new_zeros(schedule.rows, heads, p.key_dim, p.value_dim, dtype=torch.float32)
    z = values if delta else v
    gate, gate_token = _gate(g, q)
    beta_token = beta.stride(1)
    dims = (p.key_dim, p.value_dim)

    if delta:
        kernel = triton_clean.clean_inverse_kernel
        run(
            kernel, chunks * heads, k, gate, beta, empty, inverse, schedule.chunk_token, schedule.chunk_length, chunks,
            p.key_dim, *token_strides(k), gate_token, beta_token, **p.options("clean_inverse", kernel),
        )  # fmt: skip
    kernel = triton_clean.clean_states_kernel
    run(
        kernel, schedule.documents * heads * p.tiles_of_v("clean_states"),
        k, v, gate, beta, empty, empty, empty, inverse, empty if initial is None else initial.contiguous(), values,
        states, last, schedule.document_token, schedule.document_length, schedule.document_chunk,
        schedule.document_row, *dims, *token_strides(k), *token_strides(v), gate_token, beta_token,
        INITIAL=initial is not None, FINAL=final, **p.options("clean_states", kernel),
    )  # fmt: skip
    kernel = triton_clean.clean_outputs_kernel
    run(
        kernel, chunks * heads * p.tiles_of_v("clean_outputs"),
        q, k, gate, beta, empty, empty, z, states, out, schedule.chunk_token, schedule.chunk_length, chunks, scale,
        *dims, *token_strides(q), *token_strides(k), *token_strides(z), gate_token, beta_token,
        **p.options("clean_outputs", kernel),
    )  # fmt: skip
    kernel = triton_noisy.noisy_outputs_kernel
    run(
        kernel, schedule.tiles * heads * p.tiles_of_v("noisy_outputs"),
        q, k, v, gate, beta, empty, empty, empty, empty, z, states, values, out,
        schedule.chunk_token, schedule.chunk_length, schedule.tile_chunk, schedule.tile_token, schedule.tile_anchor,
        schedule.tile_start, schedule.tile_stop, schedule.tiles, scale, *dims, *token_strides(q), *token_strides(k),
        *token_strides(v), *token_strides(z), gate_token, beta_token, **p.options("noisy_outputs", kernel),
    )  # fmt: skip
    return out, last, Saved(states, values, inverse)


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: bool,
    saved: Saved,
    schedule: TileSchedule,
    *,
    scale: float,
    delta: bool,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state (empty where there is none)."""
    p = Problem.of(q, v, g, schedule, delta, l2norm)
    chunks, tiles, heads, size = schedule.chunks, schedule.tiles, p.heads, p.chunk_size
    q, k, v, g, beta = flat_tokens(q), flat_tokens(k), flat_tokens(v), _flat(g), _flat(beta)
    grad_out = grad_out.contiguous()
    z = saved.values if delta else v
    gate, gate_token = _gate(g, q)
    beta_token = beta.stride(1)
    dims = (p.key_dim, p.value_dim)
    empty = q.new_empty(0)
    single = {"dtype": torch.float32, "device": q.device}

    grad_q, grad_k = _tokens(q, schedule, heads, p.key_dim), _tokens(k, schedule, heads, p.key_dim)
    grad_v = _tokens(v, schedule, heads, p.value_dim)
    grad_beta = _tokens(beta, schedule, heads)
    grad_g = q.new_empty(0) if g is None else _tokens(g, schedule, heads)
    grad_anchor = torch.empty(tiles * p.tile_rows, heads, **single) if p.gate == 1 else empty
    kernel: Any = triton_noisy_grad.noisy_grad_kernel
    run(
        kernel, tiles * heads, q, k, v, gate, beta, z, saved.states, z, grad_out, grad_q, grad_k, grad_v, grad_g,
        grad_beta, grad_anchor, schedule.chunk_token, schedule.chunk_length, schedule.tile_chunk, schedule.tile_token,
        schedule.tile_anchor, schedule.tile_start, schedule.tile_stop, tiles, scale, *dims, *token_strides(q),
        *token_strides(k), *token_strides(v), *token_strides(z), gate_token, beta_token,
        **p.options("noisy_grad", kernel),
    )  # fmt: skip

    parts = p.tiles_of_v("chunk_grad")
    grad_states = torch.empty_like(saved.states)
    grad_corrected = q.new_empty(chunks * size, heads, p.value_dim)
    grad_keys = q.new_empty(parts, chunks * size, heads, p.key_dim)
    grad_gam = torch.empty(chunks * size, heads, **single) if p.gate == 1 else empty
    kernel = triton_chunk_grad.chunk_grad_kernel
    run(
        kernel, chunks * heads * parts, q, k, gate, beta, z, grad_out, grad_v, grad_anchor, grad_states,
        grad_corrected, grad_keys, grad_gam, schedule.chunk_token, schedule.chunk_length, schedule.chunk_tile,
        schedule.tile_token, schedule.tile_anchor, schedule.tile_start, schedule.tile_stop, chunks, scale, *dims,
        *token_strides(q), *token_strides(k), *token_strides(z), gate_token, beta_token,
        **p.options("chunk_grad", kernel),
    )  # fmt: skip

    grad_initial = q.new_empty(0)
    if initial:
        grad_initial = torch.zeros(schedule.rows, heads, p.key_dim, p.value_dim, **single)
    kernel = triton_clean_grad.states_grad_kernel
    run(
        kernel, schedule.documents * heads * p.tiles_of_v("states_grad"),
        k, gate, beta, saved.inverse, empty if grad_final is None else grad_final.contiguous(), grad_corrected,
        grad_states, grad_v, grad_initial, schedule.document_token, schedule.document_length, schedule.document_chunk,
        schedule.document_row, *dims, *token_strides(k), gate_token, beta_token, INITIAL=initial,
        FINAL=grad_final is not None, **p.options("states_grad", kernel),
    )  # fmt: skip
    kernel = triton_clean_grad.clean_grad_kernel
    run(
        kernel, chunks * heads, q, k, gate, beta, z, saved.states, grad_out, grad_states, grad_keys, grad_gam, grad_q,
        grad_k, grad_v, grad_g, grad_beta, schedule.chunk_token, schedule.chunk_length, chunks, scale, *dims,
        *token_strides(q), *token_strides(k), *token_strides(z), gate_token, beta_token, NK=parts,
        **p.options("clean_grad", kernel),
    )  # fmt: skip
    return _per_key_head(grad_q, p.group), _per_key_head(grad_k, p.group), grad_v, grad_g, grad_beta, grad_initial


def _flat(x: Any) -> Any:
    """[B, T, H] with heads dense and rows that collapse; None stays None."""
    return None if x is None else flat_tokens(x)


def _gate(g: Tensor | None, q: Tensor) -> tuple[Tensor, int]:
    return (q.new_empty(0), 0) if g is None else (g, g.stride(1))


def _per_key_head(grad: Tensor, group: int) -> Tensor:
    return grad if group == 1 else grad.unflatten(2, (grad.shape[2] // group, group)).sum(dim=3)


