"""Gradients of the noisy rows, first part: values, beta and queries; one program per (tile of rows, head).

Equations and names as in docs/kernels.md. The gradient of a log decay that multiplies a row is the product of that row
and its gradient, which does not cancel at strong decay. Matrices with `m` as their row index are formed transposed, as
the left operands that they are.
"""

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
    unit_triangular_inverse,
)
from .gates import chunk_vectors, tile_vectors
from .places import noisy_tile


@triton.jit(do_not_specialize=["tiles"])
def noisy_queries_grad_kernel(
    q,
    k,
    clean_values,
    states,
    noisy_values,
    grad_out,
    grad_q,
    grad_v,
    grad_beta,
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
    """grad_q [B,T,H,K], grad_v [B,T,H,V] (= E), grad_beta [B,T,H] of the noisy rows; and, [M, H, R], what each row's
    query adds to the gradients of gam[anchor - 1] (grad_anchor) and of e (grad_stop). noisy_values are Z~ or v."""
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

    # E = gradient of v~, and of beta~: back through the block's readout and solve
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    noisy_keys = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
    queries = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
    grad_0 = load_tile(out_base, first, count, out_stride, value_dim, R, BV, EXACT_V)
    own_0 = load_tile(own_base, first, count, z_token, value_dim, R, BV, EXACT_V)
    dtype = queries.dtype
    k_norm, q_norm = row_norm(noisy_keys, R, L2NORM), row_norm(queries, R, L2NORM)
    weight = tl.dot(noisy_keys, tl.trans(queries), input_precision=PRECISION)  # M
    factor = k_norm[:, None] * (q_norm * scale)[None, :]
    inside = (row_i >= start[None, :]) & (row_i < stop[None, :])
    weight = (weight * (log_weights(-t, -e, inside, GATE) * factor)).to(dtype)
    if DELTA and LARGEST > 1:
        upper = tl.dot(noisy_keys, tl.trans(noisy_keys), input_precision=PRECISION)
        factor = (k_norm * own_b)[:, None] * k_norm[None, :]
        upper = upper * (log_weights(-t, -t, (row_i >= start[None, :]) & (row_i < row_j), GATE) * factor)
        inverse = unit_triangular_inverse(upper, row - start, True, R, LARGEST, PRECISION, dtype).to(dtype)
    beta_sum = tl.zeros([R], dtype=tl.float32)
    grad, own = grad_0, own_0
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        if vt > 0:
            grad = load_tile(out_base + vt * BV, first, count, out_stride, width, R, BV, EXACT_V)
            own = load_tile(own_base + vt * BV, first, count, z_token, width, R, BV, EXACT_V)
        error = tl.dot(weight, grad, input_precision=PRECISION) * own_b[:, None]
        if DELTA and LARGEST > 1:
            error = tl.dot(inverse, error.to(dtype), input_precision=PRECISION)
        beta_sum += tl.sum(error * own.to(tl.float32), 1)
        store_tile(error_base + vt * BV, error, first, count, out_stride, width, R, BV, EXACT_V)
    place = (first + row) * H + head
    tl.store(grad_beta + place, (beta_sum / own_b).to(grad_beta.dtype.element_ty), mask=row < count)

    # what the queries read of the clean state at the anchor ...
    tl.debug_barrier()
    gam, clean_b = chunk_vectors(gams, betas, C, GATE)
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    grad_rows = product_with_state(grad_0, out_base, state, first, count, out_stride, key_dim, value_dim, R, BK, BV, NV,
                                   EXACT_K, EXACT_V, PRECISION)
    reads = q_norm * scale
    grad_rows = grad_rows * (tl.exp2(c + e) * reads if GATE == 1 else reads)[:, None]
    clean_0 = load_tile(z_base, clean_first, clean_count, z_token, value_dim, C, BV, EXACT_V)
    weight = product_of_tiles(grad_0, clean_0, out_base, z_base, first, clean_first, count, clean_count, out_stride,
                              z_token, value_dim, R, C, BV, NV, EXACT_V, PRECISION)
    keys = load_tile(k_base, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K)
    before = column[None, :] < tl.load(tile_anchor + meta)[:, None]
    factor = (clean_b * row_norm(keys, C, L2NORM))[None, :] * reads[:, None]
    weight = (weight * (log_weights(c + e, gam, before, GATE) * factor)).to(dtype)
    grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)
    queries = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
    if GATE == 1:
        tl.store(grad_anchor + tile_head * R + row, row_dot(grad_rows, queries))
    # ... and of their block
    tl.debug_barrier()
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    weight = product_of_tiles(grad_0, own_0, out_base, own_base, first, first, count, count, out_stride, z_token,
                              value_dim, R, R, BV, NV, EXACT_V, PRECISION)
    inside = (row_j >= start[:, None]) & (row_j < stop[:, None])
    factor = (own_b * k_norm)[None, :] * reads[:, None]
    weight = (weight * (log_weights(e, t, inside, GATE) * factor)).to(dtype)
    grad_rows = tl.dot(weight, noisy_keys, grad_rows, input_precision=PRECISION)
    queries = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
    if GATE == 1:
        tl.store(grad_stop + tile_head * R + row, row_dot(grad_rows, queries))
    grad_rows = through_factor(grad_rows, queries, q_norm, L2NORM)
    store_tile(grad_q + head * key_dim, grad_rows, first, count, H * key_dim, key_dim, R, BK, EXACT_K)
