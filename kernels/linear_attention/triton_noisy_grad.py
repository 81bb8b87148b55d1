"""Gradients of the noisy rows: one program per (tile of rows, head). Equations and names as in docs/kernels.md.

Gates use the elementwise form: the gradient of a log decay that multiplies a row is that row times its gradient, which
does not cancel at strong decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    load_rows,
    log_weights,
    product_of_tiles,
    product_with_state,
    row_norm,
    store_rows,
    through_factor,
    unit_triangular_inverse,
)


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
    tile_token,
    tile_anchor,
    tile_start,
    tile_stop,
    tiles,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    q_token,
    q_head,
    k_token,
    k_head,
    z_token,
    z_head,
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
    clean_token = (tl.load(chunk_token + chunk) + column).to(tl.int64)
    clean_valid = column < tl.load(chunk_length + chunk)
    meta = tile.to(tl.int64) * R + row
    token = tl.load(tile_token + meta).to(tl.int64)
    valid = token >= 0
    anchor = tl.load(tile_anchor + meta)
    start = tl.load(tile_start + meta)
    stop = tl.load(tile_stop + meta)
    chunk_head = chunk.to(tl.int64) * H + head
    tile_head = tile.to(tl.int64) * H + head
    state = states + chunk_head * key_dim * value_dim
    clean_b = tl.load(chunk_beta + chunk_head * C + column)
    own_b = tl.load(tile_beta + tile_head * R + row)
    gam, t, e, c = clean_b, own_b, own_b, own_b  # without a gate per head they are not used
    if GATE == 1:
        gam = tl.load(chunk_gam + chunk_head * C + column)
        logs = tile_logs + tile_head * 3 * R + row
        t, e, c = tl.load(logs), tl.load(logs + R), tl.load(logs + 2 * R)
    before = column[None, :] < anchor[:, None]
    # the masks [l, m] of what a row reads of its block, and the same transposed, [m, l]
    strict = (row[None, :] >= start[:, None]) & (row[None, :] < row[:, None])
    inside = (row[None, :] >= start[:, None]) & (row[None, :] < stop[:, None])
    strict_t = (row[:, None] >= start[None, :]) & (row[:, None] < row[None, :])
    inside_t = (row[:, None] >= start[None, :]) & (row[:, None] < stop[None, :])
    out_stride = H * value_dim
    error_base, out_base = grad_v + head * value_dim, grad_out + head * value_dim
    z_base, own_base = clean_values + head * z_head, noisy_values + head * z_head

    # E = gradient of v~, and of beta~: back through the block's readout and solve
    noisy_keys = load_rows(k + key_head * k_head, token, valid, k_token, key_dim, BK, EXACT_K)
    queries = load_rows(q + key_head * q_head, token, valid, q_token, key_dim, BK, EXACT_K)
    dtype = queries.dtype
    k_norm, q_norm = row_norm(noisy_keys, R, L2NORM), row_norm(queries, R, L2NORM)
    weight = tl.dot(noisy_keys, tl.trans(queries), input_precision=PRECISION)  # M transposed
    factor = k_norm[:, None] * (q_norm * scale)[None, :]
    weight = (weight * (log_weights(-t, -e, inside_t, GATE) * factor)).to(dtype)
    if DELTA and LARGEST > 1:
        upper = tl.dot(noisy_keys, tl.trans(noisy_keys), input_precision=PRECISION)
        factor = (k_norm * own_b)[:, None] * k_norm[None, :]
        upper = upper * (log_weights(-t, -t, strict_t, GATE) * factor)
        inverse = unit_triangular_inverse(upper, row - start, True, R, LARGEST, PRECISION, dtype).to(dtype)
    beta_sum = tl.zeros([R], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        grad = load_rows(out_base + vt * BV, token, valid, out_stride, width, BV, EXACT_V)
        error = tl.dot(weight, grad, input_precision=PRECISION) * own_b[:, None]
        if DELTA and LARGEST > 1:
            error = tl.dot(inverse, error.to(dtype), input_precision=PRECISION)
        own = load_rows(own_base + vt * BV, token, valid, z_token, width, BV, EXACT_V)
        beta_sum += tl.sum(error * own.to(tl.float32), 1)
        store_rows(error_base + vt * BV, error, token, valid, out_stride, width, BV, EXACT_V)
    tl.store(grad_beta + token * H + head, (beta_sum / own_b).to(grad_beta.dtype.element_ty), mask=valid)
    tl.debug_barrier()  # E is read back below

    # queries: of the clean state at the anchor, then of the block
    keys = load_rows(k + key_head * k_head, clean_token, clean_valid, k_token, key_dim, BK, EXACT_K)
    clean_norm = row_norm(keys, C, L2NORM)
    grad_rows = product_with_state(out_base, state, token, valid, out_stride, key_dim, value_dim, R, BK, BV, NV,
                                   EXACT_K, EXACT_V, PRECISION)  # fmt: skip
    if GATE == 1:
        grad_rows = grad_rows * tl.exp2(c + e)[:, None]
    weight = product_of_tiles(out_base, z_base, token, clean_token, valid, clean_valid, out_stride, z_token,
                              tl.zeros([R, C], dtype=tl.float32), value_dim, BV, NV, EXACT_V, PRECISION)  # fmt: skip
    weight = (weight * (log_weights(c + e, gam, before, GATE) * (clean_b * clean_norm)[None, :])).to(dtype)
    grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)
    if GATE == 1:
        anchor_sum = tl.sum(grad_rows * queries.to(tl.float32), 1) * (q_norm * scale)
    weight = product_of_tiles(out_base, own_base, token, token, valid, valid, out_stride, z_token,
                              tl.zeros([R, R], dtype=tl.float32), value_dim, BV, NV, EXACT_V, PRECISION)  # fmt: skip
    weight = (weight * (log_weights(e, t, inside, GATE) * (own_b * k_norm)[None, :])).to(dtype)
    grad_rows = tl.dot(weight, noisy_keys, grad_rows, input_precision=PRECISION) * scale
    if GATE == 1:
        stop_sum = tl.sum(grad_rows * queries.to(tl.float32), 1) * q_norm
    grad_rows = through_factor(grad_rows, queries, q_norm, L2NORM)
    store_rows(grad_q + head * key_dim, grad_rows, token, valid, H * key_dim, key_dim, BK, EXACT_K)

    # keys as rows (of P and N, delta only)
    if DELTA:
        grad_rows = product_with_state(error_base, state, token, valid, out_stride, key_dim, value_dim, R, BK, BV, NV,
                                       EXACT_K, EXACT_V, PRECISION)  # fmt: skip
        grad_rows = grad_rows * -tl.exp2(c + t)[:, None] if GATE == 1 else -grad_rows
        weight = product_of_tiles(error_base, z_base, token, clean_token, valid, clean_valid, out_stride, z_token,
                                  tl.zeros([R, C], dtype=tl.float32), value_dim, BV, NV, EXACT_V, PRECISION)  # fmt: skip
        weight = (weight * (log_weights(c + t, gam, before, GATE) * (-clean_b * clean_norm)[None, :])).to(dtype)
        grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)
        if GATE == 1:
            row_sum = tl.sum(grad_rows * noisy_keys.to(tl.float32), 1) * k_norm
            anchor_sum += row_sum
        if LARGEST > 1:
            weight = product_of_tiles(error_base, own_base, token, token, valid, valid, out_stride, z_token,
                                      tl.zeros([R, R], dtype=tl.float32), value_dim, BV, NV, EXACT_V, PRECISION)  # fmt: skip
            weight = (weight * (log_weights(t, t, strict, GATE) * (-own_b * k_norm)[None, :])).to(dtype)
            grad_rows = tl.dot(weight, noisy_keys, grad_rows, input_precision=PRECISION)
            if GATE == 1:
                row_sum = tl.sum(grad_rows * noisy_keys.to(tl.float32), 1) * k_norm
            # keys as columns, of N
            weight = product_of_tiles(own_base, error_base, token, token, valid, valid, z_token, out_stride,
                                      tl.zeros([R, R], dtype=tl.float32), value_dim, BV, NV, EXACT_V, PRECISION)  # fmt: skip
            factor = own_b[:, None] * (-k_norm)[None, :]
            weight = (weight * (log_weights(-t, -t, strict_t, GATE) * factor)).to(dtype)
            grad_rows = tl.dot(weight, noisy_keys, grad_rows, input_precision=PRECISION)
    else:
        grad_rows = tl.zeros([R, BK], dtype=tl.float32)
        if GATE == 1:
            row_sum = tl.zeros([R], dtype=tl.float32)
    # ... and of M
    weight = product_of_tiles(own_base, out_base, token, token, valid, valid, z_token, out_stride,
                              tl.zeros([R, R], dtype=tl.float32), value_dim, BV, NV, EXACT_V, PRECISION)  # fmt: skip
    factor = own_b[:, None] * (q_norm * scale)[None, :]
    weight = (weight * (log_weights(-t, -e, inside_t, GATE) * factor)).to(dtype)
    grad_rows = tl.dot(weight, queries, grad_rows, input_precision=PRECISION)
    if GATE == 1:
        # a row's decay grows what it reads (row_sum) and shrinks what reads it (the rest of the total)
        gate_row = 2.0 * row_sum - tl.sum(grad_rows * noisy_keys.to(tl.float32), 1) * k_norm
        up_to_here = (row[None, :] >= start[:, None]) & (row[None, :] <= row[:, None])
        gate = tl.sum(tl.where(up_to_here, gate_row[:, None], 0.0) + tl.where(inside, stop_sum[:, None], 0.0), 0)
        tl.store(grad_g + token * H + head, gate.to(grad_g.dtype.element_ty), mask=valid)
        tl.store(grad_anchor + tile_head * R + row, anchor_sum)
    grad_rows = through_factor(grad_rows, noisy_keys, k_norm, L2NORM)
    store_rows(grad_k + head * key_dim, grad_rows, token, valid, H * key_dim, key_dim, BK, EXACT_K)
