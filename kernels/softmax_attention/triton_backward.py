"""Backward of softmax attention over a layout: gradients of queries per tile of queries, then of keys and values per
tile of keys. Both recompute the weights from the saved log sums; every element has one writer, so results repeat."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_schedule import QUERY_STEP, AttentionSchedule
from .triton_forward import dot, load_intervals, load_rows, masked_tile, plan_keys, query_tile, tanh
from .triton_tiles import ScoreTiles, precision, score_factors


@triton.jit
def score_gradients(q, key, value, grad, lse, delta, inner, to_base2, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of the scores [M, N] of one tile, without `scale` and not masked."""
    scores = dot(q, tl.trans(key), None, PRECISION)
    if SOFTCAP:
        scores = tanh(scores * inner)
    weights = tl.exp2(scores * to_base2 - lse[:, None])
    grad_weights = dot(grad, tl.trans(value), None, PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    if SOFTCAP:
        grad_scores = grad_scores * (1.0 - scores * scores)
    return grad_scores


@triton.jit(do_not_specialize=["clean_length", "length", "clean_tiles", "tiles", "tokens", "key_heads"])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, intervals_ptr,
    q_row, q_head, q_slot, k_row, k_head, k_slot, v_row, v_head, v_slot,
    grad_row, grad_slot, grad_head, dq_row, dq_head, dq_slot,
    inner, to_base2, scale, key_heads, clean_length, length, tokens, clean_tiles, tiles,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):
    program = tl.program_id(0)  # the order of `forward_kernel`
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
    row64, head64, slot64 = row.to(tl.int64), head.to(tl.int64), first_slot.to(tl.int64)
    k_base = k_ptr + row64 * k_row + key_head.to(tl.int64) * k_head
    v_base = v_ptr + row64 * v_row + key_head.to(tl.int64) * v_head
    q_mask = real[:, None] & (columns < D)[None, :]
    value_mask = real[:, None] & (value_columns < DV)[None, :]
    q_base = q_ptr + row64 * q_row + head64 * q_head + slot64 * q_slot
    q = tl.load(q_base + (rows[:, None] * q_slot + columns[None, :]), mask=q_mask, other=0.0)
    grad_base = grad_ptr + row64 * grad_row + head64 * grad_head + slot64 * grad_slot
    grad = tl.load(grad_base + (rows[:, None] * grad_slot + value_columns[None, :]), mask=value_mask, other=0.0)
    out_base = out_ptr + ((row64 * length + first_slot) * heads + head) * DV
    out = tl.load(out_base + (rows[:, None] * (heads * DV) + value_columns[None, :]), mask=value_mask, other=0.0)
    statistics = (row64 * heads + head) * length + slots
    lse = tl.load(lse_ptr + statistics, mask=exists, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=exists)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(0, full):
        start = first + (lead + index) * BLOCK_N
        key = load_rows(k_base, start, k_slot, keys, columns, last, D, BLOCK_D, False)
        value = load_rows(v_base, start, v_slot, keys, value_columns, last, DV, BLOCK_DV, False)
        grad_scores = score_gradients(q, key, value, grad, lse, delta, inner, to_base2, SOFTCAP, PRECISION)
        dq = dot(grad_scores.to(key.dtype), key, dq, PRECISION)

    for index in range(0, masked + noisy):
        start, stop, is_noisy = masked_tile(index, first, last, lead, full, masked, noisy_first, noisy_last, BLOCK_N)
        low, high = tl.where(is_noisy, noisy_low, clean_low), tl.where(is_noisy, noisy_high, clean_high)
        key = load_rows(k_base, start, k_slot, keys, columns, stop, D, BLOCK_D, True)
        value = load_rows(v_base, start, v_slot, keys, value_columns, stop, DV, BLOCK_DV, True)
        grad_scores = score_gradients(q, key, value, grad, lse, delta, inner, to_base2, SOFTCAP, PRECISION)
        at = start + keys
        visible = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
        grad_scores = tl.where(visible, grad_scores, 0.0)
        dq = dot(grad_scores.to(key.dtype), key, dq, PRECISION)

    dq_base = dq_ptr + row64 * dq_row + head64 * dq_head + slot64 * dq_slot
    tl.store(
        dq_base + (rows[:, None] * dq_slot + columns[None, :]),
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=exists[:, None] & (columns < D)[None, :],
    )


