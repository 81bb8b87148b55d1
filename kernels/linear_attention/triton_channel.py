"""Key-channel gates, forward: what the clean and noisy kernels read instead of q, k and g.

Decayed vectors in the compute dtype: exp(gam) k and exp(gam) q of clean rows, exp(c + t) k~ and exp(c + e) q~ of noisy
rows, exp(gam_C - gam) k ("tail"); and the pair weights A, A_q, P, Pq, N, M (names as in docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_channel_common import (
    block_columns,
    block_last,
    block_pairs,
    block_rows,
    exact_sums,
    load_picked,
    load_unit,
    prefix_columns,
    prefix_pairs,
    prefix_rows,
    triangle_factor,
    triangle_pairs,
    whole_norm,
)
from .triton_common import LOG2E, load_tile, store_tile


@triton.jit
def channel_clean_kernel(
    q,
    k,
    g,
    cumulative,
    decayed_q,
    decayed_k,
    tail_k,
    total,
    weights,
    query_weights,
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
    LEVELS: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (chunk, head). cumulative, decayed_q, decayed_k [B,T,H,K] of the clean rows; tail_k [N*C,H,K];
    total [N,H,K]; weights A (delta only) and query_weights A_q [N,H,C,C]."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    key_head = head // GROUP
    row = tl.arange(0, C)
    first, count = tl.load(chunk_token + chunk).to(tl.int64), tl.load(chunk_length + chunk)
    stride = H * key_dim
    chunk_head = chunk.to(tl.int64) * H + head
    k_base, q_base = k + key_head * k_head, q + key_head * q_head
    k_norm = whole_norm(k_base, first, count, k_token, key_dim, C, BK, EXACT_K, L2NORM)
    q_norm = whole_norm(q_base, first, count, q_token, key_dim, C, BK, EXACT_K, L2NORM)

    key_weight = tl.zeros([C, C], dtype=tl.float32)
    query_weight = tl.zeros([C, C], dtype=tl.float32)
    itself = tl.zeros([C], dtype=tl.float32)
    for s in range(NS):
        width = key_dim - s * BS
        place = head * key_dim + s * BS
        logs = cumulative + first * stride + place
        log = load_tile(g + head * g_head + s * BS, first, count, g_token, width, C, BS, EXACT_S).to(tl.float32) * LOG2E
        gam = exact_sums(row[:, None] >= row[None, :], log, 3)
        store_tile(cumulative + place, gam, first, count, stride, width, C, BS, EXACT_S)
        last = tl.sum(log, 0)
        column = s * BS + tl.arange(0, BS)
        tl.store(total + chunk_head * key_dim + column, tl.exp2(last), mask=column < key_dim)

        keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, C, BS, EXACT_S, L2NORM)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, C, BS, EXACT_S, L2NORM)
        dtype = keys.dtype
        grown = tl.exp2(gam)
        tail = tl.exp2(tl.minimum(last[None, :] - gam, 0.0))
        store_tile(decayed_q + place, queries.to(tl.float32) * grown, first, count, stride, width, C, BS, EXACT_S)
        if DELTA:
            store_tile(decayed_k + place, keys.to(tl.float32) * grown, first, count, stride, width, C, BS, EXACT_S)
        tail *= keys.to(tl.float32)
        store_tile(tail_k + place, tail, chunk.to(tl.int64) * C, count, stride, width, C, BS, EXACT_S)
        itself += tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
        tl.debug_barrier()  # the references below are rows of `cumulative` that other threads wrote
        for p in range(0, LEVELS):
            factor = triangle_factor(logs, gam, count, stride, width, p, C, BS, EXACT_S)
            pairs = triangle_pairs(p, C)
            x = (keys.to(tl.float32) * factor).to(dtype)
            across = tl.trans(x)
            if DELTA:
                key_weight += tl.where(pairs, tl.dot(x, across, input_precision=PRECISION), 0.0)
            x = (queries.to(tl.float32) * factor).to(dtype)
            query_weight += tl.where(pairs, tl.dot(x, across, input_precision=PRECISION), 0.0)
    query_weight = tl.where(row[:, None] == row[None, :], itself[:, None], query_weight)
    corner = chunk_head * C * C + row[:, None] * C + row[None, :]
    tl.store(query_weights + corner, query_weight.to(query_weights.dtype.element_ty))
    if DELTA:
        tl.store(weights + corner, key_weight.to(weights.dtype.element_ty))


@triton.jit
def channel_block_kernel(
    q,
    k,
    g,
    cumulative,
    block_weights,
    tile_first,
    tile_count,
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
    BLOCK_LEVELS: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inside the blocks of one (tile, head): cumulative [B,T,H,K] (t), block_weights [M,H,2,R,R] (N if DELTA, M)."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    key_head = head // GROUP
    row = tl.arange(0, R)
    meta = tile.to(tl.int64) * R + row
    first, count = tl.load(tile_first + tile).to(tl.int64), tl.load(tile_count + tile)
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    last = block_last(start, R)
    before, read = row - start, stop - start  # rows of the block that key and query read
    up_to_here = (row[None, :] >= start[:, None]) & (row[None, :] <= row[:, None])
    stride = H * key_dim
    k_base, q_base = k + key_head * k_head, q + key_head * q_head
    k_norm = whole_norm(k_base, first, count, k_token, key_dim, R, BK, EXACT_K, L2NORM)
    q_norm = whole_norm(q_base, first, count, q_token, key_dim, R, BK, EXACT_K, L2NORM)

    key_weight = tl.zeros([R, R], dtype=tl.float32)
    query_weight = tl.zeros([R, R], dtype=tl.float32)
    for s in range(NS):
        width = key_dim - s * BS
        place = cumulative + head * key_dim + s * BS
        logs = place + first * stride
        log = load_tile(g + head * g_head + s * BS, first, count, g_token, width, R, BS, EXACT_S).to(tl.float32) * LOG2E
        t = exact_sums(up_to_here, log, 3)
        store_tile(place, t, first, count, stride, width, R, BS, EXACT_S)
        tl.debug_barrier()  # rows of `cumulative` that other threads wrote are read from here on
        e = load_picked(logs, stop - 1, row < count, stride, width, BS, EXACT_S)
        keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, R, BS, EXACT_S, L2NORM)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, R, BS, EXACT_S, L2NORM)
        dtype = keys.dtype
        for p in range(0, BLOCK_LEVELS):
            used = ((read >> p) & 1) | ((before >> p) & 1) if DELTA else (read >> p) & 1
            if tl.max(used, 0) > 0:
                factor = block_columns(logs, t, start, last, count, stride, width, p, R, BS, EXACT_S)
                across = tl.trans((keys.to(tl.float32) * factor).to(dtype))
                if DELTA:
                    factor = block_rows(logs, t, before, start, stride, width, p, BS, EXACT_S)
                    x = (keys.to(tl.float32) * factor).to(dtype)
                    part = tl.dot(x, across, input_precision=PRECISION)
                    key_weight += tl.where(block_pairs(before, start, p, R), part, 0.0)
                factor = block_rows(logs, e, read, start, stride, width, p, BS, EXACT_S)
                x = (queries.to(tl.float32) * factor).to(dtype)
                part = tl.dot(x, across, input_precision=PRECISION)
                query_weight += tl.where(block_pairs(read, start, p, R), part, 0.0)
    corner = (tile.to(tl.int64) * H + head) * 2 * R * R + row[:, None] * R + row[None, :]
    if DELTA:
        tl.store(block_weights + corner, key_weight.to(block_weights.dtype.element_ty))
    tl.store(block_weights + corner + R * R, query_weight.to(block_weights.dtype.element_ty))


@triton.jit
def channel_prefix_kernel(
    q,
    k,
    cumulative,
    decayed_q,
    decayed_k,
    clean_weights,
    chunk_token,
    chunk_length,
    tile_chunk,
    tile_first,
    tile_count,
    tile_anchor,
    tile_stop,
    key_dim: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    NS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    LEVELS: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the clean stream to one (tile, head): decayed_q, decayed_k [B,T,H,K] of the noisy rows, clean_weights
    [M,H,2,R,C] (P with the delta rule, Pq). Reads `cumulative` of chunk and tile."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    key_head = head // GROUP
    row, column = tl.arange(0, R), tl.arange(0, C)
    chunk = tl.load(tile_chunk + tile)
    clean_first, clean_count = tl.load(chunk_token + chunk).to(tl.int64), tl.load(chunk_length + chunk)
    meta = tile.to(tl.int64) * R + row
    first, count = tl.load(tile_first + tile).to(tl.int64), tl.load(tile_count + tile)
    anchor, stop = tl.load(tile_anchor + meta), tl.load(tile_stop + meta)
    stride = H * key_dim
    k_base, q_base = k + key_head * k_head, q + key_head * q_head
    k_norm = whole_norm(k_base, first, count, k_token, key_dim, R, BK, EXACT_K, L2NORM)
    q_norm = whole_norm(q_base, first, count, q_token, key_dim, R, BK, EXACT_K, L2NORM)
    clean_norm = whole_norm(k_base, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K, L2NORM)

    key_weight = tl.zeros([R, C], dtype=tl.float32)
    query_weight = tl.zeros([R, C], dtype=tl.float32)
    for s in range(NS):
        width = key_dim - s * BS
        place = head * key_dim + s * BS
        logs = cumulative + place
        clean_logs = logs + clean_first * stride
        c = load_picked(clean_logs, anchor - 1, anchor > 0, stride, width, BS, EXACT_S)
        gam = load_tile(logs, clean_first, clean_count, stride, width, C, BS, EXACT_S)
        columns = load_unit(
            k_base + s * BS, clean_first, clean_count, clean_norm, k_token, width, C, BS, EXACT_S, L2NORM
        )
        dtype = columns.dtype
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, R, BS, EXACT_S, L2NORM)
        queries = queries.to(tl.float32) * tl.exp2(
            load_picked(logs + first * stride, stop - 1, row < count, stride, width, BS, EXACT_S)
        )
        at_anchor = tl.exp2(c)
        store_tile(decayed_q + place, queries * at_anchor, first, count, stride, width, R, BS, EXACT_S)
        if DELTA:
            keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, R, BS, EXACT_S, L2NORM)
            keys = keys.to(tl.float32) * tl.exp2(load_tile(logs, first, count, stride, width, R, BS, EXACT_S))
            store_tile(decayed_k + place, keys * at_anchor, first, count, stride, width, R, BS, EXACT_S)
        for p in range(0, LEVELS + 1):
            if tl.max((anchor >> p) & 1, 0) > 0:
                pairs = prefix_pairs(anchor, p, C)
                factor = prefix_columns(clean_logs, gam, clean_count, stride, width, p, C, BS, EXACT_S)
                across = tl.trans((columns.to(tl.float32) * factor).to(dtype))
                factor = prefix_rows(clean_logs, c, anchor, stride, width, p, BS, EXACT_S)
                if DELTA:
                    part = tl.dot((keys * factor).to(dtype), across, input_precision=PRECISION)
                    key_weight += tl.where(pairs, part, 0.0)
                part = tl.dot((queries * factor).to(dtype), across, input_precision=PRECISION)
                query_weight += tl.where(pairs, part, 0.0)
    corner = (tile.to(tl.int64) * H + head) * 2 * R * C + row[:, None] * C + column[None, :]
    if DELTA:
        tl.store(clean_weights + corner, key_weight.to(clean_weights.dtype.element_ty))
    tl.store(clean_weights + corner + R * C, query_weight.to(clean_weights.dtype.element_ty))
