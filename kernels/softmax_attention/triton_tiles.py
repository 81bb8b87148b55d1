"""Launch configurations of the softmax attention kernels, and the numbers that every launch passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class ScoreTiles:
    """Queries and keys per tile, warps per program, stages of the software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class LaunchTable:
    """A kernel's tiles each; `keys` of the key gradient divides the schedule's key tile, `queries` its QUERY_STEP."""

    forward: ScoreTiles
    query_gradient: ScoreTiles
    key_gradient: ScoreTiles


def launch_table(dim: int, value_dim: int, dtype: torch.dtype) -> LaunchTable:
    """Tiles that compile for sm_90 without spills inside a loop that matters (the widest float32 ones excepted)."""
    wide = max(dim, value_dim)
    if dtype == torch.float32:
        if wide <= 64:
            return LaunchTable(ScoreTiles(32, 32, 8, 1), ScoreTiles(32, 32, 8, 1), ScoreTiles(32, 32, 8, 1))
        if wide <= 128:
            return LaunchTable(ScoreTiles(32, 32, 8, 1), ScoreTiles(16, 16, 8, 1), ScoreTiles(32, 32, 8, 1))
        return LaunchTable(ScoreTiles(16, 16, 8, 1), ScoreTiles(16, 16, 8, 1), ScoreTiles(16, 16, 8, 1))
    if wide <= 64:
        return LaunchTable(ScoreTiles(128, 64, 4, 3), ScoreTiles(64, 64, 4, 3), ScoreTiles(64, 128, 8, 3))
    if wide <= 128:
        return LaunchTable(ScoreTiles(128, 64, 8, 3), ScoreTiles(128, 64, 8, 2), ScoreTiles(64, 128, 8, 2))
    return LaunchTable(ScoreTiles(128, 64, 8, 2), ScoreTiles(128, 32, 8, 2), ScoreTiles(32, 64, 8, 2))


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Factors (inner, to_base2): a score in base 2 is to_base2 * tanh(inner * q.k) with a softcap, else to_base2 *
    q.k."""
    if softcap is None:
        return scale, scale * math.log2(math.e)
    return scale / softcap, softcap * math.log2(math.e)


def precision(x: Tensor) -> str:
    """How products of this tensor are computed.

    Float32 without tensor cores: it serves exactness, and three TF32 products need more registers. Triton's interpreter
    multiplies the bits of bfloat16 numbers as integers, so there they are widened first.
    """
    if x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "widen"
    return "ieee" if x.dtype == torch.float32 else "tf32"
