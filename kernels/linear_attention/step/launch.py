"""The decode step of linear attention as one Triton launch: commit, clean rows, noisy blocks, next pending rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flarec.errors import LayoutError, UsageError

from .kernel import PENDING_TILE, step_kernel
from .schedule import StepSchedule

MAX_DIM = 256
PROCESSORS = 132  # of an H100


@dataclass(frozen=True)
class StepConfig:
    """How a step is launched. gram_k, block_k: key channels per round of the products between rows, and with the state;
    block_v: value columns of a program.

    precision of float32 products: "tf32x3" (tensor cores, unit roundoff about 2^-21) or "ieee".
    """

    gram_k: int
    block_k: int
    block_v: int
    num_warps: int
    precision: str


def step_config(
    key_dim: int, value_dim: int, tile_rows: int, columns: int, channel_gate: bool, exact: bool
) -> StepConfig:
    """The launch for these sizes; columns = batch * heads * tiles, exact = float32 or float64 inputs.

    The numbers keep a program's live values in 255 registers per thread, and small batches spread over the GPU.
    """
    if tile_rows > 16:
        gram_k, block_k, block_v, num_warps = 32, 32, 32, 4 if tile_rows == 32 else 8
    elif channel_gate or exact:
        gram_k, block_k, block_v, num_warps = 64, 32, 64, 4
    else:
        gram_k, block_k, block_v, num_warps = 128, 64, 64, 4
    while block_v > 16 and columns * -(-value_dim // block_v) < PROCESSORS:
        block_v //= 2
    key_size, value_size = (max(16, triton.next_power_of_2(size)) for size in (key_dim, value_dim))
    return StepConfig(
        gram_k=min(gram_k, key_size),
        block_k=min(block_k, key_size),
        block_v=min(block_v, value_size),
        num_warps=num_warps,
        precision="ieee" if exact else "tf32x3",
    )


@torch.no_grad()
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
    schedule: StepSchedule,
    *,
    clean_length: int,
    scale: float,
    delta: bool,
    l2norm: bool,
    out: Sequence[Tensor] | None = None,
    overwrites: bool = False,
    config: StepConfig | None = None,
) -> tuple[Tensor, ...]:
    """Commit the accepted pending rows, run from that state, and leave this step's clean rows pending. No gradients.

    q, k [B, T, Hk, K], v [B, T, H, V], g None, [B, T, H] or [B, T, H, K] log decays (finite, <= 0), beta [B, T, H]:
    float16, bfloat16, float32 or float64 (then all arithmetic is float64); K, V <= 256. state [B, H, K, V] float32
    (float64 if computed so), pending_k [B, R, Hk, K], pending_d [B, R, H, V], pending_g as g with R rows, accepted [B]
    integers 0..R; R may be 0. Padding slots and pending rows from `accepted` on may hold anything.

    Returns (o [B, T, H, V] in q's dtype, state, pending_k, pending_d[, pending_g if g is given]) with the pending rows
    of the `clean_length` clean slots; o and pending rows are 0 on padding. All but o have the dtype of the arithmetic.
    `out` gives contiguous buffers for the results. They must not overlap the inputs, except that the next state may
    take the place of `state` if `schedule.tiles` is 1 (a program then owns what it overwrites). overwrites: it does,
    if `state` has the dtype of the arithmetic and is contiguous.

    Raises `UsageError` for sizes and buffers that do not fit together, `LayoutError` for another layout's schedule.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    dtype = torch.promote_types(dtype, state.dtype)
    _check(q, k, v, g, beta, state, pending_k, pending_d, pending_g, accepted, schedule, clean_length)
    rows, heads, key_dim, value_dim = state.shape
    shapes = [v.shape, state.shape, (rows, clean_length, *k.shape[2:]), (rows, clean_length, *v.shape[2:])]
    if g is not None:
        shapes.append((rows, clean_length, *g.shape[2:]))
    results = _results([*map(torch.Size, shapes)], q.dtype, dtype, q.device, out, state if overwrites else None)
    if rows == 0 or heads == 0:
        return results

    # the kernel addresses the elements of a row of q, k, v and channel gates as neighbours
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    g = g if g is None or g.ndim < 4 or g.stride(3) == 1 else g.contiguous()
    state, pending_k, pending_d = state.to(dtype).contiguous(), pending_k.contiguous(), pending_d.contiguous()
    pending_g = None if g is None or pending_g is None else pending_g.contiguous()
    strides = [0 if x is None else x.stride(i) for x in (q, k, v, g, beta) for i in range(3)]
    longest = max(max(strides[1::3]), heads * max(key_dim, value_dim)) * max(schedule.length, pending_d.shape[1])
    half = all(x.dtype in (torch.bfloat16, torch.float16) for x in (q, k, v)) and dtype == torch.float32
    gate = 0 if g is None else g.ndim - 2
    if config is None:
        columns = rows * heads * schedule.tiles
        config = step_config(key_dim, value_dim, schedule.tile_rows, columns, gate == 2, not half)
    programs = rows * heads * -(-value_dim // config.block_v) * schedule.tiles
    if max(longest, programs) >= 2**31:
        raise UsageError(f"a decode step of {rows} rows of {schedule.length} slots is too large; use fewer")
    step_kernel[(programs,)](
        q, k, v, g, beta, state, pending_k, pending_d, pending_g, accepted, schedule.row_table, schedule.tile_start,
        *results, *([None] if g is None else []),
        schedule.length, schedule.clean_length, schedule.tiles, pending_d.shape[1], *strides,
        scale=scale, H=heads, GROUP=heads // k.shape[2], K=key_dim, V=value_dim,
        T=schedule.tile_rows, BG=config.gram_k, BK=config.block_k, BV=config.block_v,
        ONE_TILE=schedule.tiles == 1, FEW_PENDING=pending_d.shape[1] <= PENDING_TILE.value,
        GATE=gate, DELTA=delta, L2NORM=l2norm, NATIVE=half and q.dtype == k.dtype,
        PRECISION=config.precision, CT=tl.float64 if dtype == torch.float64 else tl.float32,
        num_warps=config.num_warps, num_stages=1,
    )
    return results


def _results(
    shapes: list[torch.Size], first: torch.dtype, others: torch.dtype, device: torch.device,
    out: Sequence[Tensor] | None, state: Tensor | None,
) -> tuple[Tensor, ...]:
    """New tensors, the second of them `state` if it can be; or `out` after a check."""
    dtypes = [first] + [others] * (len(shapes) - 1)
    if out is None:
        made = [torch.empty(s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)]
        if state is not None and state.dtype == dtypes[1] and state.is_contiguous():
            made[1] = state
        return tuple(made)
    fits = len(out) == len(shapes) and all(
        x.shape == s and x.dtype == d and x.is_contiguous() for x, s, d in zip(out, shapes, dtypes, strict=True)
    )
    if not fits:
        raise UsageError(
            f"out must be contiguous tensors of shapes {[list(s) for s in shapes]} and dtypes {dtypes}; got "
            f"{[(list(x.shape), x.dtype) for x in out]}"
        )
    return tuple(out)


def _check(
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
    schedule: StepSchedule,
    clean_length: int,
) -> None:
    """Raise `UsageError` or `LayoutError` for operands that do not fit together."""
    rows, length, key_heads, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    if max(key_dim, value_dim) > MAX_DIM or heads % key_heads:
        raise UsageError(
            f"a decode step takes head dims up to {MAX_DIM} and value heads in groups of equal size; got "
            f"K = {key_dim}, V = {value_dim}, {heads} value heads, {key_heads} key heads"
        )
    if (schedule.rows, schedule.length, schedule.clean_length) != (rows, length, clean_length):
        raise LayoutError(
            f"the schedule is for {schedule.rows} rows of {schedule.clean_length} clean and {schedule.noisy_length} "
            f"noisy slots; the inputs have {rows} rows of {clean_length} and {length - clean_length}"
        )
    pending = pending_d.shape[1]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "k": (k, (rows, length, key_heads, key_dim)),
        "v": (v, (rows, length, heads, value_dim)),
        "beta": (beta, (rows, length, heads)),
        "state": (state, (rows, heads, key_dim, value_dim)),
        "pending_k": (pending_k, (rows, pending, key_heads, key_dim)),
        "pending_d": (pending_d, (rows, pending, heads, value_dim)),
        "accepted": (accepted, (rows,)),
    }
    if g is not None:
        channels = tuple(g.shape[2:])
        if channels not in ((heads,), (heads, key_dim)):
            raise UsageError(f"g has shape {list(g.shape)}; log decays are [B, T, H] or [B, T, H, K]")
        if pending_g is None:
            raise UsageError("a step with a gate needs pending_g, the log decays of the pending rows")
        expected["g"] = (g, (rows, length, *channels))
        expected["pending_g"] = (pending_g, (rows, pending, *channels))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise UsageError(f"{name} has shape {list(tensor.shape)}; this step needs {list(shape)}")
