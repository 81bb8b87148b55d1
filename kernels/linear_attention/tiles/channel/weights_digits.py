"""Key-channel gates, forward: pair weights A, A_q, P, Pq, N, M of chunks and tiles that decay too much for one product.

Programs whose weights `weights` could form (`chunk_direct`, `tile_direct`) return at once. See
`pairs` for how the others cut their pairs into dense products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import load_tile
from ..places import rows_of
from .pairs import (
    block_columns,
    block_last,
    block_pairs,
    block_rows,
    blocks_span,
    direct_block_pairs,
    direct_level,
    direct_prefix_pairs,
    direct_prefix_rows,
    key_head_rows,
    load_middle,
    load_picked,
    load_unit,
    not_above,
    not_above_one,
    prefix_columns,
    prefix_pairs,
    prefix_rows,
    prefix_start,
    triangle_factor,
    triangle_pairs,
    whole_norm,
)


@triton.jit
def channel_clean_digits_kernel(
    q,
    k,
    cumulative,
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
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (chunk, head): weights A (delta only) and query_weights A_q [N,H,C,C]."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    if tl.load(chunk_direct + pid) != 0:
        return
    row = tl.arange(0, C)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    stride = H * key_dim
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, C, BK, EXACT_K, L2NORM
    )

    key_weight = tl.zeros([C, C], dtype=tl.float32)
    query_weight = tl.zeros([C, C], dtype=tl.float32)
    itself = tl.zeros([C], dtype=tl.float32)
    for s in range(NS):
        width = key_dim - s * BS
        logs = cumulative + first * stride + head * key_dim + s * BS
        gam = load_tile(logs, tl.cast(0, tl.int64), count, stride, width, C, BS, EXACT_S)
        keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, C, BS, EXACT_S, L2NORM)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, C, BS, EXACT_S, L2NORM)
        dtype = keys.dtype
        itself += tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
        level = direct_level(logs, count, stride, width, C, BS, LEVELS, SPAN, EXACT_S)
        if level > 0:
            at = load_middle(logs, row >> level, level, count, stride, width, BS, EXACT_S)
            grown, across = not_above(gam - at, SPAN), not_above(at - gam, SPAN)
            pairs = ((row >> level)[:, None] == (row >> level)[None, :]) & (row[:, None] > row[None, :])
            across = tl.trans((keys.to(tl.float32) * across).to(dtype))
            if DELTA:
                x = (keys.to(tl.float32) * grown).to(dtype)
                key_weight += tl.where(pairs, tl.dot(x, across, input_precision=PRECISION), 0.0)
            x = (queries.to(tl.float32) * grown).to(dtype)
            query_weight += tl.where(pairs, tl.dot(x, across, input_precision=PRECISION), 0.0)
        for p in range(level, LEVELS):
            factor = triangle_factor(logs, gam, count, stride, width, p, C, BS, EXACT_S)
            pairs = triangle_pairs(p, C)
            x = (keys.to(tl.float32) * factor).to(dtype)
            across = tl.trans(x)
            if DELTA:
                key_weight += tl.where(pairs, tl.dot(x, across, input_precision=PRECISION), 0.0)
            x = (queries.to(tl.float32) * factor).to(dtype)
            query_weight += tl.where(pairs, tl.dot(x, across, input_precision=PRECISION), 0.0)
    corner = pid.to(tl.int64) * C * C + row[:, None] * C + row[None, :]
    query_weight = tl.where(row[:, None] == row[None, :], itself[:, None], query_weight)
    tl.store(query_weights + corner, query_weight.to(query_weights.dtype.element_ty))
    if DELTA:
        tl.store(weights + corner, key_weight.to(weights.dtype.element_ty))


@triton.jit
def channel_block_digits_kernel(
    q,
    k,
    cumulative,
    block_weights,
    tile_direct,
    tile_first,
    tile_count,
    tile_start,
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
    R: tl.constexpr,
    BLOCK_LEVELS: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_S: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inside the blocks of one (tile, head): block_weights [M,H,2,R,R] (N if DELTA, M)."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    if tl.load(tile_direct + pid) != 0:
        return
    row = tl.arange(0, R)
    meta = tile.to(tl.int64) * R + row
    first, count = rows_of(tile, tile_first, tile_count)
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    last = block_last(start, R)
    before, read = row - start, stop - start  # rows of the block that key and query read
    stride = H * key_dim
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, R, BK, EXACT_K, L2NORM
    )

    key_weight = tl.zeros([R, R], dtype=tl.float32)
    query_weight = tl.zeros([R, R], dtype=tl.float32)
    for s in range(NS):
        width = key_dim - s * BS
        logs = cumulative + first * stride + head * key_dim + s * BS
        t = load_tile(logs, tl.cast(0, tl.int64), count, stride, width, R, BS, EXACT_S)
        e = load_picked(logs, stop - 1, row < count, stride, width, BS, EXACT_S)
        keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, R, BS, EXACT_S, L2NORM)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, R, BS, EXACT_S, L2NORM)
        dtype = keys.dtype
        at, span = blocks_span(logs, start, last, count, stride, width, R, BS, EXACT_S)
        if span <= SPAN:
            across = tl.trans((keys.to(tl.float32) * not_above(at - t, SPAN)).to(dtype))
            if DELTA:
                x = (keys.to(tl.float32) * not_above_one(t - at)).to(dtype)
                part = tl.dot(x, across, input_precision=PRECISION)
                key_weight += tl.where(direct_block_pairs(before, start, R), part, 0.0)
            x = (queries.to(tl.float32) * not_above_one(e - at)).to(dtype)
            part = tl.dot(x, across, input_precision=PRECISION)
            query_weight += tl.where(direct_block_pairs(read, start, R), part, 0.0)
        for p in range(tl.where(span <= SPAN, BLOCK_LEVELS, 0), BLOCK_LEVELS):
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
def channel_prefix_digits_kernel(
    q,
    k,
    cumulative,
    clean_weights,
    chunk_direct,
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
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the clean stream to one (tile, head): clean_weights [M,H,2,R,C] (P with the delta rule, Pq)."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    chunk = tl.load(tile_chunk + tile)
    if tl.load(chunk_direct + chunk.to(tl.int64) * H + head) != 0:
        return
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_first, clean_count = rows_of(chunk, chunk_token, chunk_length)
    meta = tile.to(tl.int64) * R + row
    first, count = rows_of(tile, tile_first, tile_count)
    anchor, stop = tl.load(tile_anchor + meta), tl.load(tile_stop + meta)
    stride = H * key_dim
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, R, BK, EXACT_K, L2NORM
    )
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
        if DELTA:
            keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, R, BS, EXACT_S, L2NORM)
            keys = keys.to(tl.float32) * tl.exp2(load_tile(logs, first, count, stride, width, R, BS, EXACT_S))
        level = direct_level(clean_logs, clean_count, stride, width, C, BS, LEVELS, SPAN, EXACT_S)
        piece, digit = prefix_start(anchor, level, LEVELS)
        if level > 0:
            pairs = direct_prefix_pairs(anchor, piece, level, C)
            at = load_middle(clean_logs, column >> level, level, clean_count, stride, width, BS, EXACT_S)
            across = tl.trans((columns.to(tl.float32) * not_above(at - gam, SPAN)).to(dtype))
            factor = direct_prefix_rows(
                clean_logs, c, anchor, piece, level, clean_count, stride, width, BS, EXACT_S, SPAN
            )
            if DELTA:
                part = tl.dot((keys * factor).to(dtype), across, input_precision=PRECISION)
                key_weight += tl.where(pairs, part, 0.0)
            part = tl.dot((queries * factor).to(dtype), across, input_precision=PRECISION)
            query_weight += tl.where(pairs, part, 0.0)
        for p in range(digit, LEVELS + 1):
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
