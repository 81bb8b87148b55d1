"""Key-channel gates, forward: what the clean and noisy kernels read instead of q, k and g.

Decayed vectors in the compute dtype: exp(gam) k and exp(gam) q of clean rows, exp(c + t) k~ and exp(c + e) q~ of noisy
rows, exp(gam_C - gam) k ("tail"), exp(-gam) k ("shrunk"); and the pair weights A, A_q, P, Pq, N, M (names as in
docs/kernels.md).

Weights are plain products of decayed with shrunk rows. That is exact in floating point as long as exp(-gam) is a
normal number: while the decay of the chunk (for N and M: of every block of the tile) is at most SPAN bits in every
channel, as `chunk_direct` and `tile_direct` say. `weights_digits` replaces the weights of the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import LOG2E, load_tile, store_tile
from ..places import rows_of
from .pairs import direct_block_pairs, exact_sums, key_head_rows, load_picked, load_unit, not_above


@triton.jit
def channel_clean_kernel(
    q,
    k,
    g,
    cumulative,
    decayed_q,
    decayed_k,
    tail_k,
    shrunk_k,
    total,
    weights,
    query_weights,
    chunk_direct,
    chunk_token,
    chunk_length,
    key_dim: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    g_token: tl.constexpr,
    g_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    NS: tl.constexpr,
    C: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_S: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (chunk, head). cumulative, decayed_q, decayed_k [B,T,H,K] of the clean rows; tail_k, shrunk_k
    [N*C,H,K]; total [N,H,K]; weights A (delta only) and query_weights A_q [N,H,C,C]; chunk_direct [N,H] int32."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    row = tl.arange(0, C)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    stride = H * key_dim
    chunk_head, chunk_row = chunk.to(tl.int64) * H + head, chunk.to(tl.int64) * C
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, C, BK, EXACT_K, L2NORM
    )

    key_weight = tl.zeros([C, C], dtype=tl.float32)
    query_weight = tl.zeros([C, C], dtype=tl.float32)
    span = tl.zeros([BS], dtype=tl.float32)
    for s in range(NS):
        width = key_dim - s * BS
        place = head * key_dim + s * BS
        log = load_tile(g + head * g_head + s * BS, first, count, g_token, width, C, BS, EXACT_S).to(tl.float32) * LOG2E
        gam = exact_sums(row[:, None] >= row[None, :], log, 3)
        store_tile(cumulative + place, gam, first, count, stride, width, C, BS, EXACT_S)
        last = tl.sum(log, 0)
        span = tl.maximum(span, -last)
        column = s * BS + tl.arange(0, BS)
        tl.store(total + chunk_head * key_dim + column, tl.exp2(last), mask=column < key_dim)

        keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, C, BS, EXACT_S, L2NORM)
        dtype = keys.dtype
        keys = keys.to(tl.float32)
        tail = keys * tl.exp2(tl.minimum(last[None, :] - gam, 0.0))
        store_tile(tail_k + place, tail, chunk_row, count, stride, width, C, BS, EXACT_S)
        shrunk = (keys * not_above(-gam, SPAN)).to(dtype)
        store_tile(shrunk_k + place, shrunk, chunk_row, count, stride, width, C, BS, EXACT_S)
        across = tl.trans(shrunk)
        grown = tl.exp2(gam)
        if DELTA:
            x = (keys * grown).to(dtype)
            store_tile(decayed_k + place, x, first, count, stride, width, C, BS, EXACT_S)
            key_weight += tl.dot(x, across, input_precision=PRECISION)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, C, BS, EXACT_S, L2NORM)
        x = (queries.to(tl.float32) * grown).to(dtype)
        store_tile(decayed_q + place, x, first, count, stride, width, C, BS, EXACT_S)
        query_weight += tl.dot(x, across, input_precision=PRECISION)
    query_weight = tl.where(row[:, None] >= row[None, :], query_weight, 0.0)
    corner = chunk_head * C * C + row[:, None] * C + row[None, :]
    tl.store(query_weights + corner, query_weight.to(query_weights.dtype.element_ty))
    if DELTA:
        key_weight = tl.where(row[:, None] > row[None, :], key_weight, 0.0)
        tl.store(weights + corner, key_weight.to(weights.dtype.element_ty))
    tl.store(chunk_direct + chunk_head, (tl.max(span, 0) <= SPAN).to(tl.int32))


@triton.jit
def channel_block_kernel(
    q,
    k,
    g,
    cumulative,
    decayed_q,
    decayed_k,
    block_weights,
    tile_direct,
    chunk_token,
    tile_chunk,
    tile_first,
    tile_count,
    tile_anchor,
    tile_start,
    tile_stop,
    key_dim: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    g_token: tl.constexpr,
    g_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    NS: tl.constexpr,
    R: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_S: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of one (tile, head): cumulative (t), decayed_q, decayed_k [B,T,H,K]; block_weights [M,H,2,R,R] (N if DELTA,
    M); tile_direct [M,H] int32. Reads `cumulative` of the chunk."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    row = tl.arange(0, R)
    meta = tile.to(tl.int64) * R + row
    first, count = rows_of(tile, tile_first, tile_count)
    clean_first = tl.load(chunk_token + tl.load(tile_chunk + tile)).to(tl.int64)
    stride = H * key_dim
    tile_head = tile.to(tl.int64) * H + head
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, R, BK, EXACT_K, L2NORM
    )

    key_weight = tl.zeros([R, R], dtype=tl.float32)
    query_weight = tl.zeros([R, R], dtype=tl.float32)
    span = tl.zeros([R], dtype=tl.float32)
    for s in range(NS):
        width = key_dim - s * BS
        place = head * key_dim + s * BS
        # loaded for every slice: masks kept across slices would cost the registers of several matrices
        start, stop, anchor = tl.load(tile_start + meta), tl.load(tile_stop + meta), tl.load(tile_anchor + meta)
        log = load_tile(g + head * g_head + s * BS, first, count, g_token, width, R, BS, EXACT_S).to(tl.float32) * LOG2E
        t = exact_sums((row[None, :] >= start[:, None]) & (row[None, :] <= row[:, None]), log, 3)
        e = exact_sums((row[None, :] >= start[:, None]) & (row[None, :] < stop[:, None]), log, 3)
        store_tile(cumulative + place, t, first, count, stride, width, R, BS, EXACT_S)
        span = tl.maximum(span, tl.max(-t, 1))
        clean_logs = cumulative + clean_first * stride + place
        at_anchor = tl.exp2(load_picked(clean_logs, anchor - 1, anchor > 0, stride, width, BS, EXACT_S))

        keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, R, BS, EXACT_S, L2NORM)
        dtype = keys.dtype
        keys = keys.to(tl.float32)
        across = tl.trans((keys * not_above(-t, SPAN)).to(dtype))
        if DELTA:
            x = keys * tl.exp2(t)
            store_tile(decayed_k + place, x * at_anchor, first, count, stride, width, R, BS, EXACT_S)
            key_weight += tl.dot(x.to(dtype), across, input_precision=PRECISION)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, R, BS, EXACT_S, L2NORM)
        x = queries.to(tl.float32) * tl.exp2(e)
        store_tile(decayed_q + place, x * at_anchor, first, count, stride, width, R, BS, EXACT_S)
        query_weight += tl.dot(x.to(dtype), across, input_precision=PRECISION)
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    corner = tile_head * 2 * R * R + row[:, None] * R + row[None, :]
    if DELTA:
        key_weight = tl.where(direct_block_pairs(row - start, start, R), key_weight, 0.0)
        tl.store(block_weights + corner, key_weight.to(block_weights.dtype.element_ty))
    query_weight = tl.where(direct_block_pairs(stop - start, start, R), query_weight, 0.0)
    tl.store(block_weights + corner + R * R, query_weight.to(block_weights.dtype.element_ty))
    tl.store(tile_direct + tile_head, (tl.max(span, 0) <= SPAN).to(tl.int32))


@triton.jit
def channel_prefix_kernel(
    decayed_q,
    decayed_k,
    shrunk_k,
    clean_weights,
    chunk_direct,
    chunk_length,
    tile_chunk,
    tile_first,
    tile_count,
    tile_anchor,
    key_dim: tl.constexpr,
    H: tl.constexpr,
    BS: tl.constexpr,
    NS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    DELTA: tl.constexpr,
    EXACT_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the clean stream to one (tile, head): clean_weights [M,H,2,R,C] (P with the delta rule, Pq)."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    chunk = tl.load(tile_chunk + tile).to(tl.int64)
    if tl.load(chunk_direct + chunk * H + head) == 0:
        return
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_count = tl.load(chunk_length + chunk)
    first, count = rows_of(tile, tile_first, tile_count)
    anchor = tl.load(tile_anchor + tile.to(tl.int64) * R + row)
    stride = H * key_dim
    key_weight = tl.zeros([R, C], dtype=tl.float32)
    query_weight = tl.zeros([R, C], dtype=tl.float32)
    for s in tl.static_range(NS):
        width = key_dim - s * BS
        place = head * key_dim + s * BS
        y = load_tile(shrunk_k + place, chunk * C, clean_count, stride, width, C, BS, EXACT_S)
        across = tl.trans(y)
        if DELTA:
            x = load_tile(decayed_k + place, first, count, stride, width, R, BS, EXACT_S)
            key_weight = tl.dot(x, across, key_weight, input_precision=PRECISION)
        x = load_tile(decayed_q + place, first, count, stride, width, R, BS, EXACT_S)
        query_weight = tl.dot(x, across, query_weight, input_precision=PRECISION)
    read = column[None, :] < anchor[:, None]
    corner = (tile.to(tl.int64) * H + head) * 2 * R * C + row[:, None] * C + column[None, :]
    if DELTA:
        tl.store(clean_weights + corner, tl.where(read, key_weight, 0.0).to(clean_weights.dtype.element_ty))
    tl.store(clean_weights + corner + R * C, tl.where(read, query_weight, 0.0).to(clean_weights.dtype.element_ty))
