"""Key-channel gates: `finish` for chunks and tiles that decay too much for one product.

Programs whose work those kernels do (`chunk_direct`, `tile_direct`) return at once. Noisy rows take two kernels here:
what a tile reads from the clean stream, then what it reads inside its blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import load_tile, store_tile
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
    exact_sums,
    key_head_rows,
    load_middle,
    load_picked,
    load_unit,
    not_above,
    not_above_one,
    pair_gradients,
    prefix_columns,
    prefix_pairs,
    prefix_rows,
    prefix_start,
    read_by,
    triangle_factor,
    triangle_pairs,
    whole_norm,
)


@triton.jit
def channel_prefix_finish_digits_kernel(
    q,
    k,
    cumulative,
    decayed_q,
    decayed_k,
    grad_clean_weights,
    grad_q,
    grad_k,
    grad_g,
    grad_keys,
    grad_gates,
    chunk_direct,
    tile_direct,
    chunk_token,
    chunk_length,
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
    PIECES: tl.constexpr,
):
    """What one (tile, head) reads from the clean stream: grad_q, grad_k (in: of decayed_q, decayed_k; out: of the unit
    rows) and grad_g [B,T,H,K] of the noisy rows without what they read inside the block, and the tile's share of the
    gradients of its chunk's unit keys and gam, grad_keys and grad_gates [M*C,H,K] (the clean kernel adds up)."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    chunk = tl.load(tile_chunk + tile)
    if tl.load(chunk_direct + chunk.to(tl.int64) * H + head) * tl.load(tile_direct + pid) != 0:
        return
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_first, clean_count = rows_of(chunk, chunk_token, chunk_length)
    meta = tile.to(tl.int64) * R + row
    first, count = rows_of(tile, tile_first, tile_count)
    stride = H * key_dim
    tile_head = tile.to(tl.int64) * H + head
    weight_place = grad_clean_weights + tile_head * 2 * R * C + row[:, None] * C + column[None, :]
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, R, BK, EXACT_K, L2NORM
    )
    clean_norm = whole_norm(k_base, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K, L2NORM)

    for s in range(NS):
        width = key_dim - s * BS
        place = head * key_dim + s * BS
        logs = cumulative + place
        # loaded for every slice: masks kept across slices would cost the registers of several matrices
        anchor = tl.load(tile_anchor + meta)
        start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
        own_logs, clean_logs = logs + first * stride, logs + clean_first * stride

        # through the chunk's entry state; gradients are of exp(e) q~ and exp(t) k~ until the end
        c = load_picked(clean_logs, anchor - 1, anchor > 0, stride, width, BS, EXACT_S)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, R, BS, EXACT_S, L2NORM)
        dtype = queries.dtype
        e = load_picked(own_logs, stop - 1, row < count, stride, width, BS, EXACT_S)
        grown_queries = queries.to(tl.float32) * tl.exp2(e)
        grad = load_tile(grad_q + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)
        queries_grad = grad * tl.exp2(c)
        queries_sum = grad * load_tile(decayed_q + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)
        if DELTA:
            keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, R, BS, EXACT_S, L2NORM)
            grown_keys = keys.to(tl.float32) * tl.exp2(load_tile(logs, first, count, stride, width, R, BS, EXACT_S))
            grad = load_tile(grad_k + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)
            keys_grad = grad * tl.exp2(c)
            keys_sum = grad * load_tile(decayed_k + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)

        # through the chunk's rows before the anchor
        gam = load_tile(logs, clean_first, clean_count, stride, width, C, BS, EXACT_S)
        columns = load_unit(
            k_base + s * BS, clean_first, clean_count, clean_norm, k_token, width, C, BS, EXACT_S, L2NORM
        )
        columns_grad = tl.zeros([C, BS], dtype=tl.float32)
        columns_sum = tl.zeros([C, BS], dtype=tl.float32)
        level = direct_level(clean_logs, clean_count, stride, width, C, BS, LEVELS, SPAN, EXACT_S)
        piece, digit = prefix_start(anchor, level, LEVELS)
        if level > 0:
            pairs = direct_prefix_pairs(anchor, piece, level, C)
            at = load_middle(clean_logs, column >> level, level, clean_count, stride, width, BS, EXACT_S)
            by_column = not_above(at - gam, SPAN)
            by_row = direct_prefix_rows(
                clean_logs, c, anchor, piece, level, clean_count, stride, width, BS, EXACT_S, SPAN
            )
            y = (columns.to(tl.float32) * by_column).to(dtype)
            x = (grown_queries * by_row).to(dtype)
            weight = tl.where(pairs, tl.load(weight_place + R * C), 0.0).to(dtype)
            of_rows, of_row_logs, of_columns, of_column_logs = pair_gradients(
                weight, x, y, by_row, by_column, PRECISION
            )
            queries_grad += of_rows
            queries_sum += of_row_logs
            columns_grad += of_columns
            columns_sum += of_column_logs
            if DELTA:
                x = (grown_keys * by_row).to(dtype)
                weight = tl.where(pairs, tl.load(weight_place), 0.0).to(dtype)
                of_rows, of_row_logs, of_columns, of_column_logs = pair_gradients(
                    weight, x, y, by_row, by_column, PRECISION
                )
                keys_grad += of_rows
                keys_sum += of_row_logs
                columns_grad += of_columns
                columns_sum += of_column_logs
        for p in range(digit, LEVELS + 1):
            if tl.max((anchor >> p) & 1, 0) > 0:
                pairs = prefix_pairs(anchor, p, C)
                by_column = prefix_columns(clean_logs, gam, clean_count, stride, width, p, C, BS, EXACT_S)
                by_row = prefix_rows(clean_logs, c, anchor, stride, width, p, BS, EXACT_S)
                y = (columns.to(tl.float32) * by_column).to(dtype)
                x = (grown_queries * by_row).to(dtype)
                weight = tl.where(pairs, tl.load(weight_place + R * C), 0.0).to(dtype)
                part = tl.dot(weight, y, input_precision=PRECISION)
                queries_grad += part * by_row
                queries_sum += part * x.to(tl.float32)
                part = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
                columns_grad += part * by_column
                columns_sum += part * y.to(tl.float32)
                if DELTA:
                    x = (grown_keys * by_row).to(dtype)
                    weight = tl.where(pairs, tl.load(weight_place), 0.0).to(dtype)
                    part = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
                    columns_grad += part * by_column
                    columns_sum += part * y.to(tl.float32)
                    part = tl.dot(weight, y, input_precision=PRECISION)
                    keys_grad += part * by_row
                    keys_sum += part * x.to(tl.float32)
        store_tile(grad_keys + place, columns_grad, tile.to(tl.int64) * C, clean_count, stride, width, C, BS, EXACT_S)
        both = queries_sum + keys_sum if DELTA else queries_sum
        gate = exact_sums(column[:, None] == anchor[None, :] - 1, both, PIECES) - columns_sum
        store_tile(grad_gates + place, gate, tile.to(tl.int64) * C, clean_count, stride, width, C, BS, EXACT_S)

        gate = exact_sums(read_by(start, stop, R), queries_sum, PIECES)
        queries_grad *= tl.exp2(load_picked(own_logs, stop - 1, row < count, stride, width, BS, EXACT_S))
        tl.debug_barrier()  # all threads have read the rows that are now overwritten
        store_tile(grad_q + place, queries_grad, first, count, stride, width, R, BS, EXACT_S)
        if DELTA:
            gate += exact_sums(read_by(start, row + 1, R), keys_sum, PIECES)
            keys_grad *= tl.exp2(load_tile(logs, first, count, stride, width, R, BS, EXACT_S))
            store_tile(grad_k + place, keys_grad, first, count, stride, width, R, BS, EXACT_S)
        store_tile(grad_g + place, gate, first, count, stride, width, R, BS, EXACT_S)


