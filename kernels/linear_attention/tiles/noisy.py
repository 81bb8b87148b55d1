"""The noisy stream, forward: independent programs, one per (tile of rows, head, tile of V); no boundary state.

With S0, k, D, gam of the tile's chunk, c = gam[anchor - 1], t the in-block inclusive and e the read-out log decay:
P, Pq the decayed products of k~, q~ with the chunk's keys before the anchor, N (m < l) and M the products inside the
block,
    Z~ = (I + N diag(beta~))^-1 (v~ - exp(c + t) k~ S0 - P D),   D~ = beta~ Z~
    o~ = scale (exp(c + e) q~ S0 + Pq D + M D~)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_matrix, load_tile, log_weights, row_norm, store_tile, unit_triangular_inverse
from .gates import chunk_vectors, tile_vectors
from .places import noisy_tile


@triton.jit(do_not_specialize=["tiles"])
def noisy_outputs_kernel(
    q,
    k,
    v,
    decayed_q,
    decayed_k,
    clean_weights,
    block_weights,
    clean_values,
    states,
    noisy_values,
    out,
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
    v_token: tl.constexpr,
    v_head: tl.constexpr,
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
    """out and noisy_values (Z~, delta only) [B, T, H, V] of the noisy rows; clean_values are Z (delta) or v.

    Products take the rows as they lie in memory: norms, beta and decays are factors of the small weight matrices.
    """
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
    head, tile = pid % H, pid // H
    key_head = head // GROUP
    row, column = tl.arange(0, R), tl.arange(0, C)
    width = value_dim - vt * BV
    chunk_head, tile_head, meta, span, clean_span, vectors = noisy_tile(
        head, tile, row, chunk_gam, chunk_beta, tile_logs, tile_beta, chunk_token, chunk_length, tile_chunk,
        tile_first, tile_count, H, C, R,
    )
    first, count = span
    clean_first, clean_count = clean_span
    gams, betas, logs, own_betas = vectors
    gam, clean_b = chunk_vectors(gams, betas, C, GATE)
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    before = column[None, :] < tl.load(tile_anchor + meta)[:, None]
    clean_place = tile_head * 2 * R * C + row[:, None] * C + column[None, :]
    block_place = tile_head * 2 * R * R + row[:, None] * R + row[None, :]

    state = load_matrix(states + chunk_head * key_dim * value_dim + vt * BV, key_dim, value_dim, BK, BV,
                        EXACT_K and EXACT_V, width)
    z = load_tile(clean_values + head * z_head + vt * BV, clean_first, clean_count, z_token, width, C, BV, EXACT_V)
    own = load_tile(v + head * v_head + vt * BV, first, count, v_token, width, R, BV, EXACT_V)
    dtype = z.dtype
    if GATE != 2:
        keys = load_tile(k + key_head * k_head, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K)
        noisy_keys = load_tile(k + key_head * k_head, first, count, k_token, key_dim, R, BK, EXACT_K)
        noisy_norm = row_norm(noisy_keys, R, L2NORM)
        clean_norm = row_norm(keys, C, L2NORM)
    if DELTA:
        if GATE == 2:
            grown = load_tile(decayed_k + head * key_dim, first, count, H * key_dim, key_dim, R, BK, EXACT_K)
            weight = (tl.load(clean_weights + clean_place).to(tl.float32) * clean_b[None, :]).to(dtype)
            read = tl.dot(grown, state, input_precision=PRECISION)
        else:
            weight = tl.dot(noisy_keys, tl.trans(keys), input_precision=PRECISION)
            factor = noisy_norm[:, None] * (clean_b * clean_norm)[None, :]
            weight = (weight * (log_weights(c + t, gam, before, GATE) * factor)).to(dtype)
            read = tl.dot(noisy_keys, state, input_precision=PRECISION)
            read = read * (noisy_norm * tl.exp2(c + t) if GATE == 1 else noisy_norm)[:, None]
        read = tl.dot(weight, z, read, input_precision=PRECISION)
        solved = own.to(tl.float32) - read
        if LARGEST > 1:
            start = tl.load(tile_start + meta)
            strict = (row[None, :] >= start[:, None]) & (row[None, :] < row[:, None])
            if GATE == 2:
                lower = tl.where(strict, tl.load(block_weights + block_place).to(tl.float32), 0.0) * own_b[None, :]
            else:
                lower = tl.dot(noisy_keys, tl.trans(noisy_keys), input_precision=PRECISION)
                factor = noisy_norm[:, None] * (noisy_norm * own_b)[None, :]
                lower = lower * (log_weights(t, t, strict, GATE) * factor)
            inverse = unit_triangular_inverse(lower, row - start, False, R, LARGEST, PRECISION, dtype)
            solved = tl.dot(inverse.to(dtype), solved.to(dtype), input_precision=PRECISION)
        own = solved.to(dtype)
        store_tile(noisy_values + head * value_dim + vt * BV, own, first, count, H * value_dim, width, R, BV, EXACT_V)

    tl.debug_barrier()
    gam, clean_b = chunk_vectors(gams, betas, C, GATE)
    t, e, c, own_b = tile_vectors(logs, own_betas, R, GATE)
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    before = column[None, :] < tl.load(tile_anchor + meta)[:, None]
    inside = (row[None, :] >= start[:, None]) & (row[None, :] < stop[:, None])
    if GATE == 2:
        grown = load_tile(decayed_q + head * key_dim, first, count, H * key_dim, key_dim, R, BK, EXACT_K)
        result = tl.dot(grown, state, input_precision=PRECISION)
        weight = (tl.load(clean_weights + clean_place + R * C).to(tl.float32) * clean_b[None, :]).to(dtype)
        block_weight = (tl.load(block_weights + block_place + R * R).to(tl.float32) * own_b[None, :]).to(dtype)
    else:
        queries = load_tile(q + key_head * q_head, first, count, q_token, key_dim, R, BK, EXACT_K)
        norm = row_norm(queries, R, L2NORM)
        block_weight = tl.dot(queries, tl.trans(noisy_keys), input_precision=PRECISION)
        factor = norm[:, None] * (noisy_norm * own_b)[None, :]
        block_weight = (block_weight * (log_weights(e, t, inside, GATE) * factor)).to(dtype)
        weight = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        factor = norm[:, None] * (clean_b * clean_norm)[None, :]
        weight = (weight * (log_weights(c + e, gam, before, GATE) * factor)).to(dtype)
        result = tl.dot(queries, state, input_precision=PRECISION)
        result = result * (norm * tl.exp2(c + e) if GATE == 1 else norm)[:, None]
    result = tl.dot(weight, z, result, input_precision=PRECISION)
    result = tl.dot(block_weight, own, result, input_precision=PRECISION)
    store_tile(out + head * value_dim + vt * BV, result * scale, first, count, H * value_dim, width, R, BV, EXACT_V)
