"""Sizes and flags of one call, and the launch of each kernel of the training forward and backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .schedule import TileSchedule


@dataclass(frozen=True)
class TileLaunch:
    """Columns of V per program, warps per program, depth of the software pipeline."""

    tile_v: int
    warps: int
    stages: int


# Measured on an H100 with K = V = 128 (benchmarks/NOTES.md); wider heads take narrower tiles of V.
LAUNCHES = {
    "chunk_gates": TileLaunch(16, 1, 1),
    "tile_gates": TileLaunch(16, 4, 1),
    "clean_inverse": TileLaunch(64, 4, 1),
    "clean_states": TileLaunch(64, 4, 2),
    "clean_outputs": TileLaunch(128, 4, 1),
    "prefill_solve": TileLaunch(128, 4, 1),
    "prefill_states": TileLaunch(64, 4, 2),
    "pending_keys": TileLaunch(64, 4, 1),
    "noisy_outputs": TileLaunch(128, 4, 1),
    "noisy_queries_grad": TileLaunch(128, 4, 1),
    "noisy_keys_grad": TileLaunch(128, 4, 1),
    "chunk_grad": TileLaunch(64, 4, 1),
    "states_grad": TileLaunch(64, 4, 2),
    "clean_queries_grad": TileLaunch(128, 4, 1),
    "clean_keys_grad": TileLaunch(128, 4, 1),
}
PER_TILE_OF_V = ("clean_states", "prefill_states", "clean_outputs", "noisy_outputs", "chunk_grad", "states_grad")


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
        )

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

    def launch(self, name: str, kernel: Any, programs: int, operands: dict[str, Any], **more: Any) -> None:
        """Run `programs` programs (times the tiles of V if the kernel has them); its arguments are taken by name."""
        names = kernel.arg_names
        known = operands | flags(self, name) | more
        if name in PER_TILE_OF_V:
            programs *= self.tiles_of_v(name)
        if programs:
            launch = LAUNCHES[name]
            kernel[(programs,)](**{n: known[n] for n in names}, num_warps=launch.warps, num_stages=launch.stages)


@functools.lru_cache(maxsize=1024)
def flags(p: Problem, name: str) -> dict[str, Any]:
    """Values of the constexpr arguments, by name: nobody writes into them. A prefill launches 7 kernels in each of many
    layers that are alike, and to compute this takes the host as long as a launch."""
    tile_v = p.tile_v(name)
    return {
        "H": p.heads,
        "GROUP": p.group,
        "BK": p.block_k,
        "BV": tile_v,
        "NV": p.tiles_of_v(name),
        "C": p.chunk_size,
        "R": p.tile_rows,
        "LARGEST": 1 if p.largest_block < 2 else triton.next_power_of_2(p.largest_block),
        "GATE": p.gate,
        "DELTA": p.delta,
        "L2NORM": p.l2norm,
        "EXACT_K": p.key_dim == p.block_k,
        "EXACT_V": p.value_dim % tile_v == 0,
        "PRECISION": "tf32x3" if p.dtype == torch.float32 else "tf32",
        "key_dim": p.key_dim,
        "value_dim": p.value_dim,
    }
