"""The decode step of softmax attention: the cache is read in place, split over programs, and the parts are combined."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from flarec.errors import UsageError
from flarec.layout import Layout

from ..triton_attention import supports
from ..triton_tiles import ScoreTiles, launch_table, precision, score_factors
from .kernel import FAR, attention_kernel, combine_kernel
from .prefill import prefill_kernel

PROCESSORS = 132  # of an H100
H100_SHARED = 227 * 1024
"""Bytes of shared memory of a program on an H100."""
MOST_SPLITS = 64
MANY_ROWS = 1024
"""(token, head) rows of a (request, key head) pair from which on a step is a prefill."""


@dataclass(frozen=True)
class StepLaunch:
    """queries: (token, head) rows of a program; keys: of a tile; splits: programs that share a row's cache; many: there
    are so many rows that most tiles of keys are read by all rows of a program (`prefill_kernel`)."""

    queries: int
    keys: int
    splits: int
    warps: int = 4
    stages: int = 2
    many: bool = False


@functools.lru_cache(maxsize=1024)  # asked by every layer of a step that is no replay
def launch_of(
    dtype: torch.dtype, dim: int, rows: int, pairs: int, capacity: int, room: int = H100_SHARED
) -> StepLaunch:
    """For `rows` (token, head) rows of each of `pairs` (request, key head) pairs, and a cache of `capacity` positions.

    Few rows in float32 have two programs per multiprocessor, if each gets four tiles of keys where the cache is full;
    in shorter dtypes what `_estimate` finds fastest. Many rows have the tiles of training, or smaller ones if these do
    not fit into `room` bytes of shared memory.
    """
    if rows >= MANY_ROWS:
        of = launch_table(dim, dim, dtype).forward
        smaller = (replace(of, keys=32), replace(of, keys=32, queries=64), replace(of, keys=32, queries=64, stages=1))
        of = next((tiles for tiles in (of, *smaller) if _shared(tiles, dim, dtype) <= room), smaller[-1])
        return StepLaunch(
            of.queries, of.keys, _splits(pairs * -(-rows // of.queries), capacity, of.keys), of.warps, of.stages, True
        )
    wide = dim > 128
    if dtype == torch.float32:
        most, keys = (16, 16) if wide else (32, 32)
        queries = min(most, max(16, triton.next_power_of_2(rows)))
        splits = _splits(pairs * -(-rows // queries), capacity, keys)
        return StepLaunch(queries, keys, splits, warps=8, stages=1)
    found = []
    for queries in (16, 64) if rows > 16 else (16,):
        programs = max(1, pairs * -(-rows // queries))
        counts = {1 << power for power in range(MOST_SPLITS.bit_length())}
        counts.add(max(1, min(MOST_SPLITS, 2 * PROCESSORS // programs)))  # as many as run at once
        # elsewhere four warps have too few registers for a tile of 64 rows
        warps = 8 if queries == 64 and room < H100_SHARED else 4
        found += [StepLaunch(queries, 32 if wide else 64, splits, warps) for splits in sorted(counts)]
    best = min(found, key=lambda launch: _estimate(launch, dim, rows, pairs, capacity))
    return replace(best, stages=1 if _tiles(best, capacity) <= 2 else 2)


TILE_TIMES = {16: 1.8, 64: 2.1}
"""Microseconds in which a program of so many rows takes a tile of keys, while the device is full of them."""
COMBINING, COMBINED_ROW, COMBINED_BYTE = 3.0, 2e-3, 4e-7
"""Microseconds that the combination of splits takes, per (token, head) row, and per byte of partial sums."""


def _tiles(launch: StepLaunch, capacity: int) -> int:
    """Tiles of keys of a program where three quarters of the cache are full, as they are on average while a step is
    replayed: its capacity is a power of two then."""
    return -(-3 * capacity // (4 * launch.keys * launch.splits))


def _estimate(launch: StepLaunch, dim: int, rows: int, pairs: int, capacity: int) -> float:
    """Microseconds on an H200, beside what every launch takes: fitted to times of `benchmarks/softmax_step.py`, whose
    record has dims of 256. The keys of the step itself are not counted. Infinite for more splits than run at once, or
    tiles of keys there are."""
    programs = pairs * -(-rows // launch.queries)
    waves = -(-programs * launch.splits // (2 * PROCESSORS))
    taking = waves * _tiles(launch, capacity) * TILE_TIMES[launch.queries]
    if launch.splits == 1:
        return taking
    if waves > 1 or launch.splits * launch.keys > capacity:
        return float("inf")
    return taking + COMBINING + pairs * rows * (COMBINED_ROW + COMBINED_BYTE * 4 * launch.splits * dim)


def _shared(tiles: ScoreTiles, dim: int, dtype: torch.dtype) -> int:
    """Bytes of shared memory of `prefill_kernel`: a tile of queries, and of keys and values as many as are on their way
    (as compiled for sm_90)."""
    width = triton.next_power_of_2(dim)
    return int((tiles.queries + 2 * tiles.keys * tiles.stages) * width * dtype.itemsize)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may take on this device; those of an H100 for what is no GPU."""
    if device.type != "cuda":
        return H100_SHARED
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _splits(programs: int, capacity: int, keys: int) -> int:
    return max(1, min(-(-2 * PROCESSORS // max(programs, 1)), capacity // (4 * keys), MOST_SPLITS))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention output [B, T, H, Dv] in q's dtype, 0 on padding, which is never read; meaning as in `reference_step`.

    q [B, H, T, Dqk], k [B, Hkv, T, Dqk], v [B, Hkv, T, Dv], caches [B, Hkv, M, D]: bfloat16, float16 or float32, sums
    float32. The layout's clean keys and values are written into the caches in place. Nothing is read from the device,
    so the layout is not checked: its clean tokens are those of document 0 at positions cached, cached + 1, ... < M.
    Raises `UsageError` for what `supports` refuses and for operands that do not belong together.
    """
    _check(q, k, v, k_cache, v_cache, layout, scale, softcap)
    out: Tensor = step_op(
        q, k, v, k_cache, v_cache, layout.clean_document, layout.clean_position, layout.noisy_block,
        layout.noisy_position, layout.block_anchor, layout.block_readout, layout.cached, scale, window, softcap,
    )
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, layout: Layout, scale: float,
    softcap: float | None,
) -> None:
    rows, heads, length, dim = q.shape
    key_heads, value_dim, capacity = v.shape[1], v.shape[3], k_cache.shape[2]
    fits = k.shape == (rows, key_heads, length, dim) and v.shape == (rows, key_heads, length, value_dim)
    fits &= k_cache.shape == (rows, key_heads, capacity, dim)
    fits &= v_cache.shape == (rows, key_heads, capacity, value_dim)
    if not fits or (layout.rows, layout.length) != (rows, length):
        raise UsageError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} and the caches {list(k_cache.shape)}, "
            f"{list(v_cache.shape)} do not fit a layout of {layout.rows} rows of {layout.length} tokens"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise UsageError(f"q, k and v have different dtypes: {q.dtype}, {k.dtype}, {v.dtype}")
    if softcap is not None and softcap <= 0:
        raise UsageError(f"a softcap of {softcap} is not positive")
    reason = supports(q.dtype, heads, key_heads, dim, value_dim, scale=scale)
    if reason is not None:
        raise UsageError(f"the Triton attention cannot run this: {reason}; use the torch implementation")


@torch.library.custom_op("flarec::softmax_attention_step", mutates_args=("k_cache", "v_cache"))
def step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    clean_document: Tensor,
    clean_position: Tensor,
    noisy_block: Tensor,
    noisy_position: Tensor,
    block_anchor: Tensor,
    block_readout: Tensor,
    cached: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`step` with the layout's tensors as operands."""
    launch = launch_of(
        q.dtype, max(q.shape[3], v.shape[3]), q.shape[1] // max(k.shape[1], 1) * q.shape[2], k.shape[0] * k.shape[1],
        k_cache.shape[2], shared_memory(q.device),
    )
    layout = (clean_document, clean_position, noisy_block, noisy_position, block_anchor, block_readout, cached)
    return run(q, k, v, k_cache, v_cache, layout, scale=scale, window=window, softcap=softcap, launch=launch)


@step_op.register_fake
def _(q, k, v, *_):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.no_grad()
def run(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, layout: tuple[Tensor, ...], *, scale: float,
    window: int | None, softcap: float | None, launch: StepLaunch,
) -> Tensor:
    """`step` by this launch; layout: the tensors of `step_op`, in its order."""
    rows, heads, length, dim = q.shape
    key_heads, value_dim = v.shape[1], v.shape[3]
    clean, noisy, blocks = layout[0].shape[1], layout[2].shape[1], layout[4].shape[1]
    q, k, v = (_last_stride_one(x) for x in (q, k, v))
    layout = tuple(x.contiguous() for x in layout)
    out = torch.empty(rows, length, heads, value_dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    split = launch.splits > 1
    part = torch.empty(launch.splits, *out.shape, dtype=torch.float32, device=q.device) if split else out
    sums = [torch.empty(launch.splits * rows * length * heads if split else 0, dtype=torch.float32, device=q.device)
            for _ in range(2)]
    group = heads // key_heads
    tiles = -(-length * group // launch.queries)
    strides = [stride for x in (q, k, v, k_cache, v_cache) for stride in x.stride()[:3]]
    value_block = triton.next_power_of_2(value_dim)
    kernel, more = (prefill_kernel, {"WINDOW": window is not None}) if launch.many else (attention_kernel, {})
    kernel[(rows * key_heads * tiles, launch.splits)](
        q, k, v, k_cache, v_cache, *layout, part, *sums, *strides, *score_factors(scale, softcap),
        key_heads, clean, noisy, blocks, k_cache.shape[2], window or FAR.value, tiles,
        GROUP=group, D=dim, DV=value_dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_DV=value_block,
        BLOCK_M=launch.queries, BLOCK_N=launch.keys, SPLIT=split, SOFTCAP=softcap is not None,
        PRECISION=precision(q), num_warps=launch.warps, num_stages=launch.stages, **more,
    )
    if split:
        combine_kernel[(rows * length * heads,)](
            part, *sums, out, rows * length * heads, launch.splits, DV=value_dim, BLOCK_DV=value_block,
            BLOCK_S=triton.next_power_of_2(launch.splits), num_warps=4,
        )
    return out
