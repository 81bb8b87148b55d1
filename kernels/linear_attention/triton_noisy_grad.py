"""Gradients of the noisy rows: one program per (tile of rows, head). Equations and names as in docs/kernels.md.

Gates use the elementwise form: the gradient of a log decay that multiplies a row is that row times its gradient, which
does not cancel at strong decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    load_beta,
    load_log_decay,
    load_matrix,
    load_rows,
    normalised,
    store_rows,
    through_norm,
    unit_lower_inverse,
)
from .triton_noisy import anchor_decay, block_sums, masked_decay


@triton.jit(do_not_specialize=["tiles"])
def noisy_grad_kernel(
    q,
    k,
    v,
    g,
    beta,
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
    chunk_token,
    chunk_length,
    tile_chunk,
    tile_token,
    tile_anchor,
    tile_start,
    tile_stop,
    tiles,
    scale,
    key_dim,
    value_dim,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    z_token,
    z_head,
    g_token,
    beta_token,
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
    [M, R, H]: what each row adds to the gradient of gam[anchor - 1]. noisy_values are Z~ (delta) or v."""
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
    state_base = states + (chunk.to(tl.int64) * H + head) * key_dim * value_dim
    before = column[None, :] < anchor[:, None]
    strict = (row[None, :] >= start[:, None]) & (row[None, :] < row[:, None])
    inside = (row[None, :] >= start[:, None]) & (row[None, :] < stop[:, None])

    b = load_beta(beta + head, clean_token, clean_valid, beta_token)
    noisy_b = load_beta(beta + head, token, valid, beta_token)
    if GATE == 1:
        gam = tl.cumsum(load_log_decay(g + head, clean_token, clean_valid, g_token), 0)
        t, e = block_sums(load_log_decay(g + head, token, valid, g_token), start, stop, R)
        c = anchor_decay(gam, anchor, C)
    else:
        gam, t, e, c = column * 0.0, row * 0.0, row * 0.0, row * 0.0
    noisy_keys = normalised(load_rows(k + key_head * k_head, token, valid, k_token, key_dim, BK, EXACT_K), L2NORM)
    queries = normalised(load_rows(q + key_head * q_head, token, valid, q_token, key_dim, BK, EXACT_K), L2NORM)
    dtype = queries.dtype

    # E = gradient of v~, and of beta~: through the block's own readout and solve
    weight = tl.dot(noisy_keys, tl.trans(queries), input_precision=PRECISION)  # M transposed: [m, l]
    decay = tl.where(tl.trans(inside), 1.0, 0.0)
    if GATE == 1:
        decay = tl.where(tl.trans(inside), tl.exp2(tl.where(tl.trans(inside), e[None, :] - t[:, None], 0.0)), 0.0)
    weight = (weight * decay * scale).to(dtype)
    inverse = tl.zeros([R, R], dtype=dtype)
    if DELTA and LARGEST > 1:
        lower = tl.dot(noisy_keys, tl.trans(noisy_keys), input_precision=PRECISION)
        lower = lower * masked_decay(t, t, strict, GATE) * noisy_b[None, :]
        inverse = tl.trans(unit_lower_inverse(lower, row - start, R, LARGEST, PRECISION)).to(dtype)
    beta_sum = tl.zeros([R], dtype=tl.float32)
    grad_clean = tl.zeros([R, C], dtype=tl.float32)  # of Pq
    grad_block = tl.zeros([R, R], dtype=tl.float32)  # of M
    rows_grad = tl.zeros([R, BK], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        grad = load_rows(grad_out + head * value_dim + vt * BV, token, valid, H * value_dim, width, BV, EXACT_V)
        error = tl.dot(weight, grad, input_precision=PRECISION)
        error = error * noisy_b[:, None]
        if DELTA and LARGEST > 1:
            error = tl.dot(inverse, error.to(dtype), input_precision=PRECISION)
        z = load_rows(noisy_values + head * z_head + vt * BV, token, valid, z_token, width, BV, EXACT_V)
        beta_sum += tl.sum(error * z.to(tl.float32), 1)
        store_rows(grad_v + head * value_dim + vt * BV, error, token, valid, H * value_dim, width, BV, EXACT_V)
        own = (z.to(tl.float32) * noisy_b[:, None]).to(dtype)
        grad_block += tl.dot(grad, tl.trans(own), input_precision=PRECISION)
        clean_z = load_rows(clean_values + head * z_head + vt * BV, clean_token, clean_valid, z_token, width, BV, EXACT_V)
        corrected = (clean_z.to(tl.float32) * b[:, None]).to(dtype)
        grad_clean += tl.dot(grad, tl.trans(corrected), input_precision=PRECISION)
        state = load_matrix(state_base + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        rows_grad += tl.dot(grad, tl.trans(state), input_precision=PRECISION)
    tl.store(grad_beta + token * H + head, (beta_sum / noisy_b).to(grad_beta.dtype.element_ty), mask=valid)

    # queries: of the clean state at the anchor, then of the block
    keys = normalised(load_rows(k + key_head * k_head, clean_token, clean_valid, k_token, key_dim, BK, EXACT_K), L2NORM)
    if GATE == 1:
        rows_grad = rows_grad * tl.exp2(c + e)[:, None]
    grad_clean = (grad_clean * masked_decay(c + e, gam, before, GATE)).to(dtype)
    rows_grad += tl.dot(grad_clean, keys, input_precision=PRECISION)
    if GATE == 1:
        anchor_sum = tl.sum(rows_grad * queries.to(tl.float32), 1) * scale
    grad_block = (grad_block * masked_decay(e, t, inside, GATE)).to(dtype)
    rows_grad += tl.dot(grad_block, noisy_keys, input_precision=PRECISION)
    rows_grad = rows_grad * scale
    if GATE == 1:
        stop_sum = tl.sum(rows_grad * queries.to(tl.float32), 1)
    column_grad = tl.dot(tl.trans(grad_block), queries, input_precision=PRECISION) * scale
    raw = load_rows(q + key_head * q_head, token, valid, q_token, key_dim, BK, EXACT_K)
    store_rows(grad_q + head * key_dim, through_norm(rows_grad, raw, L2NORM), token, valid, H * key_dim, key_dim, BK,
               EXACT_K)

    # keys: as rows (of P and N, delta only), and as columns (of N and M)
    if GATE == 1:
        row_sum = tl.zeros([R], dtype=tl.float32)
    if DELTA:
        rows_grad = tl.zeros([R, BK], dtype=tl.float32)
        grad_clean = tl.zeros([R, C], dtype=tl.float32)  # of -P
        grad_block = tl.zeros([R, R], dtype=tl.float32)  # of -N
        if NV > 1:
            tl.debug_barrier()  # E of the other tiles of V comes back from memory
        for vt in tl.static_range(NV):
            width = value_dim - vt * BV
            if NV == 1:
                rounded = error.to(dtype)
            else:
                rounded = load_rows(grad_v + head * value_dim + vt * BV, token, valid, H * value_dim, width, BV, EXACT_V)
            state = load_matrix(state_base + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
            rows_grad += tl.dot(rounded, tl.trans(state), input_precision=PRECISION)
            clean_z = load_rows(clean_values + head * z_head + vt * BV, clean_token, clean_valid, z_token, width, BV,
                                EXACT_V)
            corrected = (clean_z.to(tl.float32) * b[:, None]).to(dtype)
            grad_clean += tl.dot(rounded, tl.trans(corrected), input_precision=PRECISION)
            if LARGEST > 1:
                z = load_rows(noisy_values + head * z_head + vt * BV, token, valid, z_token, width, BV, EXACT_V)
                own = (z.to(tl.float32) * noisy_b[:, None]).to(dtype)
                grad_block += tl.dot(rounded, tl.trans(own), input_precision=PRECISION)
        if GATE == 1:
            rows_grad = rows_grad * tl.exp2(c + t)[:, None]
        grad_clean = (grad_clean * masked_decay(c + t, gam, before, GATE)).to(dtype)
        rows_grad += tl.dot(grad_clean, keys, input_precision=PRECISION)
        if GATE == 1:
            anchor_sum -= tl.sum(rows_grad * noisy_keys.to(tl.float32), 1)
        if LARGEST > 1:
            grad_block = (grad_block * masked_decay(t, t, strict, GATE)).to(dtype)
            rows_grad += tl.dot(grad_block, noisy_keys, input_precision=PRECISION)
            column_grad -= tl.dot(tl.trans(grad_block), noisy_keys, input_precision=PRECISION)
        if GATE == 1:
            row_sum -= tl.sum(rows_grad * noisy_keys.to(tl.float32), 1)
        total = column_grad - rows_grad
    else:
        total = column_grad
    raw = load_rows(k + key_head * k_head, token, valid, k_token, key_dim, BK, EXACT_K)
    store_rows(grad_k + head * key_dim, through_norm(total, raw, L2NORM), token, valid, H * key_dim, key_dim, BK, EXACT_K)

    if GATE == 1:
        row_sum -= tl.sum(column_grad * noisy_keys.to(tl.float32), 1)  # gradient of t
        up_to_here = (row[None, :] >= start[:, None]) & (row[None, :] <= row[:, None])
        gate = tl.sum(tl.where(up_to_here, row_sum[:, None], 0.0) + tl.where(inside, stop_sum[:, None], 0.0), 0)
        tl.store(grad_g + token * H + head, gate.to(grad_g.dtype.element_ty), mask=valid)
        tl.store(grad_anchor + meta * H + head, anchor_sum)
