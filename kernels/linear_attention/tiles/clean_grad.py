"""Gradients of the clean rows, one program per (chunk, head): queries, then keys, beta and gates."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    load_matrix,
    load_tile,
    log_weights,
    product_of_tiles,
    product_with_state,
    row_dot,
    row_norm,
    store_tile,
    through_factor,
)
from .gates import chunk_vectors, tile_vectors
from .places import rows_of


@triton.jit(do_not_specialize=["chunks"])
def clean_queries_grad_kernel(
    q,
    k,
    clean_values,
    states,
    grad_out,
    grad_q,
    grad_gam,
    chunk_gam,
    chunk_beta,
    chunk_token,
    chunk_length,
    chunks,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    z_token: tl.constexpr,
    z_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_q [B,T,H,K] of the clean rows, and the queries' part of grad_gam [N, H, C]."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    key_head = head // GROUP
    row = tl.arange(0, C)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    chunk_head = pid.to(tl.int64)
    state = states + chunk_head * key_dim * value_dim
    out_stride = H * value_dim
    out_base, z_base = grad_out + head * value_dim, clean_values + head * z_head
    gam, b = chunk_vectors(chunk_gam + chunk_head * C, chunk_beta + chunk_head * C, C, GATE)

    grad_0 = load_tile(out_base, first, count, out_stride, value_dim, C, BV, EXACT_V)
    grad_rows = product_with_state(grad_0, out_base, state, first, count, out_stride, key_dim, value_dim, C, BK, BV, NV,
                                   EXACT_K, EXACT_V, PRECISION)
    queries = load_tile(q + key_head * q_head, first, count, q_token, key_dim, C, BK, EXACT_K)
    norm = row_norm(queries, C, L2NORM)
    reads = norm * scale
    grad_rows = grad_rows * (tl.exp2(gam) * reads if GATE == 1 else reads)[:, None]
    z_0 = load_tile(z_base, first, count, z_token, value_dim, C, BV, EXACT_V)
    weight = product_of_tiles(grad_0, z_0, out_base, z_base, first, first, count, count, out_stride, z_token, value_dim,
                              C, C, BV, NV, EXACT_V, PRECISION)
    keys = load_tile(k + key_head * k_head, first, count, k_token, key_dim, C, BK, EXACT_K)
    seen = row[:, None] >= row[None, :]
    factor = (b * row_norm(keys, C, L2NORM))[None, :] * reads[:, None]
    weight = (weight * (log_weights(gam, gam, seen, GATE) * factor)).to(keys.dtype)
    grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)
    queries = load_tile(q + key_head * q_head, first, count, q_token, key_dim, C, BK, EXACT_K)
    if GATE == 1:
        tl.store(grad_gam + chunk_head * C + row, row_dot(grad_rows, queries))
    grad_rows = through_factor(grad_rows, queries, norm, L2NORM)
    store_tile(grad_q + head * key_dim, grad_rows, first, count, H * key_dim, key_dim, C, BK, EXACT_K)


@triton.jit
def inner_product(a, b, SIZE: tl.constexpr):
    """Sum of a[i] b[i] in fp32, a small piece at a time: whole states would not fit in registers."""
    total = tl.zeros([1024], dtype=tl.float32)
    for begin in range(0, SIZE, 1024):
        place = begin + tl.arange(0, 1024)
        if SIZE % 1024 == 0:
            left, right = tl.load(a + place), tl.load(b + place)
        else:
            left = tl.load(a + place, mask=place < SIZE, other=0.0)
            right = tl.load(b + place, mask=place < SIZE, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["chunks"])
def clean_keys_grad_kernel(
    q,
    k,
    clean_values,
    states,
    grad_out,
    grad_states,
    grad_anchor,
    grad_gam,
    grad_k,
    grad_v,
    grad_g,
    grad_beta,
    chunk_gam,
    chunk_beta,
    tile_logs,
    tile_beta,
    chunk_token,
    chunk_length,
    chunk_tile,
    tile_first,
    tile_count,
    tile_anchor,
    chunks,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    z_token: tl.constexpr,
    z_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    GATE: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_k [B,T,H,K], grad_g, grad_beta [B,T,H] of the clean rows. grad_v holds E of all rows, grad_states the
    gradient of the state after each chunk, grad_gam the queries' part."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    key_head = head // GROUP
    row, reader = tl.arange(0, C), tl.arange(0, R)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    begin, end = tl.load(chunk_tile + chunk), tl.load(chunk_tile + chunk + 1)
    chunk_head = pid.to(tl.int64)
    state, after = states + chunk_head * key_dim * value_dim, grad_states + chunk_head * key_dim * value_dim
    gams, betas = chunk_gam + chunk_head * C, chunk_beta + chunk_head * C
    out_stride = H * value_dim
    error_base, out_base, z_base = grad_v + head * value_dim, grad_out + head * value_dim, clean_values + head * z_head
    q_base, k_base = q + key_head * q_head, k + key_head * k_head

    keys = load_tile(k_base, first, count, k_token, key_dim, C, BK, EXACT_K)
    z_0 = load_tile(z_base, first, count, z_token, value_dim, C, BV, EXACT_V)
    dtype = keys.dtype
    norm = row_norm(keys, C, L2NORM)

    # as rows of the chunk's own solve (delta only) ...
    grad_rows = tl.zeros([C, BK], dtype=tl.float32)
    row_sum = tl.zeros([C], dtype=tl.float32)
    if DELTA:
        gam, b = chunk_vectors(gams, betas, C, GATE)
        error_0 = load_tile(error_base, first, count, out_stride, value_dim, C, BV, EXACT_V)
        grad_rows = product_with_state(error_0, error_base, state, first, count, out_stride, key_dim, value_dim, C, BK,
                                       BV, NV, EXACT_K, EXACT_V, PRECISION)
        grad_rows = grad_rows * -(tl.exp2(gam) * norm if GATE == 1 else norm)[:, None]
        weight = product_of_tiles(error_0, z_0, error_base, z_base, first, first, count, count, out_stride, z_token,
                                  value_dim, C, C, BV, NV, EXACT_V, PRECISION)
        below = row[:, None] > row[None, :]
        factor = (-b * norm)[None, :] * norm[:, None]
        weight = (weight * (log_weights(gam, gam, below, GATE) * factor)).to(dtype)
        grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)
        if GATE == 1:
            row_sum = row_dot(grad_rows, load_tile(k_base, first, count, k_token, key_dim, C, BK, EXACT_K))
        # ... and as its columns
        tl.debug_barrier()
        gam, b = chunk_vectors(gams, betas, C, GATE)
        weight = product_of_tiles(z_0, error_0, z_base, error_base, first, first, count, count, z_token, out_stride,
                                  value_dim, C, C, BV, NV, EXACT_V, PRECISION)
        above = row[:, None] < row[None, :]
        factor = (-b * norm)[:, None] * norm[None, :]
        weight = (weight * (log_weights(-gam, -gam, above, GATE) * factor)).to(dtype)
        grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)

    # as columns of the next state
    tl.debug_barrier()
    gam, b = chunk_vectors(gams, betas, C, GATE)
    tail = tl.zeros([C, BK], dtype=tl.float32)
    beta_sum = tl.zeros([C], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        z = load_tile(z_base + vt * BV, first, count, z_token, width, C, BV, EXACT_V)
        error = load_tile(error_base + vt * BV, first, count, out_stride, width, C, BV, EXACT_V)
        beta_sum += tl.sum(error.to(tl.float32) * z.to(tl.float32), 1)
        next_grad = load_matrix(after + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        tail = tl.dot(z, tl.trans(next_grad), tail, input_precision=PRECISION)
    tl.store(grad_beta + (first + row) * H + head, (beta_sum / b).to(grad_beta.dtype.element_ty), mask=row < count)
    at_end = 0.0
    if GATE == 1:
        last = tl.load(gams + C - 1)
        tail = tail * (b * tl.exp2(last - gam) * norm)[:, None]
        # gam of the last row scales the entry state and everything that is added to it
        at_end = tl.sum(row_dot(tail, load_tile(k_base, first, count, k_token, key_dim, C, BK, EXACT_K)), 0)
        at_end += tl.exp2(last) * inner_product(state, after, key_dim * value_dim)
    else:
        tail = tail * (b * norm)[:, None]
    grad_rows += tail

    # as columns of what reads the chunk: its own queries, then the tiles
    tl.debug_barrier()
    gam, b = chunk_vectors(gams, betas, C, GATE)
    grad_0 = load_tile(out_base, first, count, out_stride, value_dim, C, BV, EXACT_V)
    weight = product_of_tiles(z_0, grad_0, z_base, out_base, first, first, count, count, z_token, out_stride, value_dim,
                              C, C, BV, NV, EXACT_V, PRECISION)
    queries = load_tile(q_base, first, count, q_token, key_dim, C, BK, EXACT_K)
    factor = (b * norm)[:, None] * (row_norm(queries, C, L2NORM) * scale)[None, :]
    weight = (weight * (log_weights(-gam, -gam, row[:, None] <= row[None, :], GATE) * factor)).to(dtype)
    grad_rows = tl.dot(weight, queries, grad_rows, input_precision=PRECISION)
    gam_sum = tl.zeros([C], dtype=tl.float32)
    for step in range(0, end - begin):
        tile = begin.to(tl.int64) + step
        tile_head = tile * H + head
        start = tl.load(tile_first + tile).to(tl.int64)
        rows = tl.load(tile_count + tile)
        anchor = tl.load(tile_anchor + tile * R + reader)
        gam, b = chunk_vectors(gams, betas, C, GATE)
        t, e, c, _ = tile_vectors(tile_logs + tile_head * 3 * R, tile_beta + tile_head * R, R, GATE)
        before = row[:, None] < anchor[None, :]
        if GATE == 1:
            at_anchor = tl.load(grad_anchor + tile_head * R + reader)
            gam_sum += tl.sum(tl.where(row[:, None] == anchor[None, :] - 1, at_anchor[None, :], 0.0), 1)
        grad_0 = load_tile(out_base, start, rows, out_stride, value_dim, R, BV, EXACT_V)
        weight = product_of_tiles(z_0, grad_0, z_base, out_base, first, start, count, rows, z_token, out_stride,
                                  value_dim, C, R, BV, NV, EXACT_V, PRECISION)
        queries = load_tile(q_base, start, rows, q_token, key_dim, R, BK, EXACT_K)
        factor = (b * norm)[:, None] * (row_norm(queries, R, L2NORM) * scale)[None, :]
        weight = (weight * (log_weights(-gam, -(c + e), before, GATE) * factor)).to(dtype)
        grad_rows = tl.dot(weight, queries, grad_rows, input_precision=PRECISION)
        if DELTA:
            error_0 = load_tile(error_base, start, rows, out_stride, value_dim, R, BV, EXACT_V)
            weight = product_of_tiles(z_0, error_0, z_base, error_base, first, start, count, rows, z_token, out_stride,
                                      value_dim, C, R, BV, NV, EXACT_V, PRECISION)
            queries = load_tile(k_base, start, rows, k_token, key_dim, R, BK, EXACT_K)
            factor = (b * norm)[:, None] * (-row_norm(queries, R, L2NORM))[None, :]
            weight = (weight * (log_weights(-gam, -(c + t), before, GATE) * factor)).to(dtype)
            grad_rows = tl.dot(weight, queries, grad_rows, input_precision=PRECISION)

    tl.debug_barrier()
    raw = load_tile(k_base, first, count, k_token, key_dim, C, BK, EXACT_K)
    if GATE == 1:
        # a row's decay grows what it reads (row_sum, the queries' part) and shrinks what reads it (the rest)
        gate = tl.load(grad_gam + chunk_head * C + row) + 2.0 * row_sum - row_dot(grad_rows, raw) + gam_sum
        gate = tl.cumsum(gate + tl.where(row == C - 1, at_end, 0.0), 0, reverse=True)
        tl.store(grad_g + (first + row) * H + head, gate.to(grad_g.dtype.element_ty), mask=row < count)
    grad_rows = through_factor(grad_rows, raw, norm, L2NORM)
    store_tile(grad_k + head * key_dim, grad_rows, first, count, H * key_dim, key_dim, C, BK, EXACT_K)
