"""Forward of softmax attention over a layout: one program per tile of queries and head, online softmax in base 2.

Also what both directions share: the intervals of a tile of queries and the tiles of keys between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_schedule import AttentionSchedule
from .triton_tiles import ScoreTiles, precision, score_factors


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy; 1 - 2 / (1 + exp(2x)) alone cancels near 0."""
    square = x * x
    series = -0.0539682540 + square * (0.0218694885 - 0.0088632355 * square)
    series = 1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * series))
    return tl.where(tl.abs(x) < 0.35, x * series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def query_tile(tile, clean_tiles, clean_length, length, BLOCK_M: tl.constexpr):
    """Slots of a tile of queries, and which of them exist. Tiles are counted over clean slots, then noisy ones, so
    that blocks start at tile borders whenever their size divides the tile's."""
    noisy = tile >= clean_tiles
    first = tl.where(noisy, clean_length + (tile - clean_tiles) * BLOCK_M, tile * BLOCK_M)
    slots = first + tl.arange(0, BLOCK_M)
    return first, slots, slots < tl.where(noisy, length, clean_length)


@triton.jit
def load_intervals(intervals_ptr, row, tokens, slots, exists, length):
    """Clean start, clean end, noisy start, noisy end [BLOCK_M] of a tile of queries; [length, 0) where nothing is
    read."""
    at = intervals_ptr + row.to(tl.int64) * length + slots
    clean_low = tl.load(at, mask=exists, other=length)
    clean_high = tl.load(at + tokens, mask=exists, other=0)
    noisy_low = tl.load(at + 2 * tokens, mask=exists, other=length)
    noisy_high = tl.load(at + 3 * tokens, mask=exists, other=0)
    return clean_low, clean_high, noisy_low, noisy_high


@triton.jit
def plan_keys(clean_low, clean_high, noisy_low, noisy_high, BLOCK_N: tl.constexpr):
    """Key tiles of a tile of queries, counted from the first clean key: tiles [lead, lead + full) are read by every
    row; `masked` others and `noisy` tiles of noisy keys need the mask."""
    first, last = tl.min(clean_low, 0), tl.max(clean_high, 0)
    all_first, all_last = tl.max(clean_low, 0), tl.min(clean_high, 0)
    count = tl.maximum(tl.cdiv(tl.maximum(last - first, 0), BLOCK_N), 0)
    lead = tl.minimum(tl.cdiv(tl.maximum(all_first - first, 0), BLOCK_N), count)
    full = tl.maximum(tl.maximum(all_last - first, 0) // BLOCK_N - lead, 0)
    noisy_first, noisy_last = tl.min(noisy_low, 0), tl.max(noisy_high, 0)
    noisy = tl.cdiv(tl.maximum(noisy_last - noisy_first, 0), BLOCK_N)
    return first, last, lead, full, count - full, noisy_first, noisy_last, noisy


@triton.jit
def masked_tile(index, first, last, lead, full, masked, noisy_first, noisy_last, BLOCK_N: tl.constexpr):
    """First key, end of the keys, and whether they are noisy, of the index-th tile that needs a mask."""
    is_noisy = index >= masked
    clean_start = first + tl.where(index < lead, index, index + full) * BLOCK_N
    start = tl.where(is_noisy, noisy_first + (index - masked) * BLOCK_N, clean_start)
    return start, tl.where(is_noisy, noisy_last, last), is_noisy


@triton.jit
def load_rows(base, start, stride, rows, columns, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows start + `rows` of a matrix with D columns [ROWS, BLOCK_D], 0 at and behind `limit` (if CHECK) and in the
    columns that pad D. Only the row's number is 64-bit arithmetic, once per tile."""
    at = base + start.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if CHECK:
        if D == BLOCK_D:
            return tl.load(at, mask=(start + rows < limit)[:, None], other=0.0)
        return tl.load(at, mask=(start + rows < limit)[:, None] & (columns < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def online_softmax(scores, value, total, peak, acc, to_base2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take one tile of scores [M, N] and values [N, DV] into the running sums."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * to_base2)
    # A row without a visible key so far has the peak -inf; subtracting it would give NaN.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores * to_base2 - shift[:, None])
    rescale = tl.exp2(peak - shift)
    total = total * rescale + tl.sum(weights, 1)
    acc = dot(weights.to(value.dtype), value, acc * rescale[:, None], PRECISION)
    return total, new_peak, acc


@triton.jit(do_not_specialize=["clean_length", "length", "clean_tiles", "tiles", "tokens", "key_heads"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, intervals_ptr,
    q_row, q_head, q_slot, k_row, k_head, k_slot, v_row, v_head, v_slot,
    inner, to_base2, key_heads, clean_length, length, tokens, clean_tiles, tiles,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):
    # Heads that share keys run side by side, tiles of one (row, key head) follow each other: their keys stay in L2.
    # Late tiles read most keys and go first, so that the short ones fill the end.
    program = tl.program_id(0)
    tile = tiles - 1 - (program // GROUP) % tiles
    pair = program // GROUP // tiles
    row, key_head = pair // key_heads, pair % key_heads
    head = key_head * GROUP + program % GROUP
    heads = key_heads * GROUP

    first_slot, slots, exists = query_tile(tile, clean_tiles, clean_length, length, BLOCK_M)
    clean_low, clean_high, noisy_low, noisy_high = load_intervals(intervals_ptr, row, tokens, slots, exists, length)
    real = (clean_high > clean_low) | (noisy_high > noisy_low)
    first, last, lead, full, masked, noisy_first, noisy_last, noisy = plan_keys(
        clean_low, clean_high, noisy_low, noisy_high, BLOCK_N
    )

    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_base = q_ptr + row.to(tl.int64) * q_row + head.to(tl.int64) * q_head + first_slot.to(tl.int64) * q_slot
    k_base = k_ptr + row.to(tl.int64) * k_row + key_head.to(tl.int64) * k_head
    v_base = v_ptr + row.to(tl.int64) * v_row + key_head.to(tl.int64) * v_head
    q = tl.load(
        q_base + (rows[:, None] * q_slot + columns[None, :]),
        mask=real[:, None] & (columns < D)[None, :],
        other=0.0,
    )

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for index in range(0, full):
        start = first + (lead + index) * BLOCK_N
        key = load_rows(k_base, start, k_slot, keys, columns, last, D, BLOCK_D, False)
        scores = dot(q, tl.trans(key), None, PRECISION)
        if SOFTCAP:
            scores = tanh(scores * inner)
        value = load_rows(v_base, start, v_slot, keys, value_columns, last, DV, BLOCK_DV, False)
        total, peak, acc = online_softmax(scores, value, total, peak, acc, to_base2, False, PRECISION)

    for index in range(0, masked + noisy):
        start, stop, is_noisy = masked_tile(index, first, last, lead, full, masked, noisy_first, noisy_last, BLOCK_N)
        low, high = tl.where(is_noisy, noisy_low, clean_low), tl.where(is_noisy, noisy_high, clean_high)
        key = load_rows(k_base, start, k_slot, keys, columns, stop, D, BLOCK_D, True)
        scores = dot(q, tl.trans(key), None, PRECISION)
        if SOFTCAP:
            scores = tanh(scores * inner)
        at = start + keys
        visible = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        value = load_rows(v_base, start, v_slot, keys, value_columns, stop, DV, BLOCK_DV, True)
        total, peak, acc = online_softmax(scores, value, total, peak, acc, to_base2, True, PRECISION)

    # Padding has no keys: total 0, peak -inf.
    total = tl.where(real, total, 1.0)
    out = tl.where(real[:, None], acc / total[:, None], 0.0)
    lse = tl.where(real, peak + tl.log2(total), 0.0)
    out_base = out_ptr + ((row.to(tl.int64) * length + first_slot) * heads + head) * DV
    tl.store(
        out_base + (rows[:, None] * (heads * DV) + value_columns[None, :]),
        out.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & (value_columns < DV)[None, :],
    )
    tl.store(lse_ptr + (row.to(tl.int64) * heads + head) * length + slots, lse, mask=exists)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: AttentionSchedule,
    *,
    scale: float,
    softcap: float | None,
    tiles: ScoreTiles,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, Dv] in q's dtype and log2 of the sums of 2^score [B, H, T] float32 (0 on padding).

    q [B, H, T, Dqk], k [B, Hkv, T, Dqk], v [B, Hkv, T, Dv], last stride 1.
    """
    rows, heads, length, dim = q.shape
    key_heads, value_dim = k.shape[1], v.shape[3]
    out = torch.empty(rows, length, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, length, dtype=torch.float32, device=q.device)
    clean_tiles = triton.cdiv(schedule.clean_length, tiles.queries)
    count = clean_tiles + triton.cdiv(length - schedule.clean_length, tiles.queries)
    programs = rows * heads * count
    if programs:
        forward_kernel[(programs,)](
            q, k, v, out, lse, schedule.intervals, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *score_factors(scale, softcap), key_heads, schedule.clean_length, length, rows * length, clean_tiles, count,
            GROUP=heads // key_heads, D=dim, DV=value_dim, BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_DV=triton.next_power_of_2(value_dim), BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
            SOFTCAP=softcap is not None, PRECISION=precision(q), num_warps=tiles.warps, num_stages=tiles.stages,
        )
    return out, lse
