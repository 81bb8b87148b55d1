"""Key-channel gates, backward on the side of the values: gradients of pair weights and decayed vectors, which
`finish` takes back to q, k and g. Equations and names as in docs/kernels.md.

Weights' gradients may stand in the weights' own memory: a program reads its weights before it writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import load_matrix, load_tile, product_of_tiles, product_with_state, store_tile, unit_triangular_inverse
from ..places import rows_of
from .pairs import direct_block_pairs


@triton.jit
def channel_noisy_grad_kernel(
    clean_values,
    states,
    noisy_values,
    grad_out,
    block_weights,
    grad_v,
    grad_beta,
    grad_q,
    grad_k,
    grad_clean_weights,
    chunk_beta,
    tile_beta,
    chunk_token,
    chunk_length,
    tile_chunk,
    tile_first,
    tile_count,
    tile_anchor,
    tile_start,
    tile_stop,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    z_token: tl.constexpr,
    z_head: tl.constexpr,
    H: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    LARGEST: tl.constexpr,
    DELTA: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (tile, head): grad_v [B,T,H,V] (= E), grad_beta [B,T,H]; gradients of decayed_q and decayed_k (in
    grad_q, grad_k [B,T,H,K]), of (P, Pq) [M,H,2,R,C], and of (N, M) [M,H,2,R,R] in place of them."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    row, column = tl.arange(0, R), tl.arange(0, C)
    chunk = tl.load(tile_chunk + tile)
    clean_first, clean_count = rows_of(chunk, chunk_token, chunk_length)
    first, count = rows_of(tile, tile_first, tile_count)
    meta = tile.to(tl.int64) * R + row
    start = tl.load(tile_start + meta)
    chunk_head, tile_head = chunk.to(tl.int64) * H + head, tile.to(tl.int64) * H + head
    state = states + chunk_head * key_dim * value_dim
    clean_place = tile_head * 2 * R * C + row[:, None] * C + column[None, :]
    block_place = tile_head * 2 * R * R + row[:, None] * R + row[None, :]
    clean_b, own_b = tl.load(chunk_beta + chunk_head * C + column), tl.load(tile_beta + tile_head * R + row)
    out_stride, stride = H * value_dim, H * key_dim
    out_base, error_base = grad_out + head * value_dim, grad_v + head * value_dim
    z_base, own_base = clean_values + head * z_head, noisy_values + head * z_head

    weight = tl.trans(tl.load(block_weights + block_place + R * R))  # M transposed
    dtype = weight.dtype
    if DELTA and LARGEST > 1:
        upper = tl.trans(tl.load(block_weights + block_place)).to(tl.float32) * own_b[:, None]
        inverse = unit_triangular_inverse(upper, row - start, True, R, LARGEST, PRECISION, dtype).to(dtype)
    beta_sum = tl.zeros([R], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        grad = load_tile(out_base + vt * BV, first, count, out_stride, width, R, BV, EXACT_V)
        error = tl.dot(weight, grad, input_precision=PRECISION) * (own_b * scale)[:, None]
        if DELTA and LARGEST > 1:
            error = tl.dot(inverse, error.to(dtype), input_precision=PRECISION)
        own = load_tile(own_base + vt * BV, first, count, z_token, width, R, BV, EXACT_V)
        beta_sum += tl.sum(error * own.to(tl.float32), 1)
        store_tile(error_base + vt * BV, error, first, count, out_stride, width, R, BV, EXACT_V)
    place = grad_beta + (first + row) * H + head
    tl.store(place, (beta_sum / own_b).to(grad_beta.dtype.element_ty), mask=row < count)
    tl.debug_barrier()  # E is read back below; all threads have read the weights that are overwritten

    grad_0 = load_tile(out_base, first, count, out_stride, value_dim, R, BV, EXACT_V)
    clean_0 = load_tile(z_base, clean_first, clean_count, z_token, value_dim, C, BV, EXACT_V)
    own_0 = load_tile(own_base, first, count, z_token, value_dim, R, BV, EXACT_V)
    rows_grad = product_with_state(
        grad_0,
        out_base,
        state,
        first,
        count,
        out_stride,
        key_dim,
        value_dim,
        R,
        BK,
        BV,
        NV,
        EXACT_K,
        EXACT_V,
        PRECISION,
    )
    store_tile(grad_q + head * key_dim, rows_grad * scale, first, count, stride, key_dim, R, BK, EXACT_K)
    weight = product_of_tiles(
        grad_0,
        clean_0,
        out_base,
        z_base,
        first,
        clean_first,
        count,
        clean_count,
        out_stride,
        z_token,
        value_dim,
        R,
        C,
        BV,
        NV,
        EXACT_V,
        PRECISION,
    )
    # loaded here, so that the masks are made here
    anchor, start, stop = tl.load(tile_anchor + meta), tl.load(tile_start + meta), tl.load(tile_stop + meta)
    weight = tl.where(column[None, :] < anchor[:, None], weight * (clean_b * scale)[None, :], 0.0)
    tl.store(grad_clean_weights + clean_place + R * C, weight.to(dtype))
    weight = product_of_tiles(
        grad_0,
        own_0,
        out_base,
        own_base,
        first,
        first,
        count,
        count,
        out_stride,
        z_token,
        value_dim,
        R,
        R,
        BV,
        NV,
        EXACT_V,
        PRECISION,
    )
    weight = tl.where(direct_block_pairs(stop - start, start, R), weight * (own_b * scale)[None, :], 0.0)
    tl.store(block_weights + block_place + R * R, weight.to(dtype))
    if DELTA:
        error_0 = load_tile(error_base, first, count, out_stride, value_dim, R, BV, EXACT_V)
        rows_grad = product_with_state(
            error_0,
            error_base,
            state,
            first,
            count,
            out_stride,
            key_dim,
            value_dim,
            R,
            BK,
            BV,
            NV,
            EXACT_K,
            EXACT_V,
            PRECISION,
        )
        store_tile(grad_k + head * key_dim, -rows_grad, first, count, stride, key_dim, R, BK, EXACT_K)
        weight = product_of_tiles(
            error_0,
            clean_0,
            error_base,
            z_base,
            first,
            clean_first,
            count,
            clean_count,
            out_stride,
            z_token,
            value_dim,
            R,
            C,
            BV,
            NV,
            EXACT_V,
            PRECISION,
        )
        weight = tl.where(column[None, :] < anchor[:, None], weight * -clean_b[None, :], 0.0)
        tl.store(grad_clean_weights + clean_place, weight.to(dtype))
        if LARGEST > 1:
            weight = product_of_tiles(
                error_0,
                own_0,
                error_base,
                own_base,
                first,
                first,
                count,
                count,
                out_stride,
                z_token,
                value_dim,
                R,
                R,
                BV,
                NV,
                EXACT_V,
                PRECISION,
            )
            weight = tl.where(direct_block_pairs(row - start, start, R), weight * -own_b[None, :], 0.0)
            tl.store(block_weights + block_place, weight.to(dtype))


@triton.jit
def channel_chunk_grad_kernel(
    grad_out,
    noisy_error,
    decayed_q,
    decayed_k,
    query_weights,
    clean_weights,
    grad_states,
    grad_corrected,
    chunk_token,
    chunk_length,
    chunk_tile,
    tile_first,
    tile_count,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    H: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    DELTA: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What all readers of a chunk send back to its entry state (grad_states [N,H,K,V]) and corrected values
    (grad_corrected [N*C,H,V]): one program per (chunk, head, tile of V), which accumulates over the chunk's tiles."""
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
    head, chunk = pid % H, pid // H
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_first, clean_count = rows_of(chunk, chunk_token, chunk_length)
    begin, end = tl.load(chunk_tile + chunk), tl.load(chunk_tile + chunk + 1)
    width = value_dim - vt * BV
    stride, out_stride = H * key_dim, H * value_dim
    chunk_head = chunk.to(tl.int64) * H + head
    out_base, error_base = grad_out + head * value_dim + vt * BV, noisy_error + head * value_dim + vt * BV

    # queries: the chunk's own, then those of its tiles
    grad = load_tile(out_base, clean_first, clean_count, out_stride, width, C, BV, EXACT_V)
    weight = tl.load(query_weights + chunk_head * C * C + column[:, None] * C + column[None, :])
    corrected_sum = tl.dot(tl.trans(weight), grad, input_precision=PRECISION)
    grown = load_tile(decayed_q + head * key_dim, clean_first, clean_count, stride, key_dim, C, BK, EXACT_K)
    states_sum = tl.dot(tl.trans(grown), grad, input_precision=PRECISION)
    for step in range(0, end - begin):
        tile = begin.to(tl.int64) + step
        first, count = rows_of(tile, tile_first, tile_count)
        place = clean_weights + ((tile * H + head) * 2 + 1) * R * C + row[:, None] * C + column[None, :]
        grad = load_tile(out_base, first, count, out_stride, width, R, BV, EXACT_V)
        corrected_sum += tl.dot(tl.trans(tl.load(place)), grad, input_precision=PRECISION)
        grown = load_tile(decayed_q + head * key_dim, first, count, stride, key_dim, R, BK, EXACT_K)
        states_sum += tl.dot(tl.trans(grown), grad, input_precision=PRECISION)
    corrected_sum *= scale
    states_sum *= scale
    if DELTA:
        for step in range(0, end - begin):
            tile = begin.to(tl.int64) + step
            first, count = rows_of(tile, tile_first, tile_count)
            place = clean_weights + (tile * H + head) * 2 * R * C + row[:, None] * C + column[None, :]
            error = load_tile(error_base, first, count, out_stride, width, R, BV, EXACT_V)
            error = (-error).to(error.dtype)
            corrected_sum += tl.dot(tl.trans(tl.load(place)), error, input_precision=PRECISION)
            grown = load_tile(decayed_k + head * key_dim, first, count, stride, key_dim, R, BK, EXACT_K)
            states_sum += tl.dot(tl.trans(grown), error, input_precision=PRECISION)

    kc, vc = tl.arange(0, BK), tl.arange(0, BV)
    place = grad_states + chunk_head * key_dim * value_dim + vt * BV + kc[:, None] * value_dim + vc[None, :]
    states_sum = states_sum.to(grad_states.dtype.element_ty)
    if EXACT_K and EXACT_V:
        tl.store(place, states_sum)
    else:
        tl.store(place, states_sum, mask=(kc < key_dim)[:, None] & (vc < width)[None, :])
    store_tile(
        grad_corrected + head * value_dim + vt * BV,
        corrected_sum,
        chunk.to(tl.int64) * C,
        clean_count,
        out_stride,
        width,
        C,
        BV,
        EXACT_V,
    )


