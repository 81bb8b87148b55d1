"""Key-channel gates, backward on the side of the values: the noisy, chunk and clean gradient kernels with pair weights and decayed
vectors from memory. They return gradients of those; `triton_channel_finish` takes them back to q, k and g.

Weights' gradients may stand in the weights' own memory: a program reads its weights before it writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import load_matrix, load_tile, store_tile, unit_triangular_inverse


@triton.jit(do_not_specialize=["tiles"])
def channel_noisy_grad_kernel(
    beta,
    clean_values,
    states,
    noisy_values,
    grad_out,
    block_weights,
    grad_v,
    grad_beta,
    grad_decayed_q,
    grad_decayed_k,
    grad_clean_weights,
    grad_block_weights,
    chunk_token,
    chunk_length,
    tile_chunk,
    tile_token,
    tile_start,
    tiles,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    z_token: tl.constexpr,
    z_head: tl.constexpr,
    beta_token,
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
    """One program per (tile, head): grad_v (= E), grad_beta; gradients of decayed_q, decayed_k, (P, Pq) and (N, M)."""
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    row, column = tl.arange(0, R), tl.arange(0, C)
    chunk = tl.load(tile_chunk + tile)
    clean_token = (tl.load(chunk_token + chunk) + column).to(tl.int64)
    clean_valid = column < tl.load(chunk_length + chunk)
    meta = tile.to(tl.int64) * R + row
    token = tl.load(tile_token + meta).to(tl.int64)
    valid = token >= 0
    state_base = states + (chunk.to(tl.int64) * H + head) * key_dim * value_dim
    tile_head = tile.to(tl.int64) * H + head
    clean_place = tile_head * 2 * R * C + row[:, None] * C + column[None, :]
    block_place = tile_head * 2 * R * R + row[:, None] * R + row[None, :]
    b = load_beta(beta + head, clean_first, clean_count, beta_token)
    noisy_b = load_beta(beta + head, first, count, beta_token)
    stride = H * key_dim

    weight = tl.trans(tl.load(block_weights + block_place + R * R))  # M transposed
    dtype = weight.dtype
    inverse = tl.zeros([R, R], dtype=dtype)
    if DELTA and LARGEST > 1:
        lower = tl.load(block_weights + block_place).to(tl.float32) * noisy_b[None, :]
        start = tl.load(tile_start + meta)
        inverse = tl.trans(unit_lower_inverse(lower, row - start, R, LARGEST, PRECISION)).to(dtype)
    beta_sum = tl.zeros([R], dtype=tl.float32)
    grad_clean = tl.zeros([R, C], dtype=tl.float32)
    grad_block = tl.zeros([R, R], dtype=tl.float32)
    rows_grad = tl.zeros([R, BK], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        grad = load_tile(grad_out + head * value_dim + vt * C, R, BV, first, count, H * value_dim, width, R, BV, EXACT_V)
        error = tl.dot(weight, grad, input_precision=PRECISION) * (scale * noisy_b)[:, None]
        if DELTA and LARGEST > 1:
            error = tl.dot(inverse, error.to(dtype), input_precision=PRECISION)
        z = load_tile(noisy_values + head * z_head + vt * BV, first, count, z_token, width, R, BV, EXACT_V)
        beta_sum += tl.sum(error * z.to(tl.float32), 1)
        store_tile(grad_v + head * value_dim + vt * BV, error, first, count, H * value_dim, width, R, BV, EXACT_V)
        own = (z.to(tl.float32) * noisy_b[:, None]).to(dtype)
        grad_block += tl.dot(grad, tl.trans(own), input_precision=PRECISION)
        clean_z = load_tile(clean_values + head * z_head + vt * BV, clean_first, clean_count, z_token, width, C, BV, EXACT_V)
        corrected = (clean_z.to(tl.float32) * b[:, None]).to(dtype)
        grad_clean += tl.dot(grad, tl.trans(corrected), input_precision=PRECISION)
        state = load_matrix(state_base + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        rows_grad += tl.dot(grad, tl.trans(state), input_precision=PRECISION)
    tl.store(grad_beta + token * H + head, (beta_sum / noisy_b).to(grad_beta.dtype.element_ty), mask=valid)
    store_tile(grad_decayed_q + head * key_dim, rows_grad * scale, first, count, stride, key_dim, R, BK, EXACT_K)
    tl.store(grad_clean_weights + clean_place + R * C, (grad_clean * scale).to(dtype))
    tl.debug_barrier()  # before the weights' memory is written: all threads have read theirs
    tl.store(grad_block_weights + block_place + R * R, (grad_block * scale).to(dtype))

    if DELTA:
        grad_clean = tl.zeros([R, C], dtype=tl.float32)
        grad_block = tl.zeros([R, R], dtype=tl.float32)
        rows_grad = tl.zeros([R, BK], dtype=tl.float32)
        for vt in tl.static_range(NV):
            width = value_dim - vt * BV
            if NV == 1:
                rounded = error.to(dtype)
            else:
                # E of the other tiles of V comes back from memory, behind the barrier above
                rounded = load_tile(grad_v + head * value_dim + vt * BV, first, count, H * value_dim, width, R, BV, EXACT_V)
            state = load_matrix(state_base + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
            rows_grad += tl.dot(rounded, tl.trans(state), input_precision=PRECISION)
            clean_z = load_tile(clean_values + head * z_head + vt * BV, clean_first, clean_count, z_token, width, C, BV,
                                EXACT_V)
            corrected = (clean_z.to(tl.float32) * b[:, None]).to(dtype)
            grad_clean += tl.dot(rounded, tl.trans(corrected), input_precision=PRECISION)
            if LARGEST > 1:
                z = load_tile(noisy_values + head * z_head + vt * BV, first, count, z_token, width, R, BV, EXACT_V)
                own = (z.to(tl.float32) * noisy_b[:, None]).to(dtype)
                grad_block += tl.dot(rounded, tl.trans(own), input_precision=PRECISION)
        store_tile(grad_decayed_k + head * key_dim, -rows_grad, first, count, stride, key_dim, R, BK, EXACT_K)
        tl.store(grad_clean_weights + clean_place, (-grad_clean).to(dtype))
        tl.store(grad_block_weights + block_place, (-grad_block).to(dtype))


@triton.jit(do_not_specialize=["chunks"])
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
    tile_token,
    chunks,
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
    """What all readers of a chunk send back to its entry state (grad_states [N,H,K,V]) and corrected values (grad_corrected
    [N*C,H,V]): one program per (chunk, head, tile of V), which accumulates over the chunk's tiles."""
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
    head, chunk = pid % H, pid // H
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_token = (tl.load(chunk_token + chunk) + column).to(tl.int64)
    clean_valid = column < tl.load(chunk_length + chunk)
    begin, end = tl.load(chunk_tile + chunk), tl.load(chunk_tile + chunk + 1)
    width = value_dim - vt * BV
    stride = H * key_dim
    chunk_head = chunk.to(tl.int64) * H + head
    out_base, error_base = grad_out + head * value_dim + vt * BV, noisy_error + head * value_dim + vt * BV

    # queries: the chunk's own, then those of its tiles
    grad = load_tile(out_base, clean_first, clean_count, H * value_dim, width, C, BV, EXACT_V)
    weight = tl.load(query_weights + chunk_head * C * C + column[:, None] * C + column[None, :])
    corrected_sum = tl.dot(tl.trans(weight), grad, input_precision=PRECISION)
    grown = load_tile(decayed_q + head * key_dim, clean_first, clean_count, stride, key_dim, C, BK, EXACT_K)
    states_sum = tl.dot(tl.trans(grown), grad, input_precision=PRECISION)
    for step in range(0, end - begin):
        tile = begin.to(tl.int64) + step
        token = tl.load(tile_token + tile * R + row).to(tl.int64)
        place = clean_weights + ((tile * H + head) * 2 + 1) * R * C + row[:, None] * C + column[None, :]
        grad = load_tile(out_base, first, count, H * value_dim, width, R, BV, EXACT_V)
        corrected_sum += tl.dot(tl.trans(tl.load(place)), grad, input_precision=PRECISION)
        grown = load_tile(decayed_q + head * key_dim, first, count, stride, key_dim, R, BK, EXACT_K)
        states_sum += tl.dot(tl.trans(grown), grad, input_precision=PRECISION)
    corrected_sum *= scale
    states_sum *= scale
    if DELTA:
        for step in range(0, end - begin):
            tile = begin.to(tl.int64) + step
            token = tl.load(tile_token + tile * R + row).to(tl.int64)
            place = clean_weights + (tile * H + head) * 2 * R * C + row[:, None] * C + column[None, :]
            error = load_tile(error_base, first, count, H * value_dim, width, R, BV, EXACT_V)
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
    flat = chunk.to(tl.int64) * C + column
    store_tile(grad_corrected + head * value_dim + vt * BV, corrected_sum, tile.to(tl.int64) * C, clean_count, H * value_dim, width, C, BV,
               EXACT_V)


