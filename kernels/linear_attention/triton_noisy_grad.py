"""Gradients of the noisy rows: one program per (tile of rows, head). Equations and names as in docs/kernels.md.

Gates use the elementwise form: the gradient of a log decay that multiplies a row is that row times its gradient, which
does not cancel at strong decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    load_tile,
    log_weights,
    product_of_tiles,
    product_with_state,
    row_norm,
    store_tile,
    through_factor,
    unit_triangular_inverse,
)


@triton.jit
def chunk_vectors(chunk_gam, chunk_beta, C: tl.constexpr, GATE: tl.constexpr):
    """(gam, beta) [C] of the tile's chunk, after a barrier.

    Every phase of the kernel below loads its vectors and rows again. Kept, the compiler forms the matrices of decays and
    masks of all phases at the start, shares them, and spills.
    """
    tl.debug_barrier()
    column = tl.arange(0, C)
    b = tl.load(chunk_beta + column)
    gam = b  # without a gate per head it is not used
    if GATE == 1:
        gam = tl.load(chunk_gam + column)
    return gam, b


@triton.jit
def tile_vectors(tile_logs, tile_beta, R: tl.constexpr, GATE: tl.constexpr):
    """(t, e, c, beta) [R] of the tile's rows."""
    row = tl.arange(0, R)
    b = tl.load(tile_beta + row)
    t, e, c = b, b, b
    if GATE == 1:
        t, e, c = tl.load(tile_logs + row), tl.load(tile_logs + R + row), tl.load(tile_logs + 2 * R + row)
    return t, e, c, b


@triton.jit
def row_dot(a, rows, norm):
    """[n] of fp32 a and raw rows: a . (rows normalised)"""
    return tl.sum(a * rows.to(tl.float32), 1) * norm


