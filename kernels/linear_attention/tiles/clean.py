"""The clean stream, forward: the triangular inverse of every chunk, the states between chunks, the outputs.

Per head and chunk with entry state S0 (docs/kernels.md): gam the inclusive cumulative log decay, A the strictly lower
decayed key-key products, Z = (I + A diag(beta))^-1 (v - exp(gam) k S0), D = beta Z, next state exp(gam_C) S0 +
(exp(gam_C - gam) k)^T D, output scale (exp(gam) q S0 + A_q D). Without the delta rule Z = v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_matrix, load_tile, log_weights, row_norm, store_tile, unit_triangular_inverse
from .places import rows_of


@triton.jit(do_not_specialize=["chunks"])
def clean_inverse_kernel(
    k,
    weights,
    inverse,
    chunk_gam,
    chunk_beta,
    chunk_token,
    chunk_length,
    chunks,
    key_dim: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """inverse [N, H, C, C] = (I + A diag(beta))^-1. Channel gates: A is read from weights [N, H, C, C]."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    row = tl.arange(0, C)
    chunk_head = pid.to(tl.int64)
    place = chunk_head * C * C + row[:, None] * C + row[None, :]
    below = row[:, None] > row[None, :]
    b = tl.load(chunk_beta + chunk_head * C + row)
    if GATE == 2:
        lower = tl.where(below, tl.load(weights + place).to(tl.float32) * b[None, :], 0.0)
    else:
        first, count = rows_of(chunk, chunk_token, chunk_length)
        keys = load_tile(k + (head // GROUP) * k_head, first, count, k_token, key_dim, C, BK, EXACT_K)
        norm = row_norm(keys, C, L2NORM)
        gam = b
        if GATE == 1:
            gam = tl.load(chunk_gam + chunk_head * C + row)
        lower = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
        lower = lower * (log_weights(gam, gam, below, GATE) * (norm[:, None] * (norm * b)[None, :]))
    result = unit_triangular_inverse(lower, row, False, C, C, PRECISION, tl.float32)
    tl.store(inverse + place, result.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["chunk_step"])
def clean_states_kernel(
    k,
    v,
    decayed_k,
    tail_k,
    total,
    inverse,
    initial,
    values,
    states,
    final,
    chunk_gam,
    chunk_beta,
    document_token,
    document_length,
    document_chunk,
    document_row,
    chunk_step,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    v_token: tl.constexpr,
    v_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks the chunks of a (document, head, tile of V): states [N, H, K, V] before each, values Z."""
    pid = tl.program_id(0)
    tile, pid = pid % NV, pid // NV
    head, document = pid % H, pid // H
    begin_token = tl.load(document_token + document).to(tl.int64)
    length = tl.load(document_length + document)
    begin = tl.load(document_chunk + document)
    end = tl.load(document_chunk + document + 1)
    source = tl.load(document_row + document)

    row, kc, vc = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    state_place = kc[:, None] * value_dim + vc[None, :]
    state_mask = (kc < key_dim)[:, None] & (vc < value_dim)[None, :]
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if INITIAL:
        if source >= 0:
            place = initial + (source.to(tl.int64) * H + head) * key_dim * value_dim + state_place
            state = tl.load(place, mask=state_mask, other=0.0).to(tl.float32)
    for step in range(0, end - begin):
        chunk = begin.to(tl.int64) + step
        first = begin_token + step * chunk_step
        count = tl.minimum(length - step * chunk_step, chunk_step)
        chunk_head = chunk.to(tl.int64) * H + head
        out = states + chunk_head * key_dim * value_dim + state_place
        rounded = state.to(states.dtype.element_ty)
        if EXACT_K and EXACT_V:
            tl.store(out, rounded)
        else:
            tl.store(out, rounded, mask=state_mask)
        keys = load_tile(k + (head // GROUP) * k_head, first, count, k_token, key_dim, C, BK, EXACT_K)
        norm = row_norm(keys, C, L2NORM)
        z = load_tile(v + head * v_head + tile * BV, first, count, v_token, value_dim - tile * BV, C, BV, EXACT_V)
        b = tl.load(chunk_beta + chunk_head * C + row)
        if GATE == 1:
            gam = tl.load(chunk_gam + chunk_head * C + row)
            last = tl.load(chunk_gam + chunk_head * C + C - 1)
        if DELTA:
            if GATE == 2:
                grown = load_tile(decayed_k + head * key_dim, first, count, H * key_dim, key_dim, C, BK, EXACT_K)
                read = tl.dot(grown, rounded.to(grown.dtype), input_precision=PRECISION)
            else:
                read = tl.dot(keys, rounded.to(keys.dtype), input_precision=PRECISION)
                read = read * (norm * tl.exp2(gam) if GATE == 1 else norm)[:, None]
            solve = tl.load(inverse + chunk_head * C * C + row[:, None] * C + row[None, :])
            result = tl.dot(solve, (z.to(tl.float32) - read).to(solve.dtype), input_precision=PRECISION)
            store_tile(values + head * value_dim + tile * BV, result, first, count, H * value_dim,
                       value_dim - tile * BV, C, BV, EXACT_V)
            added = result * b[:, None]
        else:
            added = z.to(tl.float32) * b[:, None]
        if GATE == 1:
            added = added * (norm * tl.exp2(last - gam))[:, None]
            state = state * tl.exp2(last)
        if GATE == 0:
            added = added * norm[:, None]
        if GATE == 2:
            keys = load_tile(tail_k + head * key_dim, chunk * C, count, H * key_dim, key_dim, C, BK, EXACT_K)
            state = state * tl.load(total + chunk_head * key_dim + kc, mask=kc < key_dim, other=0.0)[:, None]
        state += tl.dot(tl.trans(keys), added.to(keys.dtype), input_precision=PRECISION)
    if FINAL:
        if source >= 0:
            place = final + (source.to(tl.int64) * H + head) * key_dim * value_dim + state_place
            tl.store(place, state, mask=state_mask)


@triton.jit(do_not_specialize=["chunks"])
def clean_outputs_kernel(
    q,
    k,
    decayed_q,
    weights,
    values,
    states,
    out,
    chunk_gam,
    chunk_beta,
    chunk_token,
    chunk_length,
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
    GATE: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [B, T, H, V] of the clean rows; values are Z (delta) or v, with their own strides."""
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
    head, chunk = pid % H, pid // H
    row = tl.arange(0, C)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    chunk_head = pid.to(tl.int64)
    key_head = head // GROUP
    width = value_dim - vt * BV
    seen = row[:, None] >= row[None, :]
    b = tl.load(chunk_beta + chunk_head * C + row)
    state = load_matrix(states + chunk_head * key_dim * value_dim + vt * BV, key_dim, value_dim, BK, BV,
                        EXACT_K and EXACT_V, width)
    z = load_tile(values + head * z_head + vt * BV, first, count, z_token, width, C, BV, EXACT_V)
    if GATE == 2:
        grown = load_tile(decayed_q + head * key_dim, first, count, H * key_dim, key_dim, C, BK, EXACT_K)
        result = tl.dot(grown, state, input_precision=PRECISION)
        weight = tl.load(weights + chunk_head * C * C + row[:, None] * C + row[None, :]).to(tl.float32)
        weight = tl.where(seen, weight * b[None, :], 0.0).to(z.dtype)
    else:
        queries = load_tile(q + key_head * q_head, first, count, q_token, key_dim, C, BK, EXACT_K)
        keys = load_tile(k + key_head * k_head, first, count, k_token, key_dim, C, BK, EXACT_K)
        norm = row_norm(queries, C, L2NORM)
        gam = b
        if GATE == 1:
            gam = tl.load(chunk_gam + chunk_head * C + row)
        weight = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        factor = norm[:, None] * (b * row_norm(keys, C, L2NORM))[None, :]
        weight = (weight * (log_weights(gam, gam, seen, GATE) * factor)).to(z.dtype)
        result = tl.dot(queries, state, input_precision=PRECISION)
        result = result * (norm * tl.exp2(gam) if GATE == 1 else norm)[:, None]
    result = tl.dot(weight, z, result, input_precision=PRECISION)
    store_tile(out + head * value_dim + vt * BV, result * scale, first, count, H * value_dim, width, C, BV, EXACT_V)