@triton.jit(do_not_specialize=["chunks"])
def channel_clean_grad_kernel(
    beta,
    values,
    states,
    grad_out,
    grad_states,
    grad_v,
    grad_beta,
    grad_decayed_q,
    grad_decayed_k,
    grad_tail,
    grad_total,
    grad_weights,
    grad_query_weights,
    chunk_token,
    chunk_length,
    chunks,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    z_token: tl.constexpr,
    z_head: tl.constexpr,
    beta_token,
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
    """One program per (chunk, head): gradients of the clean decayed_q, decayed_k [B,T,H,K], of tail_k [N*C,H,K], of total [N,H,K], A and A_q
    [N,H,C,C], and beta. grad_v holds E, grad_states the gradient of the state after each chunk."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    row, kc = tl.arange(0, C), tl.arange(0, BK)
    token = (tl.load(chunk_token + chunk) + row).to(tl.int64)
    valid = row < tl.load(chunk_length + chunk)
    chunk_head = chunk.to(tl.int64) * H + head
    state_place = chunk_head * key_dim * value_dim
    corner = chunk_head * C * C + row[:, None] * C + row[None, :]
    stride = H * key_dim
    b = load_beta(beta + head, first, count, beta_token)
    dtype = grad_query_weights.dtype.element_ty

    rows_grad = tl.zeros([C, BK], dtype=tl.float32)
    weight = tl.zeros([C, C], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        grad = load_tile(grad_out + head * value_dim + vt * C, BV, first, count, H * value_dim, width, C, BV, EXACT_V)
        z = load_tile(values + head * z_head + vt * BV, first, count, z_token, width, C, BV, EXACT_V)
        corrected = (z.to(tl.float32) * b[:, None]).to(dtype)
        weight += tl.dot(grad, tl.trans(corrected), input_precision=PRECISION)
        state = load_matrix(states + state_place + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        rows_grad += tl.dot(grad, tl.trans(state), input_precision=PRECISION)
    tl.store(grad_query_weights + corner, (weight * scale).to(dtype))
    store_tile(grad_decayed_q + head * key_dim, rows_grad * scale, first, count, stride, key_dim, C, BK, EXACT_K)

    column_grad = tl.zeros([C, BK], dtype=tl.float32)
    beta_sum = tl.zeros([C], dtype=tl.float32)
    total_sum = tl.zeros([BK], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        z = load_tile(values + head * z_head + vt * BV, first, count, z_token, width, C, BV, EXACT_V)
        corrected = (z.to(tl.float32) * b[:, None]).to(dtype)
        error = load_tile(grad_v + head * value_dim + vt * BV, first, count, H * value_dim, width, C, BV, EXACT_V)
        beta_sum += tl.sum(error.to(tl.float32) * z.to(tl.float32), 1)
        after = load_matrix(grad_states + state_place + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        column_grad += tl.dot(corrected, tl.trans(after), input_precision=PRECISION)
        state = load_matrix(states + state_place + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        total_sum += tl.sum(state.to(tl.float32) * after.to(tl.float32), 1)
    tl.store(grad_beta + token * H + head, (beta_sum / b).to(grad_beta.dtype.element_ty), mask=valid)
    tl.store(grad_total + chunk_head * key_dim + kc, total_sum, mask=kc < key_dim)
    store_tile(grad_tail + head * key_dim, column_grad, chunk.to(tl.int64) * C, count, stride, key_dim, C, BK, EXACT_K)

    if DELTA:
        rows_grad = tl.zeros([C, BK], dtype=tl.float32)
        weight = tl.zeros([C, C], dtype=tl.float32)
        for vt in tl.static_range(NV):
            width = value_dim - vt * BV
            z = load_tile(values + head * z_head + vt * BV, first, count, z_token, width, C, BV, EXACT_V)
            corrected = (z.to(tl.float32) * b[:, None]).to(dtype)
            error = load_tile(grad_v + head * value_dim + vt * BV, first, count, H * value_dim, width, C, BV, EXACT_V)
            state = load_matrix(states + state_place + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
            weight += tl.dot(error, tl.trans(corrected), input_precision=PRECISION)
            rows_grad += tl.dot(error, tl.trans(state), input_precision=PRECISION)
        tl.store(grad_weights + corner, (-weight).to(dtype))
        store_tile(grad_decayed_k + head * key_dim, -rows_grad, first, count, stride, key_dim, C, BK, EXACT_K)