@triton.jit
def channel_block_finish_digits_kernel(
    q,
    k,
    cumulative,
    block_weights,
    grad_q,
    grad_k,
    grad_g,
    chunk_direct,
    tile_direct,
    tile_chunk,
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
    PIECES: tl.constexpr,
):
    """Adds to grad_q, grad_k, grad_g [B,T,H,K] of one (tile, head) what its rows read inside their blocks; then grad_q
    and grad_k go back through the normalisation."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    chunk = tl.load(tile_chunk + tile).to(tl.int64)
    if tl.load(chunk_direct + chunk * H + head) * tl.load(tile_direct + pid) != 0:
        return
    row = tl.arange(0, R)
    meta = tile.to(tl.int64) * R + row
    first, count = rows_of(tile, tile_first, tile_count)
    stride = H * key_dim
    tile_head = tile.to(tl.int64) * H + head
    weight_place = block_weights + tile_head * 2 * R * R + row[:, None] * R + row[None, :]
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, R, BK, EXACT_K, L2NORM
    )

    for s in range(NS):
        width = key_dim - s * BS
        place = head * key_dim + s * BS
        logs = cumulative + place
        # loaded for every slice: masks kept across slices would cost the registers of several matrices
        start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
        last = block_last(start, R)
        before, read = row - start, stop - start  # rows of the block that key and query read
        own_logs = logs + first * stride
        t = load_tile(logs, first, count, stride, width, R, BS, EXACT_S)
        e = load_picked(own_logs, stop - 1, row < count, stride, width, BS, EXACT_S)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, R, BS, EXACT_S, L2NORM)
        keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, R, BS, EXACT_S, L2NORM)
        dtype = keys.dtype
        queries_grad = tl.zeros([R, BS], dtype=tl.float32)
        queries_sum = tl.zeros([R, BS], dtype=tl.float32)
        keys_grad = tl.zeros([R, BS], dtype=tl.float32)
        keys_sum = tl.zeros([R, BS], dtype=tl.float32)
        at, span = blocks_span(own_logs, start, last, count, stride, width, R, BS, EXACT_S)
        if span <= SPAN:
            by_column, by_row = not_above(at - t, SPAN), not_above_one(e - at)
            y = (keys.to(tl.float32) * by_column).to(dtype)
            x = (queries.to(tl.float32) * by_row).to(dtype)
            weight = tl.where(direct_block_pairs(read, start, R), tl.load(weight_place + R * R), 0.0).to(dtype)
            of_rows, of_row_logs, of_columns, of_column_logs = pair_gradients(
                weight, x, y, by_row, by_column, PRECISION
            )
            queries_grad += of_rows
            queries_sum += of_row_logs
            keys_grad += of_columns
            keys_sum -= of_column_logs
            if DELTA:
                by_row = not_above_one(t - at)
                x = (keys.to(tl.float32) * by_row).to(dtype)
                weight = tl.where(direct_block_pairs(before, start, R), tl.load(weight_place), 0.0).to(dtype)
                of_rows, of_row_logs, of_columns, of_column_logs = pair_gradients(
                    weight, x, y, by_row, by_column, PRECISION
                )
                keys_grad += of_rows + of_columns
                keys_sum += of_row_logs - of_column_logs
        for p in range(tl.where(span <= SPAN, BLOCK_LEVELS, 0), BLOCK_LEVELS):
            used = ((read >> p) & 1) | ((before >> p) & 1) if DELTA else (read >> p) & 1
            if tl.max(used, 0) > 0:
                by_column = block_columns(own_logs, t, start, last, count, stride, width, p, R, BS, EXACT_S)
                by_row = block_rows(own_logs, e, read, start, stride, width, p, BS, EXACT_S)
                y = (keys.to(tl.float32) * by_column).to(dtype)
                x = (queries.to(tl.float32) * by_row).to(dtype)
                weight = tl.where(block_pairs(read, start, p, R), tl.load(weight_place + R * R), 0.0).to(dtype)
                part = tl.dot(weight, y, input_precision=PRECISION)
                queries_grad += part * by_row
                queries_sum += part * x.to(tl.float32)
                part = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
                keys_grad += part * by_column
                keys_sum -= part * y.to(tl.float32)
                if DELTA:
                    by_row = block_rows(own_logs, t, before, start, stride, width, p, BS, EXACT_S)
                    x = (keys.to(tl.float32) * by_row).to(dtype)
                    weight = tl.where(block_pairs(before, start, p, R), tl.load(weight_place), 0.0).to(dtype)
                    part = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
                    keys_grad += part * by_column
                    keys_sum -= part * y.to(tl.float32)
                    part = tl.dot(weight, y, input_precision=PRECISION)
                    keys_grad += part * by_row
                    keys_sum += part * x.to(tl.float32)
        gate = exact_sums(read_by(start, stop, R), queries_sum, PIECES)
        gate += exact_sums(read_by(start, row + 1, R), keys_sum, PIECES)
        gate += load_tile(grad_g + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)
        queries_grad += load_tile(grad_q + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)
        if DELTA:
            keys_grad += load_tile(grad_k + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)
        tl.debug_barrier()  # all threads have read the rows that are now overwritten
        store_tile(grad_q + place, queries_grad, first, count, stride, width, R, BS, EXACT_S)
        store_tile(grad_k + place, keys_grad, first, count, stride, width, R, BS, EXACT_S)
        store_tile(grad_g + place, gate, first, count, stride, width, R, BS, EXACT_S)


@triton.jit
def channel_clean_finish_digits_kernel(
    q,
    k,
    cumulative,
    decayed_q,
    decayed_k,
    tail_k,
    total,
    grad_tail,
    grad_total,
    weights,
    query_weights,
    grad_keys,
    grad_gates,
    grad_q,
    grad_k,
    grad_g,
    chunk_direct,
    chunk_token,
    chunk_length,
    chunk_tile,
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
    PIECES: tl.constexpr,
):
    """One program per (chunk, head): grad_q, grad_k (in: of decayed_q, decayed_k), grad_g [B,T,H,K] of clean rows."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    if tl.load(chunk_direct + pid) != 0:
        return
    row = tl.arange(0, C)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    begin, end = tl.load(chunk_tile + chunk), tl.load(chunk_tile + chunk + 1)
    stride = H * key_dim
    chunk_head = chunk.to(tl.int64) * H + head
    chunk_row = chunk.to(tl.int64) * C
    corner = chunk_head * C * C + row[:, None] * C + row[None, :]
    diagonal = row[:, None] == row[None, :]
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, C, BK, EXACT_K, L2NORM
    )
    itself = tl.sum(tl.where(diagonal, tl.load(query_weights + corner).to(tl.float32), 0.0), 1)

    for s in range(NS):
        width = key_dim - s * BS
        place = head * key_dim + s * BS
        logs = cumulative + place
        channel = s * BS + tl.arange(0, BS)
        gam = load_tile(logs, first, count, stride, width, C, BS, EXACT_S)
        queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, C, BS, EXACT_S, L2NORM)
        keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, C, BS, EXACT_S, L2NORM)
        dtype = keys.dtype

        # through the entry state
        grown = tl.exp2(gam)
        grad = load_tile(grad_q + place, first, count, stride, width, C, BS, EXACT_S).to(tl.float32)
        queries_grad = grad * grown + itself[:, None] * keys.to(tl.float32)
        keys_grad = itself[:, None] * queries.to(tl.float32)
        gate = grad * load_tile(decayed_q + place, first, count, stride, width, C, BS, EXACT_S).to(tl.float32)
        if DELTA:
            grad = load_tile(grad_k + place, first, count, stride, width, C, BS, EXACT_S).to(tl.float32)
            keys_grad += grad * grown
            gate += grad * load_tile(decayed_k + place, first, count, stride, width, C, BS, EXACT_S).to(tl.float32)

        # through the state at the end
        end_place = logs + (first + count - 1) * stride + tl.arange(0, BS)
        end_gam = tl.load(end_place, mask=channel < tl.where(count > 0, key_dim, 0), other=0.0)
        grad = load_tile(grad_tail + place, chunk_row, count, stride, width, C, BS, EXACT_S).to(tl.float32)
        keys_grad += grad * tl.exp2(tl.minimum(end_gam[None, :] - gam, 0.0))
        ends = grad * load_tile(tail_k + place, chunk_row, count, stride, width, C, BS, EXACT_S).to(tl.float32)
        gate -= ends
        at_end = tl.sum(ends, 0)
        passed = tl.load(total + chunk_head * key_dim + channel, mask=channel < key_dim, other=0.0)
        at_end += passed * tl.load(grad_total + chunk_head * key_dim + channel, mask=channel < key_dim, other=0.0)

        # pairs inside the chunk
        level = direct_level(logs + first * stride, count, stride, width, C, BS, LEVELS, SPAN, EXACT_S)
        if level > 0:
            at = load_middle(logs + first * stride, row >> level, level, count, stride, width, BS, EXACT_S)
            by_row, by_column = not_above(gam - at, SPAN), not_above(at - gam, SPAN)
            pairs = ((row >> level)[:, None] == (row >> level)[None, :]) & (row[:, None] > row[None, :])
            y = (keys.to(tl.float32) * by_column).to(dtype)
            x = (queries.to(tl.float32) * by_row).to(dtype)
            weight = tl.where(pairs, tl.load(query_weights + corner), 0.0).to(dtype)
            of_rows, of_row_logs, of_columns, of_column_logs = pair_gradients(
                weight, x, y, by_row, by_column, PRECISION
            )
            queries_grad += of_rows
            keys_grad += of_columns
            gate += of_row_logs - of_column_logs
            if DELTA:
                x = (keys.to(tl.float32) * by_row).to(dtype)
                weight = tl.where(pairs, tl.load(weights + corner), 0.0).to(dtype)
                of_rows, of_row_logs, of_columns, of_column_logs = pair_gradients(
                    weight, x, y, by_row, by_column, PRECISION
                )
                keys_grad += of_rows + of_columns
                gate += of_row_logs - of_column_logs
        # at each digit left a row either reads or is read
        for p in range(level, LEVELS):
            factor = triangle_factor(logs + first * stride, gam, count, stride, width, p, C, BS, EXACT_S)
            pairs = triangle_pairs(p, C)
            x = (keys.to(tl.float32) * factor).to(dtype)
            y = (queries.to(tl.float32) * factor).to(dtype)
            weight = tl.where(pairs, tl.load(query_weights + corner), 0.0).to(dtype)
            part = tl.dot(weight, x, input_precision=PRECISION)
            queries_grad += part * factor
            gate += part * y.to(tl.float32)
            # as columns the even pieces' rows get a part, as rows the odd pieces' rows
            part = tl.dot(tl.trans(weight), y, input_precision=PRECISION)
            keys_grad += part * factor
            gate -= part * x.to(tl.float32)
            if DELTA:
                weight = tl.where(pairs, tl.load(weights + corner), 0.0).to(dtype)
                part = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
                keys_grad += part * factor
                gate -= part * x.to(tl.float32)
                part = tl.dot(weight, x, input_precision=PRECISION)
                keys_grad += part * factor
                gate += part * x.to(tl.float32)

        for step in range(0, end - begin):
            part_first = (begin.to(tl.int64) + step) * C
            keys_grad += load_tile(grad_keys + place, part_first, count, stride, width, C, BS, EXACT_S).to(tl.float32)
            gate += load_tile(grad_gates + place, part_first, count, stride, width, C, BS, EXACT_S)
        real = row < tl.load(chunk_length + chunk)  # loaded here, so that no mask is kept across slices
        gate = exact_sums((row[:, None] <= row[None, :]) & real[None, :], gate, PIECES) + at_end[None, :]
        tl.debug_barrier()  # all threads have read what is now overwritten
        store_tile(grad_q + place, queries_grad, first, count, stride, width, C, BS, EXACT_S)
        store_tile(grad_k + place, keys_grad, first, count, stride, width, C, BS, EXACT_S)
        store_tile(grad_g + place, gate, first, count, stride, width, C, BS, EXACT_S)
