"""The noisy stream, forward: one program per (tile of rows, head, tile of V), all independent; no walk, no boundary state.

With S0, k, D, gam of the tile's chunk, c = gam[anchor - 1], t the in-block inclusive and e the read-out log decay:
P, Pq the decayed products of k~, q~ with the chunk's keys before the anchor, N (m < l) and M the products inside the
block,
    Z~ = (I + N diag(beta~))^-1 (v~ - exp(c + t) k~ S0 - P D),   D~ = beta~ Z~
    o~ = scale (exp(c + e) q~ S0 + Pq D + M D~)
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
    unit_lower_inverse,
)


@triton.jit
def block_sums(log_decay, start, stop, R: tl.constexpr):
    """t [R] (inclusive, inside the block) and e [R] (up to the last row that the query reads)."""
    row = tl.arange(0, R)
    in_block = row[None, :] >= start[:, None]
    t = tl.sum(tl.where(in_block & (row[None, :] <= row[:, None]), log_decay[None, :], 0.0), 1)
    e = tl.sum(tl.where(in_block & (row[None, :] < stop[:, None]), log_decay[None, :], 0.0), 1)
    return t, e


@triton.jit
def anchor_decay(gam, anchor, C: tl.constexpr):
    """c [R] = gam[anchor - 1], 0 for an anchor at the chunk's start."""
    column = tl.arange(0, C)
    return tl.sum(tl.where(column[None, :] == anchor[:, None] - 1, gam[None, :], 0.0), 1)


@triton.jit
def masked_decay(row_log, column_log, read, GATE: tl.constexpr):
    """exp2(row_log - column_log) where read, else 0; without a gate just the mask."""
    if GATE == 1:
        return tl.where(read, tl.exp2(tl.where(read, row_log[:, None] - column_log[None, :], 0.0)), 0.0)
    return tl.where(read, 1.0, 0.0)


@triton.jit(do_not_specialize=["tiles"])
def noisy_outputs_kernel(
    q,
    k,
    v,
    g,
    beta,
    decayed_q,
    decayed_k,
    clean_weights,
    block_weights,
    clean_values,
    states,
    noisy_values,
    out,
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
    """out and noisy_values (Z~, delta only) [B, T, H, V] of the noisy rows; clean_values are Z (delta) or v."""
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
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

    state = load_matrix(states + chunk_head * key_dim * value_dim + vt * BV, key_dim, value_dim, BK, BV,
                        EXACT_K and EXACT_V, value_dim - vt * BV)
    z = load_rows(clean_values + head * z_head + vt * BV, clean_token, clean_valid, z_token, value_dim - vt * BV, BV,
                  EXACT_V)
    b = load_beta(beta + head, clean_token, clean_valid, beta_token)
    corrected = (z.to(tl.float32) * b[:, None]).to(z.dtype)
    before = column[None, :] < anchor[:, None]
    strict = (row[None, :] >= start[:, None]) & (row[None, :] < row[:, None])
    inside = (row[None, :] >= start[:, None]) & (row[None, :] < stop[:, None])
    if GATE != 2:
        keys = normalised(load_rows(k + key_head * k_head, clean_token, clean_valid, k_token, key_dim, BK, EXACT_K), L2NORM)
        noisy_keys = normalised(load_rows(k + key_head * k_head, token, valid, k_token, key_dim, BK, EXACT_K), L2NORM)
        if GATE == 1:
            gam = tl.cumsum(load_log_decay(g + head, clean_token, clean_valid, g_token), 0)
            t, e = block_sums(load_log_decay(g + head, token, valid, g_token), start, stop, R)
            c = anchor_decay(gam, anchor, C)
        else:
            gam, t, e, c = column * 0.0, row * 0.0, row * 0.0, row * 0.0
    clean_place = tile_head * 2 * R * C + row[:, None] * C + column[None, :]
    block_place = tile_head * 2 * R * R + row[:, None] * R + row[None, :]

    values = load_rows(v + head * v_head + vt * BV, token, valid, v_token, value_dim - vt * BV, BV, EXACT_V)
    noisy_b = load_beta(beta + head, token, valid, beta_token)
    solved = values.to(tl.float32)
    if DELTA:
        if GATE == 2:
            grown = load_rows(decayed_k + head * key_dim, token, valid, H * key_dim, key_dim, BK, EXACT_K)
            solved -= tl.dot(grown, state, input_precision=PRECISION)
            weight = tl.load(clean_weights + clean_place)
            lower = tl.where(strict, tl.load(block_weights + block_place).to(tl.float32), 0.0)
        else:
            read = tl.dot(noisy_keys, state, input_precision=PRECISION)
            solved -= read * tl.exp2(c + t)[:, None] if GATE == 1 else read
            weight = tl.dot(noisy_keys, tl.trans(keys), input_precision=PRECISION)
            weight = (weight * masked_decay(c + t, gam, before, GATE)).to(z.dtype)
            lower = tl.zeros([R, R], dtype=tl.float32)
            if LARGEST > 1:
                lower = tl.dot(noisy_keys, tl.trans(noisy_keys), input_precision=PRECISION)
                lower = lower * masked_decay(t, t, strict, GATE)
        solved -= tl.dot(weight, corrected, input_precision=PRECISION)
        if LARGEST > 1:
            inverse = unit_lower_inverse(lower * noisy_b[None, :], row - start, R, LARGEST, PRECISION)
            solved = tl.dot(inverse.to(z.dtype), solved.to(z.dtype), input_precision=PRECISION)
        store_rows(noisy_values + head * value_dim + vt * BV, solved, token, valid, H * value_dim,
                   value_dim - vt * BV, BV, EXACT_V)
    own = (solved * noisy_b[:, None]).to(z.dtype)

    if GATE == 2:
        grown = load_rows(decayed_q + head * key_dim, token, valid, H * key_dim, key_dim, BK, EXACT_K)
        result = tl.dot(grown, state, input_precision=PRECISION)
        weight = tl.load(clean_weights + clean_place + R * C)
        block_weight = tl.load(block_weights + block_place + R * R)
    else:
        queries = normalised(load_rows(q + key_head * q_head, token, valid, q_token, key_dim, BK, EXACT_K), L2NORM)
        result = tl.dot(queries, state, input_precision=PRECISION)
        if GATE == 1:
            result = result * tl.exp2(c + e)[:, None]
        weight = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        weight = (weight * masked_decay(c + e, gam, before, GATE)).to(z.dtype)
        block_weight = tl.dot(queries, tl.trans(noisy_keys), input_precision=PRECISION)
        block_weight = (block_weight * masked_decay(e, t, inside, GATE)).to(z.dtype)
    result += tl.dot(weight, corrected, input_precision=PRECISION)
    result += tl.dot(block_weight, own, input_precision=PRECISION)
    store_rows(out + head * value_dim + vt * BV, result * scale, token, valid, H * value_dim, value_dim - vt * BV, BV,
               EXACT_V)
