"""Launches of the training kernels: allocation, strides, tile sizes. The data flow of forward and backward in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import (
    triton_channel_launch,
    triton_chunk_grad,
    triton_clean,
    triton_clean_grad,
    triton_gates,
    triton_noisy,
    triton_noisy_keys_grad,
    triton_noisy_queries_grad,
    triton_states_grad,
)
from .tile_schedule import TileSchedule


@dataclass(frozen=True)
class Launch:
    """Columns of V per program, warps per program, depth of the software pipeline."""

    tile_v: int
    warps: int
    stages: int


# Measured on an H100 with K = V = 128 (benchmarks/NOTES.md); wider heads take narrower tiles of V.
LAUNCHES = {
    "chunk_gates": Launch(16, 1, 1),
    "tile_gates": Launch(16, 4, 1),
    "clean_inverse": Launch(64, 4, 1),
    "clean_states": Launch(64, 4, 2),
    "clean_outputs": Launch(128, 4, 1),
    "noisy_outputs": Launch(128, 4, 1),
    "noisy_queries_grad": Launch(128, 4, 1),
    "noisy_keys_grad": Launch(128, 4, 1),
    "chunk_grad": Launch(64, 4, 1),
    "states_grad": Launch(64, 4, 2),
    "clean_queries_grad": Launch(128, 4, 1),
    "clean_keys_grad": Launch(128, 4, 1),
}

PER_TILE_OF_V = ("clean_states", "clean_outputs", "noisy_outputs", "chunk_grad", "states_grad")


@dataclass(frozen=True)
class Problem:
    """Sizes and flags of one call."""

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
    def least_columns(self) -> int:
        """Tiles of less than 128 bytes in a row are padded: Triton 3.6 reads shared memory out of bounds where it moves
        some of them from the layout of a load to that of a product (compute-sanitizer is clean from 128 bytes on)."""
        return 32 if self.dtype == torch.float32 else 64

    @property
    def block_k(self) -> int:
        return max(self.least_columns, int(triton.next_power_of_2(self.key_dim)))

    def tile_v(self, name: str) -> int:
        wide = self.block_k > 128 or self.dtype == torch.float32
        most = min(LAUNCHES[name].tile_v, 64) if wide else LAUNCHES[name].tile_v
        return int(min(most, max(self.least_columns, triton.next_power_of_2(self.value_dim))))

    def tiles_of_v(self, name: str) -> int:
        return -(-self.value_dim // self.tile_v(name))

    def flags(self, name: str) -> dict[str, Any]:
        """Values of the constexpr arguments, by name."""
        tile_v = self.tile_v(name)
        return {
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
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
        }

    def launch(self, name: str, kernel: Any, programs: int, operands: dict[str, Any], **more: Any) -> None:
        """Run `programs` programs (times the tiles of V if the kernel has them); its arguments are taken by name."""
        names = kernel.arg_names
        known = operands | self.flags(name) | more
        if name in PER_TILE_OF_V:
            programs *= self.tiles_of_v(name)
        if programs:
            launch = LAUNCHES[name]
            kernel[(programs,)](**{n: known[n] for n in names}, num_warps=launch.warps, num_stages=launch.stages)


def flat_tokens(x: Tensor) -> Tensor:
    """x [B, T, ...] itself if batch and token collapse into one axis and the last axis is dense, else a dense copy."""
    dense_rows = x.stride(-1) == 1 or x.shape[-1] == 1
    collapses = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if dense_rows and collapses else x.contiguous()


@dataclass(frozen=True)
class Saved:
    """What the backward reads beside the inputs.

    states [N, H, K, V]: entry state of each chunk. values [B, T, H, V]: Z (delta, else empty). inverse [N, H, C, C]
    (delta, else empty). gates: `chunk_gam`, `chunk_beta`, `tile_logs`, `tile_beta` of triton_gates.
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


def _tokens(like: Tensor, schedule: TileSchedule, *shape: int) -> Tensor:
    """[B, T, *shape]; zeros if there are padding slots, which no kernel writes."""
    make = torch.zeros if schedule.tokens_padded else torch.empty
    return make(schedule.rows, schedule.length, *shape, dtype=like.dtype, device=like.device)


def _operands(
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
)  # fmt: skip


def new_gates(schedule: TileSchedule, heads: int, scalar: bool, device: torch.device) -> tuple[Tensor, ...]:
    """Unwritten `GATE_NAMES` tensors; the log decays are empty unless there is one decay per head (scalar)."""
    n, m, c, r = schedule.chunks, schedule.tiles, schedule.chunk_size, schedule.tile_rows
    shapes = ((n, heads, c) if scalar else 0, (n, heads, c), (m, heads, 3, r) if scalar else 0, (m, heads, r))
    return tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)