@triton.jit
def channel_clean_grad_kernel(
    values,
    states,
    grad_out,
    grad_states,
    grad_v,
    grad_beta,
    grad_q,
    grad_k,
    grad_tail,
    grad_total,
    weights,
    query_weights,
    chunk_beta,
    chunk_token,
    chunk_length,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    z_token: tl.constexpr,
    z_head: tl.constexpr,
    H: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    DELTA: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (chunk, head): gradients of the clean decayed_q, decayed_k (in grad_q, grad_k [B,T,H,K]), of
    tail_k [N*C,H,K], of total [N,H,K], of A and A_q [N,H,C,C] in place of them, and of beta [B,T,H]. grad_v holds E,
    grad_states the gradient of the state after each chunk."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    row, kc = tl.arange(0, C), tl.arange(0, BK)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    chunk_head = chunk.to(tl.int64) * H + head
    state, after = states + chunk_head * key_dim * value_dim, grad_states + chunk_head * key_dim * value_dim
    corner = chunk_head * C * C + row[:, None] * C + row[None, :]
    out_stride, stride = H * value_dim, H * key_dim
    out_base, error_base, z_base = grad_out + head * value_dim, grad_v + head * value_dim, values + head * z_head
    b = tl.load(chunk_beta + chunk_head * C + row)
    dtype = query_weights.dtype.element_ty

    grad_0 = load_tile(out_base, first, count, out_stride, value_dim, C, BV, EXACT_V)
    z_0 = load_tile(z_base, first, count, z_token, value_dim, C, BV, EXACT_V)
    weight = product_of_tiles(
        grad_0,
        z_0,
        out_base,
        z_base,
        first,
        first,
        count,
        count,
        out_stride,
        z_token,
        value_dim,
        C,
        C,
        BV,
        NV,
        EXACT_V,
        PRECISION,
    )
    weight = tl.where(row[:, None] >= row[None, :], weight * (b * scale)[None, :], 0.0)
    tl.store(query_weights + corner, weight.to(dtype))
    rows_grad = product_with_state(
        grad_0,
        out_base,
        state,
        first,
        count,
        out_stride,
        key_dim,
        value_dim,
        C,
        BK,
        BV,
        NV,
        EXACT_K,
        EXACT_V,
        PRECISION,
    )
    store_tile(grad_q + head * key_dim, rows_grad * scale, first, count, stride, key_dim, C, BK, EXACT_K)
    if DELTA:
        error_0 = load_tile(error_base, first, count, out_stride, value_dim, C, BV, EXACT_V)
        weight = product_of_tiles(
            error_0,
            z_0,
            error_base,
            z_base,
            first,
            first,
            count,
            count,
            out_stride,
            z_token,
            value_dim,
            C,
            C,
            BV,
            NV,
            EXACT_V,
            PRECISION,
        )
        weight = tl.where(row[:, None] > row[None, :], weight * -b[None, :], 0.0)
        tl.store(weights + corner, weight.to(dtype))
        rows_grad = product_with_state(
            error_0,
            error_base,
            state,
            first,
            count,
            out_stride,
            key_dim,
            value_dim,
            C,
            BK,
            BV,
            NV,
            EXACT_K,
            EXACT_V,
            PRECISION,
        )
        store_tile(grad_k + head * key_dim, -rows_grad, first, count, stride, key_dim, C, BK, EXACT_K)

    rows_grad = product_with_state(
        z_0, z_base, after, first, count, z_token, key_dim, value_dim, C, BK, BV, NV, EXACT_K, EXACT_V, PRECISION
    )
    store_tile(
        grad_tail + head * key_dim,
        rows_grad * b[:, None],
        chunk.to(tl.int64) * C,
        count,
        stride,
        key_dim,
        C,
        BK,
        EXACT_K,
    )
    beta_sum = tl.zeros([C], dtype=tl.float32)
    total_sum = tl.zeros([BK], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        z = load_tile(z_base + vt * BV, first, count, z_token, width, C, BV, EXACT_V).to(tl.float32)
        beta_sum += tl.sum(z * load_tile(error_base + vt * BV, first, count, out_stride, width, C, BV, EXACT_V), 1)
        left = load_matrix(state + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width).to(tl.float32)
        right = load_matrix(after + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        total_sum += tl.sum(left * right, 1)
    place = grad_beta + (first + row) * H + head
    tl.store(place, (beta_sum / b).to(grad_beta.dtype.element_ty), mask=row < count)
    tl.store(grad_total + chunk_head * key_dim + kc, total_sum, mask=kc < key_dim)
