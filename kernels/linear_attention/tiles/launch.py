"""Launches of the training kernels: allocation, strides, tile sizes. The data flow of forward and backward in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import (
    chunk_grad,
    clean,
    clean_grad,
    gates,
    noisy,
    noisy_keys_grad,
    noisy_queries_grad,
    states_grad,
)
from .channel import launch as channel
from .problem import Problem
from .schedule import TileSchedule


def flat_tokens(x: Tensor) -> Tensor:
    """x [B, T, ...] itself if batch and token collapse into one axis and the last axis is dense, else a dense copy."""
    dense_rows = x.stride(-1) == 1 or x.shape[-1] == 1
    collapses = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if dense_rows and collapses else x.contiguous()


@dataclass(frozen=True)
class Saved:
    """What the backward reads beside the inputs.

    states [N, H, K, V]: entry state of each chunk. values [B, T, H, V]: Z (delta, else empty). inverse [N, H, C, C]
    (delta, else empty). gates: `chunk_gam`, `chunk_beta`, `tile_logs`, `tile_beta` of gates.
    """

    states: Tensor
    values: Tensor
    inverse: Tensor
    gates: tuple[Tensor, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.states, self.values, self.inverse, *self.gates

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Saved:
        states, values, inverse, *gates = tensors
        return Saved(states, values, inverse, tuple(gates))


GATE_NAMES = ("chunk_gam", "chunk_beta", "tile_logs", "tile_beta")


def new_tokens(like: Tensor, schedule: TileSchedule, *shape: int, frozen: bool = False) -> Tensor:
    """[B, T, *shape]; zeros if there are slots that no kernel writes: padding, or clean ones of a frozen stream."""
    make = torch.zeros if frozen or schedule.tokens_padded else torch.empty
    return make(schedule.rows, schedule.length, *shape, dtype=like.dtype, device=like.device)


def operands_of(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, z: Tensor, schedule: TileSchedule, scale: float
) -> dict[str, Any]:
    """What every kernel may ask for by name."""
    strides = {"q": q, "k": k, "v": v, "z": z}
    return {
        "q": q,
        "k": k,
        "v": v,
        "values": z,
        "clean_values": z,
        "scale": scale,
        "chunks": schedule.chunks,
        "tiles": schedule.tiles,
        "chunk_step": schedule.chunk_step,
        **{f"{name}_token": x.stride(1) for name, x in strides.items()},
        **{f"{name}_head": x.stride(2) for name, x in strides.items()},
        **{n: getattr(schedule, n) for n in SCHEDULE_NAMES},
        **dict.fromkeys(CHANNEL_NAMES, q.new_empty(0)),
    }


CHANNEL_NAMES = ("decayed_q", "decayed_k", "tail_k", "total", "weights", "clean_weights", "block_weights")
SCHEDULE_NAMES = (
    "document_token", "document_length", "document_chunk", "document_row", "chunk_token", "chunk_length", "chunk_tile",
    "tile_chunk", "tile_first", "tile_count", "tile_token", "tile_anchor", "tile_start", "tile_stop",
)


def new_gates(schedule: TileSchedule, heads: int, scalar: bool, device: torch.device) -> tuple[Tensor, ...]:
    """Unwritten `GATE_NAMES` tensors; the log decays are empty unless there is one decay per head (scalar)."""
    n, m, c, r = schedule.chunks, schedule.tiles, schedule.chunk_size, schedule.tile_rows
    shapes = ((n, heads, c) if scalar else 0, (n, heads, c), (m, heads, 3, r) if scalar else 0, (m, heads, r))
    return tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)


def fill_gates(p: Problem, g: Tensor | None, beta: Tensor, operands: dict[str, Any], schedule: TileSchedule) -> None:
    """Fill `GATE_NAMES` and add them to the operands."""
    scalar = p.gate == 1
    operands |= dict(zip(GATE_NAMES, new_gates(schedule, p.heads, scalar, beta.device), strict=True))
    per_head = g if scalar and g is not None else beta  # without a decay per head it is not read
    named = {"g": per_head, "g_token": per_head.stride(1), "beta": beta, "beta_token": beta.stride(1)}
    p.launch("chunk_gates", gates.chunk_gates_kernel, schedule.chunks * p.heads, operands | named)
    p.launch("tile_gates", gates.tile_gates_kernel, schedule.tiles * -(-p.heads // 16), operands | named)


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
    chunks, tiles, heads, size = schedule.chunks, schedule.tiles, p.heads, p.chunk_size
    q, k, v, beta = flat_tokens(q), flat_tokens(k), flat_tokens(v), flat_tokens(beta)
    g = None if g is None else flat_tokens(g)
    values = q.new_empty(schedule.rows, schedule.length, heads, p.value_dim) if delta else v
    operands = operands_of(p, q, k, v, values, schedule, scale)
    fill_gates(p, g, beta, operands, schedule)
    states = q.new_empty(chunks, heads, p.key_dim, p.value_dim)
    inverse = q.new_empty((chunks, heads, size, size) if delta else 0)
    last = q.new_zeros((schedule.rows, heads, p.key_dim, p.value_dim) if final else 0, dtype=torch.float32)
    out = new_tokens(q, schedule, heads, p.value_dim)
    operands |= {"states": states, "inverse": inverse, "final": last, "out": out, "noisy_values": values}
    operands["initial"] = last if initial is None else initial.contiguous()

    read_by_queries = {}
    if p.gate == 2 and g is not None:
        operands |= channel.decay(p, g, operands, schedule)
        read_by_queries = {"weights": operands["query_weights"]}
    if delta:
        p.launch("clean_inverse", clean.clean_inverse_kernel, chunks * heads, operands)
    p.launch(
        "clean_states", clean.clean_states_kernel, schedule.documents * heads, operands,
        INITIAL=initial is not None, FINAL=final,
    )
    p.launch("clean_outputs", clean.clean_outputs_kernel, chunks * heads, operands, **read_by_queries)
    p.launch("noisy_outputs", noisy.noisy_outputs_kernel, tiles * heads, operands)
    return out, last, Saved(
        states, values if delta else q.new_empty(0), inverse, tuple(operands[n] for n in GATE_NAMES)
    )


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
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state (empty where there is none). frozen: of noisy tokens alone,
    the others are 0."""
    p = Problem.of(q, v, g, schedule, delta, l2norm)
    chunks, tiles, heads, size = schedule.chunks, schedule.tiles, p.heads, p.chunk_size
    q, k, v = flat_tokens(q), flat_tokens(k), flat_tokens(v)
    z = saved.values if delta else v
    scalar = p.gate == 1
    row_shape = (tiles, heads, p.tile_rows) if scalar else (0,)
    chunk_shape = (chunks, heads, size) if scalar else (0,)
    state_shape = (schedule.rows, heads, p.key_dim, p.value_dim) if initial else (0,)
    grad_q, grad_k = (new_tokens(x, schedule, heads, p.key_dim, frozen=frozen) for x in (q, k))
    grad_v = new_tokens(v, schedule, heads, p.value_dim, frozen=frozen)
    grad_beta = new_tokens(beta, schedule, heads, frozen=frozen)
    grad_g = q.new_empty(0) if g is None else new_tokens(g, schedule, *g.shape[2:], frozen=frozen)
    grad_initial = torch.zeros(state_shape, dtype=torch.float32, device=q.device)
    operands = operands_of(p, q, k, v, z, schedule, scale) | dict(zip(GATE_NAMES, saved.gates, strict=True))
    operands |= {
        "states": saved.states,
        "noisy_values": z,
        "inverse": saved.inverse,
        "grad_out": grad_out.contiguous(),
        "grad_q": grad_q,
        "grad_k": grad_k,
        "grad_v": grad_v,
        "noisy_error": grad_v,
        "grad_g": grad_g,
        "grad_beta": grad_beta,
        "grad_initial": grad_initial,
        "grad_final": grad_initial if grad_final is None else grad_final.contiguous(),
        "grad_anchor": torch.empty(row_shape, dtype=torch.float32, device=q.device),
        "grad_stop": torch.empty(row_shape, dtype=torch.float32, device=q.device),
        "grad_gam": torch.empty(chunk_shape, dtype=torch.float32, device=q.device),
    }
    if p.gate == 2 and g is not None:
        channel.backward(
            p, flat_tokens(g), operands, schedule, initial=initial, final=grad_final is not None, frozen=frozen
        )
        return _per_key_head(grad_q, p.group), _per_key_head(grad_k, p.group), grad_v, grad_g, grad_beta, grad_initial
    p.launch("noisy_queries_grad", noisy_queries_grad.noisy_queries_grad_kernel, tiles * heads, operands)
    p.launch("noisy_keys_grad", noisy_keys_grad.noisy_keys_grad_kernel, tiles * heads, operands)
    if not frozen:
        _clean_backward(p, operands, schedule, initial=initial, final=grad_final is not None)
    return _per_key_head(grad_q, p.group), _per_key_head(grad_k, p.group), grad_v, grad_g, grad_beta, grad_initial


def _clean_backward(
    p: Problem, operands: dict[str, Any], schedule: TileSchedule, *, initial: bool, final: bool
) -> None:
    """The gradients of clean rows, behind those of the noisy rows that read them."""
    chunks, heads, like = schedule.chunks, p.heads, operands["q"]
    operands |= {
        "grad_states": torch.empty_like(operands["states"]),
        "grad_corrected": like.new_empty(chunks * p.chunk_size, heads, p.value_dim),
    }
    p.launch("chunk_grad", chunk_grad.chunk_grad_kernel, chunks * heads, operands)
    p.launch(
        "states_grad", states_grad.states_grad_kernel, schedule.documents * heads, operands, INITIAL=initial,
        FINAL=final,
    )
    p.launch("clean_queries_grad", clean_grad.clean_queries_grad_kernel, chunks * heads, operands)
    p.launch("clean_keys_grad", clean_grad.clean_keys_grad_kernel, chunks * heads, operands)


def _per_key_head(grad: Tensor, group: int) -> Tensor:
    return grad if group == 1 else grad.unflatten(2, (grad.shape[2] // group, group)).sum(dim=3)