def _gates(p: Problem, g: Tensor | None, beta: Tensor, operands: dict[str, Any], schedule: TileSchedule) -> None:
    """Fill `GATE_NAMES` and add them to the operands."""
    scalar = p.gate == 1
    operands |= dict(zip(GATE_NAMES, new_gates(schedule, p.heads, scalar, beta.device), strict=True))
    per_head = g if scalar and g is not None else beta  # without a decay per head it is not read
    gates = {"g": per_head, "g_token": per_head.stride(1), "beta": beta, "beta_token": beta.stride(1)}
    p.launch("chunk_gates", triton_gates.chunk_gates_kernel, schedule.chunks * p.heads, operands | gates)
    p.launch("tile_gates", triton_gates.tile_gates_kernel, schedule.tiles * -(-p.heads // 16), operands | gates)


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
    operands = _operands(p, q, k, v, values, schedule, scale)
    _gates(p, g, beta, operands, schedule)
    states = q.new_empty(chunks, heads, p.key_dim, p.value_dim)
    inverse = q.new_empty((chunks, heads, size, size) if delta else 0)
    last = q.new_zeros((schedule.rows, heads, p.key_dim, p.value_dim) if final else 0, dtype=torch.float32)
    out = _tokens(q, schedule, heads, p.value_dim)
    operands |= {"states": states, "inverse": inverse, "final": last, "out": out, "noisy_values": values}
    operands["initial"] = last if initial is None else initial.contiguous()

    read_by_queries = {}
    if p.gate == 2 and g is not None:
        operands |= triton_channel_launch.decay(p, g, operands, schedule)
        read_by_queries = {"weights": operands["query_weights"]}
    if delta:
        p.launch("clean_inverse", triton_clean.clean_inverse_kernel, chunks * heads, operands)
    p.launch(
        "clean_states", triton_clean.clean_states_kernel, schedule.documents * heads, operands,
        INITIAL=initial is not None, FINAL=final,
    )  # fmt: skip
    p.launch("clean_outputs", triton_clean.clean_outputs_kernel, chunks * heads, operands, **read_by_queries)
    p.launch("noisy_outputs", triton_noisy.noisy_outputs_kernel, tiles * heads, operands)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state (empty where there is none)."""
    p = Problem.of(q, v, g, schedule, delta, l2norm)
    chunks, tiles, heads, size = schedule.chunks, schedule.tiles, p.heads, p.chunk_size
    q, k, v = flat_tokens(q), flat_tokens(k), flat_tokens(v)
    z = saved.values if delta else v
    scalar = p.gate == 1
    row_shape = (tiles, heads, p.tile_rows) if scalar else (0,)
    chunk_shape = (chunks, heads, size) if scalar else (0,)
    state_shape = (schedule.rows, heads, p.key_dim, p.value_dim) if initial else (0,)
    grad_q, grad_k = _tokens(q, schedule, heads, p.key_dim), _tokens(k, schedule, heads, p.key_dim)
    grad_v, grad_beta = _tokens(v, schedule, heads, p.value_dim), _tokens(beta, schedule, heads)
    grad_g = q.new_empty(0) if g is None else _tokens(g, schedule, *g.shape[2:])
    grad_initial = torch.zeros(state_shape, dtype=torch.float32, device=q.device)
    operands = _operands(p, q, k, v, z, schedule, scale) | dict(zip(GATE_NAMES, saved.gates, strict=True))
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
        triton_channel_launch.backward(
            p, flat_tokens(g), operands, schedule, initial=initial, final=grad_final is not None
        )
        return _per_key_head(grad_q, p.group), _per_key_head(grad_k, p.group), grad_v, grad_g, grad_beta, grad_initial
    p.launch("noisy_queries_grad", triton_noisy_queries_grad.noisy_queries_grad_kernel, tiles * heads, operands)
    p.launch("noisy_keys_grad", triton_noisy_keys_grad.noisy_keys_grad_kernel, tiles * heads, operands)
    operands |= {
        "grad_states": torch.empty_like(saved.states),
        "grad_corrected": q.new_empty(chunks * size, heads, p.value_dim),
    }
    p.launch("chunk_grad", triton_chunk_grad.chunk_grad_kernel, chunks * heads, operands)
    p.launch(
        "states_grad", triton_states_grad.states_grad_kernel, schedule.documents * heads, operands, INITIAL=initial,
        FINAL=grad_final is not None,
    )  # fmt: skip
    p.launch("clean_queries_grad", triton_clean_grad.clean_queries_grad_kernel, chunks * heads, operands)
    p.launch("clean_keys_grad", triton_clean_grad.clean_keys_grad_kernel, chunks * heads, operands)
    return _per_key_head(grad_q, p.group), _per_key_head(grad_k, p.group), grad_v, grad_g, grad_beta, grad_initial


def _per_key_head(grad: Tensor, group: int) -> Tensor:
    return grad if group == 1 else grad.unflatten(2, (grad.shape[2] // group, group)).sum(dim=3)