@triton.jit(do_not_specialize=["tiles"])
def noisy_grad_kernel(
    q,
    k,
    clean_values,
    states,
    noisy_values,
    grad_out,
    grad_q,
    grad_k,
    grad_v,
    grad_g,
    grad_beta,
    grad_anchor,
    chunk_gam,
    chunk_beta,
    tile_logs,
    tile_beta,
    chunk_token,
    chunk_length,
    tile_chunk,
    tile_first,
    tile_count,
    tile_anchor,
    tile_start,
    tile_stop,
    tiles,
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
    LARGEST: tl.constexpr,
    GATE: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_q, grad_k [B,T,H,K], grad_v [B,T,H,V] (= E), grad_g, grad_beta [B,T,H] of the noisy rows, and grad_anchor
    [M, H, R]: what each row adds to the gradient of gam[anchor - 1]. noisy_values are Z~ (delta) or v."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    key_head = head // GROUP
    row, column = tl.arange(0, R), tl.arange(0, C)
    chunk = tl.load(tile_chunk + tile)
    clean_first = tl.load(chunk_token + chunk).to(tl.int64)
    clean_count = tl.load(chunk_length + chunk)
    meta = tile.to(tl.int64) * R + row
    first = tl.load(tile_first + tile).to(tl.int64)
    count = tl.load(tile_count + tile)
    chunk_head = chunk.to(tl.int64) * H + head
    tile_head = tile.to(tl.int64) * H + head
    state = states + chunk_head * key_dim * value_dim
    gams, betas = chunk_gam + chunk_head * C, chunk_beta + chunk_head * C
    logs, own_betas = tile_logs + tile_head * 3 * R, tile_beta + tile_head * R
    out_stride = H * value_dim
    error_base, out_base = grad_v + head * value_dim, grad_out + head * value_dim
    z_base, own_base = clean_values + head * z_head, noisy_values + head * z_head
    q_base, k_base = q + key_head * q_head, k + key_head * k_head
    row_i, row_j = row[:, None], row[None, :]

    # E = gradient of v~, and of beta~: back through the block's readout and solve. Matrices [m, l] are transposed.
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    start, stop = tl.load(tile_start + meta)[None, :], tl.load(tile_stop + meta)[None, :]
    rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
    other = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
    dtype = rows.dtype
    k_norm, q_norm = row_norm(rows, R, L2NORM), row_norm(other, R, L2NORM)
    weight = tl.dot(rows, tl.trans(other), input_precision=PRECISION)  # M
    factor = k_norm[:, None] * (q_norm * scale)[None, :]
    weight = (weight * (log_weights(-t, -e, (row_i >= start) & (row_i < stop), GATE) * factor)).to(dtype)
    if DELTA and LARGEST > 1:
        upper = tl.dot(rows, tl.trans(rows), input_precision=PRECISION)
        factor = (k_norm * own_b)[:, None] * k_norm[None, :]
        upper = upper * (log_weights(-t, -t, (row_i >= start) & (row_i < row_j), GATE) * factor)
        offset = row - tl.load(tile_start + meta)
        inverse = unit_triangular_inverse(upper, offset, True, R, LARGEST, PRECISION, dtype).to(dtype)
    beta_sum = tl.zeros([R], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        grad = load_tile(out_base + vt * BV, first, count, out_stride, width, R, BV, EXACT_V)
        error = tl.dot(weight, grad, input_precision=PRECISION) * own_b[:, None]
        if DELTA and LARGEST > 1:
            error = tl.dot(inverse, error.to(dtype), input_precision=PRECISION)
        own = load_tile(own_base + vt * BV, first, count, z_token, width, R, BV, EXACT_V)
        beta_sum += tl.sum(error * own.to(tl.float32), 1)
        store_tile(error_base + vt * BV, error, first, count, out_stride, width, R, BV, EXACT_V)
    tl.store(grad_beta + (first + row) * H + head, (beta_sum / own_b).to(grad_beta.dtype.element_ty), mask=row < count)

    # queries: what they read of the clean state at the anchor ...
    gam, clean_b = chunk_vectors(gams, betas, C, GATE)
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    grad_rows = product_with_state(out_base, state, first, count, out_stride, key_dim, value_dim, R, BK, BV, NV,
                                   EXACT_K, EXACT_V, PRECISION)  # fmt: skip
    if GATE == 1:
        grad_rows = grad_rows * tl.exp2(c + e)[:, None]
    weight = product_of_tiles(out_base, z_base, first, clean_first, count, clean_count, out_stride, z_token, value_dim, R, C, BV, NV, EXACT_V, PRECISION)
    rows = load_tile(k_base, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K)
    clean_norm = row_norm(rows, C, L2NORM)
    before = column[None, :] < tl.load(tile_anchor + meta)[:, None]
    weight = (weight * (log_weights(c + e, gam, before, GATE) * (clean_b * clean_norm)[None, :])).to(dtype)
    grad_rows = tl.dot(weight, rows, grad_rows, input_precision=PRECISION)
    if GATE == 1:
        other = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
        anchor_sum = row_dot(grad_rows, other, q_norm * scale)
    # ... and of their block
    tl.debug_barrier()
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    start, stop = tl.load(tile_start + meta)[:, None], tl.load(tile_stop + meta)[:, None]
    weight = product_of_tiles(out_base, own_base, first, first, count, count, out_stride, z_token, value_dim, R, R, BV, NV, EXACT_V, PRECISION)
    inside = (row_j >= start) & (row_j < stop)
    weight = (weight * (log_weights(e, t, inside, GATE) * (own_b * k_norm)[None, :])).to(dtype)
    rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
    grad_rows = tl.dot(weight, rows, grad_rows, input_precision=PRECISION) * scale
    other = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
    if GATE == 1:
        stop_sum = row_dot(grad_rows, other, q_norm)
    grad_rows = through_factor(grad_rows, other, q_norm, L2NORM)
    store_tile(grad_q + head * key_dim, grad_rows, first, count, H * key_dim, key_dim, R, BK, EXACT_K)

    # keys as rows of P and N (delta only)
    grad_rows = tl.zeros([R, BK], dtype=tl.float32)
    row_sum = tl.zeros([R], dtype=tl.float32)
    if DELTA:
        gam, clean_b = chunk_vectors(gams, betas, C, GATE)
        t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
        grad_rows = product_with_state(error_base, state, first, count, out_stride, key_dim, value_dim, R, BK, BV, NV,
                                       EXACT_K, EXACT_V, PRECISION)  # fmt: skip
        grad_rows = grad_rows * -tl.exp2(c + t)[:, None] if GATE == 1 else -grad_rows
        weight = product_of_tiles(error_base, z_base, first, clean_first, count, clean_count, out_stride, z_token, value_dim, R, C, BV, NV, EXACT_V, PRECISION)
        before = column[None, :] < tl.load(tile_anchor + meta)[:, None]
        weight = (weight * (log_weights(c + t, gam, before, GATE) * (-clean_b * clean_norm)[None, :])).to(dtype)
        rows = load_tile(k_base, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K)
        grad_rows = tl.dot(weight, rows, grad_rows, input_precision=PRECISION)
        if GATE == 1:
            other = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
            row_sum = row_dot(grad_rows, other, k_norm)
            anchor_sum += row_sum
        if LARGEST > 1:
            tl.debug_barrier()
            t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
            start = tl.load(tile_start + meta)
            weight = product_of_tiles(error_base, own_base, first, first, count, count, out_stride, z_token, value_dim, R, R, BV, NV, EXACT_V, PRECISION)
            strict = (row_j >= start[:, None]) & (row_j < row_i)
            weight = (weight * (log_weights(t, t, strict, GATE) * (-own_b * k_norm)[None, :])).to(dtype)
            rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
            grad_rows = tl.dot(weight, rows, grad_rows, input_precision=PRECISION)
            if GATE == 1:
                row_sum = row_dot(grad_rows, rows, k_norm)
            # ... and as columns of N
            tl.debug_barrier()
            t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
            start = tl.load(tile_start + meta)
            weight = product_of_tiles(own_base, error_base, first, first, count, count, z_token, out_stride, value_dim, R, R, BV, NV, EXACT_V, PRECISION)
            factor = own_b[:, None] * (-k_norm)[None, :]
            strict = (row_i >= start[None, :]) & (row_i < row_j)
            weight = (weight * (log_weights(-t, -t, strict, GATE) * factor)).to(dtype)
            rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
            grad_rows = tl.dot(weight, rows, grad_rows, input_precision=PRECISION)
    # keys as columns of M
    tl.debug_barrier()
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    weight = product_of_tiles(own_base, out_base, first, first, count, count, z_token, out_stride, value_dim, R, R, BV, NV, EXACT_V, PRECISION)
    factor = own_b[:, None] * (q_norm * scale)[None, :]
    inside = (row_i >= start[None, :]) & (row_i < stop[None, :])
    weight = (weight * (log_weights(-t, -e, inside, GATE) * factor)).to(dtype)
    other = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
    grad_rows = tl.dot(weight, other, grad_rows, input_precision=PRECISION)
    rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
    if GATE == 1:
        # a row's decay grows what it reads (row_sum) and shrinks what reads it (the rest of the total)
        gate_row = (2.0 * row_sum - row_dot(grad_rows, rows, k_norm))[:, None]
        up_to_here = (row_j >= start[:, None]) & (row_j <= row_i)
        inside = (row_j >= start[:, None]) & (row_j < stop[:, None])
        gate = tl.sum(tl.where(up_to_here, gate_row, 0.0) + tl.where(inside, stop_sum[:, None], 0.0), 0)
        tl.store(grad_g + (first + row) * H + head, gate.to(grad_g.dtype.element_ty), mask=row < count)
        tl.store(grad_anchor + tile_head * R + row, anchor_sum)
    grad_rows = through_factor(grad_rows, rows, k_norm, L2NORM)
    store_tile(grad_k + head * key_dim, grad_rows, first, count, H * key_dim, key_dim, R, BK, EXACT_K)
