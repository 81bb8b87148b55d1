"""Gradients of the noisy rows, second part: keys and gates; one program per (tile of rows, head)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
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
from .places import noisy_tile


@triton.jit(do_not_specialize=["tiles"])
def noisy_keys_grad_kernel(
    q,
    k,
    clean_values,
    states,
    noisy_values,
    grad_out,
    grad_k,
    grad_v,
    grad_g,
    grad_anchor,
    grad_stop,
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
    """grad_k [B,T,H,K], grad_g [B,T,H] of the noisy rows; adds the keys' part to grad_anchor [M, H, R]. grad_v holds E,
    grad_stop the gradient of e."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    key_head = head // GROUP
    row, column = tl.arange(0, R), tl.arange(0, C)
    chunk_head, tile_head, meta, span, clean_span, vectors = noisy_tile(
        head, tile, row, chunk_gam, chunk_beta, tile_logs, tile_beta, chunk_token, chunk_length, tile_chunk,
        tile_first, tile_count, H, C, R,
    )
    first, count = span
    clean_first, clean_count = clean_span
    gams, betas, logs, own_betas = vectors
    state = states + chunk_head * key_dim * value_dim
    out_stride = H * value_dim
    error_base, out_base = grad_v + head * value_dim, grad_out + head * value_dim
    z_base, own_base = clean_values + head * z_head, noisy_values + head * z_head
    q_base, k_base = q + key_head * q_head, k + key_head * k_head
    row_i, row_j = row[:, None], row[None, :]

    error_0 = load_tile(error_base, first, count, out_stride, value_dim, R, BV, EXACT_V)
    own_0 = load_tile(own_base, first, count, z_token, value_dim, R, BV, EXACT_V)
    noisy_keys = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
    dtype = noisy_keys.dtype
    k_norm = row_norm(noisy_keys, R, L2NORM)

    # as rows of P and N (delta only)
    grad_rows = tl.zeros([R, BK], dtype=tl.float32)
    row_sum = tl.zeros([R], dtype=tl.float32)
    if DELTA:
        gam, clean_b = chunk_vectors(gams, betas, C, GATE)
        t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
        grad_rows = product_with_state(error_0, error_base, state, first, count, out_stride, key_dim, value_dim, R, BK,
                                       BV, NV, EXACT_K, EXACT_V, PRECISION)
        grad_rows = grad_rows * -(tl.exp2(c + t) * k_norm if GATE == 1 else k_norm)[:, None]
        clean_0 = load_tile(z_base, clean_first, clean_count, z_token, value_dim, C, BV, EXACT_V)
        weight = product_of_tiles(error_0, clean_0, error_base, z_base, first, clean_first, count, clean_count,
                                  out_stride, z_token, value_dim, R, C, BV, NV, EXACT_V, PRECISION)
        keys = load_tile(k_base, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K)
        before = column[None, :] < tl.load(tile_anchor + meta)[:, None]
        factor = (-clean_b * row_norm(keys, C, L2NORM))[None, :] * k_norm[:, None]
        weight = (weight * (log_weights(c + t, gam, before, GATE) * factor)).to(dtype)
        grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)
        if GATE == 1:
            rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
            row_sum = row_dot(grad_rows, rows)
            anchor = grad_anchor + tile_head * R + row
            tl.store(anchor, tl.load(anchor) + row_sum)
        if LARGEST > 1:
            tl.debug_barrier()
            t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
            start = tl.load(tile_start + meta)
            weight = product_of_tiles(error_0, own_0, error_base, own_base, first, first, count, count, out_stride,
                                      z_token, value_dim, R, R, BV, NV, EXACT_V, PRECISION)
            strict = (row_j >= start[:, None]) & (row_j < row_i)
            factor = (-own_b * k_norm)[None, :] * k_norm[:, None]
            weight = (weight * (log_weights(t, t, strict, GATE) * factor)).to(dtype)
            grad_rows = tl.dot(weight, noisy_keys, grad_rows, input_precision=PRECISION)
            if GATE == 1:
                rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
                row_sum = row_dot(grad_rows, rows)
            # ... and as columns of N
            tl.debug_barrier()
            t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
            start = tl.load(tile_start + meta)
            weight = product_of_tiles(own_0, error_0, own_base, error_base, first, first, count, count, z_token,
                                      out_stride, value_dim, R, R, BV, NV, EXACT_V, PRECISION)
            factor = (-own_b * k_norm)[:, None] * k_norm[None, :]
            strict = (row_i >= start[None, :]) & (row_i < row_j)
            weight = (weight * (log_weights(-t, -t, strict, GATE) * factor)).to(dtype)
            grad_rows = tl.dot(weight, noisy_keys, grad_rows, input_precision=PRECISION)
    # as columns of M
    tl.debug_barrier()
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    grad_0 = load_tile(out_base, first, count, out_stride, value_dim, R, BV, EXACT_V)
    weight = product_of_tiles(own_0, grad_0, own_base, out_base, first, first, count, count, z_token, out_stride,
                              value_dim, R, R, BV, NV, EXACT_V, PRECISION)
    queries = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
    factor = (own_b * k_norm)[:, None] * (row_norm(queries, R, L2NORM) * scale)[None, :]
    inside = (row_i >= start[None, :]) & (row_i < stop[None, :])
    weight = (weight * (log_weights(-t, -e, inside, GATE) * factor)).to(dtype)
    grad_rows = tl.dot(weight, queries, grad_rows, input_precision=PRECISION)
    tl.debug_barrier()
    rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
    if GATE == 1:
        # a row's decay grows what it reads (row_sum) and shrinks what reads it (the rest of the total)
        start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
        stop_sum = tl.load(grad_stop + tile_head * R + row)
        gate_row = 2.0 * row_sum - row_dot(grad_rows, rows)
        up_to_here = (row_j >= start[:, None]) & (row_j <= row_i)
        inside = (row_j >= start[:, None]) & (row_j < stop[:, None])
        gate = tl.where(up_to_here, gate_row[:, None], 0.0) + tl.where(inside, stop_sum[:, None], 0.0)
        place = (first + row) * H + head
        tl.store(grad_g + place, tl.sum(gate, 0).to(grad_g.dtype.element_ty), mask=row < count)
    grad_rows = through_factor(grad_rows, rows, k_norm, L2NORM)
    store_tile(grad_k + head * key_dim, grad_rows, first, count, H * key_dim, key_dim, R, BK, EXACT_K)