@triton.jit
def add_readers(
    dk, dv, key, value, low_ptr, high_ptr, q_base, grad_base, lse_base, delta_base, slot, stop, slots_of_keys,
    q_slot, grad_slot, rows, columns, value_columns, inner, to_base2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add what the queries slot..slot + BLOCK_M - 1 contribute to a tile of keys [N, D] and values: all of them, or if
    MASKED those below `stop` that read the key."""
    inside = slot + rows < stop
    q = load_rows(q_base, slot, q_slot, rows, columns, stop, D, BLOCK_D, MASKED)
    grad = load_rows(grad_base, slot, grad_slot, rows, value_columns, stop, DV, BLOCK_DV, MASKED)
    if MASKED:
        lse = tl.load(lse_base + slot + rows, mask=inside, other=0.0)
        delta = tl.load(delta_base + slot + rows, mask=inside, other=0.0)
    else:
        lse = tl.load(lse_base + slot + rows)
        delta = tl.load(delta_base + slot + rows)
    scores = dot(key, tl.trans(q), None, PRECISION)
    if SOFTCAP:
        scores = tanh(scores * inner)
    weights = tl.exp2(scores * to_base2 - lse[None, :])
    if MASKED:
        low = tl.load(low_ptr + slot + rows, mask=inside, other=0)
        high = tl.load(high_ptr + slot + rows, mask=inside, other=0)
        visible = (slots_of_keys[:, None] >= low[None, :]) & (slots_of_keys[:, None] < high[None, :])
        weights = tl.where(visible, weights, 0.0)
    dv = dot(weights.to(grad.dtype), grad, dv, PRECISION)
    grad_weights = dot(value, tl.trans(grad), None, PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    if SOFTCAP:
        grad_scores = grad_scores * (1.0 - scores * scores)
    dk = dot(grad_scores.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "clean_length", "length", "clean_tiles", "tiles", "all_tiles", "first_tile", "tokens", "key_heads",
    ]
)
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, intervals_ptr, offsets_ptr, ranges_ptr,
    q_row, q_head, q_slot, k_row, k_head, k_slot, v_row, v_head, v_slot,
    grad_row, grad_slot, grad_head, dk_row, dk_head, dk_slot, dv_row, dv_head, dv_slot,
    inner, to_base2, scale, key_heads, clean_length, length, tokens, clean_tiles, tiles, all_tiles, first_tile,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_TILE: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):
    # Early clean keys have most readers and go first; noisy keys, read by their own block alone, fill the end.
    PARTS: tl.constexpr = KEY_TILE // BLOCK_N
    program = tl.program_id(0)
    part = program % ((tiles - first_tile) * PARTS)
    pair = program // ((tiles - first_tile) * PARTS)
    row, key_head = pair // key_heads, pair % key_heads
    tile = first_tile + part // PARTS
    row64, key_head64 = row.to(tl.int64), key_head.to(tl.int64)
    heads = key_heads * GROUP

    is_noisy = tile >= clean_tiles
    first = tl.where(is_noisy, clean_length + (tile - clean_tiles) * KEY_TILE, tile * KEY_TILE) + part % PARTS * BLOCK_N
    keys, rows = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    slots = first + keys
    exists = slots < tl.where(is_noisy, length, clean_length)
    # A real token reads itself.
    low_ptr = intervals_ptr + tl.where(is_noisy, 2, 0) * tokens + row64 * length
    high_ptr = low_ptr + tokens
    real = tl.load(high_ptr + slots, mask=exists, other=0) > tl.load(low_ptr + slots, mask=exists, other=0)

    k_base = k_ptr + row64 * k_row + key_head64 * k_head + first.to(tl.int64) * k_slot
    v_base = v_ptr + row64 * v_row + key_head64 * v_head + first.to(tl.int64) * v_slot
    key = tl.load(
        k_base + (keys[:, None] * k_slot + columns[None, :]), mask=real[:, None] & (columns < D)[None, :], other=0.0
    )
    value = tl.load(
        v_base + (keys[:, None] * v_slot + value_columns[None, :]),
        mask=real[:, None] & (value_columns < DV)[None, :],
        other=0.0,
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    offset = offsets_ptr + row * tiles + tile
    partial_first, partial_last = tl.load(offset), tl.load(offset + 1)
    full_first, full_last = tl.load(offset + all_tiles + 1), tl.load(offset + all_tiles + 2)
    for member in range(0, GROUP):
        head64 = key_head64 * GROUP + member
        q_base = q_ptr + row64 * q_row + head64 * q_head
        grad_base = grad_ptr + row64 * grad_row + head64 * grad_head
        lse_base = lse_ptr + (row64 * heads + head64) * length
        delta_base = delta_ptr + (row64 * heads + head64) * length
        for index in range(partial_first, partial_last):
            begin, stop = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)
            for step in range(0, tl.cdiv(stop - begin, BLOCK_M)):
                slot = begin + step * BLOCK_M
                dk, dv = add_readers(
                    dk, dv, key, value, low_ptr, high_ptr, q_base, grad_base, lse_base, delta_base, slot, stop, slots,
                    q_slot, grad_slot, rows, columns, value_columns, inner, to_base2,
                    D, DV, BLOCK_D, BLOCK_DV, True, SOFTCAP, PRECISION,
                )
        for index in range(full_first, full_last):
            begin, stop = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)
            for step in range(0, tl.cdiv(stop - begin, BLOCK_M)):
                slot = begin + step * BLOCK_M
                dk, dv = add_readers(
                    dk, dv, key, value, low_ptr, high_ptr, q_base, grad_base, lse_base, delta_base, slot, stop, slots,
                    q_slot, grad_slot, rows, columns, value_columns, inner, to_base2,
                    D, DV, BLOCK_D, BLOCK_DV, False, SOFTCAP, PRECISION,
                )

    dk_base = dk_ptr + row64 * dk_row + key_head64 * dk_head + first.to(tl.int64) * dk_slot
    dv_base = dv_ptr + row64 * dv_row + key_head64 * dv_head + first.to(tl.int64) * dv_slot
    tl.store(
        dk_base + (keys[:, None] * dk_slot + columns[None, :]),
        tl.where(real[:, None], dk * scale, 0.0).to(dk_ptr.dtype.element_ty),
        mask=exists[:, None] & (columns < D)[None, :],
    )
    tl.store(
        dv_base + (keys[:, None] * dv_slot + value_columns[None, :]),
        tl.where(real[:, None], dv, 0.0).to(dv_ptr.dtype.element_ty),
        mask=exists[:, None] & (value_columns < DV)[None, :],
    )


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: AttentionSchedule,
    *,
    scale: float,
    softcap: float | None,
    query_tiles: ScoreTiles,
    key_tiles: ScoreTiles,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out as these; `out` and `lse` are `forward`'s, grad [B, T, H, Dv] has last stride
    1. frozen: those of noisy tokens alone, the others are 0."""
    rows, heads, length, dim = q.shape
    key_heads, value_dim = k.shape[1], v.shape[3]
    dq, dk, dv = ((torch.zeros_like if frozen else torch.empty_like)(x) for x in (q, k, v))
    delta = torch.empty_like(lse)
    clean, tokens = schedule.clean_length, rows * length
    constants = {
        "GROUP": heads // key_heads, "D": dim, "DV": value_dim, "BLOCK_D": triton.next_power_of_2(dim),
        "BLOCK_DV": triton.next_power_of_2(value_dim), "SOFTCAP": softcap is not None, "PRECISION": precision(q),
    }
    clean_count = 0 if frozen else triton.cdiv(clean, query_tiles.queries)
    count = clean_count + triton.cdiv(length - clean, query_tiles.queries)
    if not rows * heads * count:
        return dq, dk, dv
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    factors = (*score_factors(scale, softcap), scale)
    query_gradient_kernel[(rows * heads * count,)](
        q, k, v, out, grad, lse, delta, dq, schedule.intervals, *strides, *dq.stride()[:3], *factors,
        key_heads, clean, length, tokens, clean_count, count, **constants,
        BLOCK_M=query_tiles.queries, BLOCK_N=query_tiles.keys,
        num_warps=query_tiles.warps, num_stages=query_tiles.stages,
    )
    size = schedule.key_tile
    clean_count = triton.cdiv(clean, size)
    count = clean_count + triton.cdiv(length - clean, size)
    block = min(key_tiles.keys, size)
    first = clean_count if frozen else 0
    assert size % block == 0 and QUERY_STEP % key_tiles.queries == 0, (size, key_tiles)
    key_gradient_kernel[(rows * key_heads * (count - first) * (size // block),)](
        q, k, v, grad, lse, delta, dk, dv, schedule.intervals, schedule.reader_offsets, schedule.reader_ranges,
        *strides, *dk.stride()[:3], *dv.stride()[:3], *factors,
        key_heads, clean, length, tokens, clean_count, count, rows * count, first, **constants,
        BLOCK_M=key_tiles.queries, BLOCK_N=block, KEY_TILE=size,
        num_warps=key_tiles.warps, num_stages=key_tiles.stages,
    )
    return dq, dk, dv
