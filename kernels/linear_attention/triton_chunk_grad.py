"""What all readers of a chunk - its own queries and its noisy tiles - send back to it: one program per (chunk, head, tile
of V), which accumulates over the chunk's tiles, so that nothing of the size of a state exists per tile or block.

    grad_D   += A_q^T do        - P^T E                   + Pq^T do~
    grad_k   += (do D^T)^T q    - (E D^T)^T k~            + (do~ D^T)^T q~         (decays included)
    grad_S0  += (exp(gam) q)^T do - (exp(c + t) k~)^T E   + (exp(c + e) q~)^T do~
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import load_tile, log_weights, row_norm, store_tile


@triton.jit
def add_readers(
    rows, grad, keys, z, row_factor, decay, corrected_sum, keys_sum, states_sum, PRECISION: tl.constexpr
):
    """Add what one tile of readers sends back. rows [r, K] and grad [r, V] as in memory; decay [C, r] weights of row l on
    column j without the rows' own factors, row_factor [r] = norm (and sign, scale); grown rows come with the caller."""
    dtype = keys.dtype
    weight = tl.dot(keys, tl.trans(rows), input_precision=PRECISION)
    weight = (weight * decay).to(dtype)
    corrected_sum = tl.dot(weight, grad, corrected_sum, input_precision=PRECISION)
    weight = tl.dot(z, tl.trans(grad), input_precision=PRECISION)
    weight = (weight * decay).to(dtype)
    keys_sum = tl.dot(weight, rows, keys_sum, input_precision=PRECISION)
    grown = (grad.to(tl.float32) * row_factor[:, None]).to(dtype)
    states_sum = tl.dot(tl.trans(rows), grown, states_sum, input_precision=PRECISION)
    return corrected_sum, keys_sum, states_sum


@triton.jit(do_not_specialize=["chunks"])
def chunk_grad_kernel(
    q,
    k,
    values,
    grad_out,
    noisy_error,
    grad_anchor,
    grad_states,
    grad_corrected,
    grad_keys,
    grad_gam,
    chunk_gam,
    chunk_beta,
    tile_logs,
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
    """grad_states [N, H, K, V] and grad_corrected [N * C, H, V], their part of this tile of V; grad_keys
    [NV, N * C, H, K] (of normalised keys) partial over tiles of V; grad_gam [N, H, C] from anchors. noisy_error = E
    (gradient of v~). Weights are formed transposed, so that they are left operands as they come."""
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
    head, chunk = pid % H, pid // H
    key_head = head // GROUP
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_first = tl.load(chunk_token + chunk).to(tl.int64)
    clean_count = tl.load(chunk_length + chunk)
    begin, end = tl.load(chunk_tile + chunk), tl.load(chunk_tile + chunk + 1)
    width = value_dim - vt * BV
    chunk_head = chunk.to(tl.int64) * H + head
    out_stride = H * value_dim
    q_base, k_base = q + key_head * q_head, k + key_head * k_head
    out_base, error_base = grad_out + head * value_dim + vt * BV, noisy_error + head * value_dim + vt * BV

    clean_b = tl.load(chunk_beta + chunk_head * C + column)
    gam = clean_b
    if GATE == 1:
        gam = tl.load(chunk_gam + chunk_head * C + column)
    keys = load_tile(k_base, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K)
    norm = row_norm(keys, C, L2NORM)
    z = load_tile(values + head * z_head + vt * BV, clean_first, clean_count, z_token, width, C, BV, EXACT_V)

    # Sums are taken for raw columns; the columns' factors (norm for grad_D, beta for grad_k) follow at the end.
    corrected_sum = tl.zeros([C, BV], dtype=tl.float32)
    keys_sum = tl.zeros([C, BK], dtype=tl.float32)
    states_sum = tl.zeros([BK, BV], dtype=tl.float32)
    gam_sum = tl.zeros([C], dtype=tl.float32)

    # the chunk's own queries
    rows = load_tile(q_base, clean_first, clean_count, q_token, key_dim, C, BK, EXACT_K)
    grad = load_tile(out_base, clean_first, clean_count, out_stride, width, C, BV, EXACT_V)
    factor = row_norm(rows, C, L2NORM) * scale
    decay = log_weights(-gam, -gam, column[:, None] <= column[None, :], GATE) * factor[None, :]
    grown = tl.exp2(gam) * factor if GATE == 1 else factor
    corrected_sum, keys_sum, states_sum = add_readers(
        rows, grad, keys, z, grown, decay, corrected_sum, keys_sum, states_sum, PRECISION
    )
    for step in range(0, end - begin):
        tile = begin.to(tl.int64) + step
        meta = tile * R + row
        first = tl.load(tile_first + tile).to(tl.int64)
        count = tl.load(tile_count + tile)
        anchor = tl.load(tile_anchor + meta)
        before = column[:, None] < anchor[None, :]
        key_log, query_log = gam, gam
        if GATE == 1:
            logs = tile_logs + (tile * H + head) * 3 * R + row
            c = tl.load(logs + 2 * R)
            key_log, query_log = c + tl.load(logs), c + tl.load(logs + R)
            if vt == 0:
                at_anchor = tl.load(grad_anchor + (tile * H + head) * R + row)
                gam_sum += tl.sum(tl.where(column[:, None] == anchor[None, :] - 1, at_anchor[None, :], 0.0), 1)
        rows = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
        grad = load_tile(out_base, first, count, out_stride, width, R, BV, EXACT_V)
        factor = row_norm(rows, R, L2NORM) * scale
        decay = log_weights(-gam, -query_log, before, GATE) * factor[None, :]
        grown = tl.exp2(query_log) * factor if GATE == 1 else factor
        corrected_sum, keys_sum, states_sum = add_readers(
            rows, grad, keys, z, grown, decay, corrected_sum, keys_sum, states_sum, PRECISION
        )
        if DELTA:
            rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
            grad = load_tile(error_base, first, count, out_stride, width, R, BV, EXACT_V)
            factor = -row_norm(rows, R, L2NORM)
            decay = log_weights(-gam, -key_log, before, GATE) * factor[None, :]
            grown = tl.exp2(key_log) * factor if GATE == 1 else factor
            corrected_sum, keys_sum, states_sum = add_readers(
                rows, grad, keys, z, grown, decay, corrected_sum, keys_sum, states_sum, PRECISION
            )

    kc, vc = tl.arange(0, BK), tl.arange(0, BV)
    place = grad_states + chunk_head * key_dim * value_dim + vt * BV + kc[:, None] * value_dim + vc[None, :]
    states_sum = states_sum.to(grad_states.dtype.element_ty)
    if EXACT_K and EXACT_V:
        tl.store(place, states_sum)
    else:
        tl.store(place, states_sum, mask=(kc < key_dim)[:, None] & (vc < width)[None, :])
    flat = chunk.to(tl.int64) * C  # these rows are padded to whole chunks
    store_tile(grad_corrected + head * value_dim + vt * BV, corrected_sum * norm[:, None], flat, clean_count,
               out_stride, width, C, BV, EXACT_V)  # fmt: skip
    store_tile(grad_keys + head * key_dim, keys_sum * clean_b[:, None], flat + vt * chunks * C, clean_count,
               H * key_dim, key_dim, C, BK, EXACT_K)  # fmt: skip
    if GATE == 1:
        if vt == 0:
            tl.store(grad_gam + chunk_head * C + column, gam_sum)
