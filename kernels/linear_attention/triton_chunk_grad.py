"""What all readers of a chunk - its own queries and its noisy tiles - send back to it: one program per (chunk, head, tile
of V), which accumulates over the chunk's tiles, so that nothing of the size of a state exists per tile or block.

    grad_D   += A_q^T do        - P^T E                   + Pq^T do~
    grad_k   += (do D^T)^T q    - (E D^T)^T k~            + (do~ D^T)^T q~         (decays included)
    grad_S0  += (exp(gam) q)^T do - (exp(c + t) k~)^T E   + (exp(c + e) q~)^T do~
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import load_beta, load_log_decay, load_rows, normalised, prefix_decay, store_rows
from .triton_noisy import anchor_decay, block_sums, masked_decay


@triton.jit(do_not_specialize=["chunks"])
def chunk_grad_kernel(
    q,
    k,
    g,
    beta,
    values,
    grad_out,
    noisy_error,
    grad_anchor,
    grad_states,
    grad_corrected,
    grad_keys,
    grad_gam,
    chunk_token,
    chunk_length,
    chunk_tile,
    tile_token,
    tile_anchor,
    tile_start,
    tile_stop,
    chunks,
    scale,
    key_dim,
    value_dim,
    q_token,
    q_head,
    k_token,
    k_head,
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
    GATE: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_states [N, H, K, V] and grad_corrected [T', H, V] (token-major), their part of this tile of V; grad_keys
    [NV, T', H, K] partial over tiles of V; grad_gam [N, C, H] from anchors. noisy_error = E (gradient of v~)."""
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
    head, chunk = pid % H, pid // H
    key_head = head // GROUP
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_token = (tl.load(chunk_token + chunk) + column).to(tl.int64)
    clean_valid = column < tl.load(chunk_length + chunk)
    begin, end = tl.load(chunk_tile + chunk), tl.load(chunk_tile + chunk + 1)
    width = value_dim - vt * BV

    b = load_beta(beta + head, clean_token, clean_valid, beta_token)
    if GATE == 1:
        gam = tl.cumsum(load_log_decay(g + head, clean_token, clean_valid, g_token), 0)
    else:
        gam = column * 0.0
    keys = normalised(load_rows(k + key_head * k_head, clean_token, clean_valid, k_token, key_dim, BK, EXACT_K), L2NORM)
    dtype = keys.dtype
    z = load_rows(values + head * z_head + vt * BV, clean_token, clean_valid, z_token, width, BV, EXACT_V)
    corrected = (z.to(tl.float32) * b[:, None]).to(dtype)

    # the chunk's own queries
    queries = normalised(load_rows(q + key_head * q_head, clean_token, clean_valid, q_token, key_dim, BK, EXACT_K), L2NORM)
    grad = load_rows(grad_out + head * value_dim + vt * BV, clean_token, clean_valid, H * value_dim, width, BV, EXACT_V)
    seen = column[:, None] >= column[None, :]
    if GATE == 1:
        decay = prefix_decay(gam, gam, seen) * scale
        grown = tl.exp2(gam) * scale
    else:
        decay = tl.where(seen, scale, 0.0)
        grown = column * 0.0 + scale
    weight = (tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * decay).to(dtype)
    corrected_sum = tl.dot(tl.trans(weight), grad, input_precision=PRECISION)
    weight = (tl.dot(grad, tl.trans(corrected), input_precision=PRECISION) * decay).to(dtype)
    keys_sum = tl.dot(tl.trans(weight), queries, input_precision=PRECISION)
    grown_rows = (queries.to(tl.float32) * grown[:, None]).to(dtype)
    states_sum = tl.dot(tl.trans(grown_rows), grad, input_precision=PRECISION)
    gam_sum = column * 0.0

    for step in range(0, end - begin):
        meta = (begin.to(tl.int64) + step) * R + row
        token = tl.load(tile_token + meta).to(tl.int64)
        valid = token >= 0
        anchor = tl.load(tile_anchor + meta)
        before = column[None, :] < anchor[:, None]
        if GATE == 1:
            start = tl.load(tile_start + meta)
            stop = tl.load(tile_stop + meta)
            t, e = block_sums(load_log_decay(g + head, token, valid, g_token), start, stop, R)
            c = anchor_decay(gam, anchor, C)
            if vt == 0:
                at_anchor = tl.load(grad_anchor + meta * H + head)
                gam_sum += tl.sum(tl.where(column[None, :] == anchor[:, None] - 1, at_anchor[:, None], 0.0), 0)
        else:
            t, e, c = row * 0.0, row * 0.0, row * 0.0
        noisy = normalised(load_rows(q + key_head * q_head, token, valid, q_token, key_dim, BK, EXACT_K), L2NORM)
        grad = load_rows(grad_out + head * value_dim + vt * BV, token, valid, H * value_dim, width, BV, EXACT_V)
        decay = masked_decay(c + e, gam, before, GATE) * scale
        weight = (tl.dot(noisy, tl.trans(keys), input_precision=PRECISION) * decay).to(dtype)
        corrected_sum += tl.dot(tl.trans(weight), grad, input_precision=PRECISION)
        weight = (tl.dot(grad, tl.trans(corrected), input_precision=PRECISION) * decay).to(dtype)
        keys_sum += tl.dot(tl.trans(weight), noisy, input_precision=PRECISION)
        factor = tl.exp2(c + e) * scale if GATE == 1 else row * 0.0 + scale
        grown_rows = (noisy.to(tl.float32) * factor[:, None]).to(dtype)
        states_sum += tl.dot(tl.trans(grown_rows), grad, input_precision=PRECISION)
        if DELTA:
            noisy = normalised(load_rows(k + key_head * k_head, token, valid, k_token, key_dim, BK, EXACT_K), L2NORM)
            grad = load_rows(noisy_error + head * value_dim + vt * BV, token, valid, H * value_dim, width, BV, EXACT_V)
            decay = -masked_decay(c + t, gam, before, GATE)
            weight = (tl.dot(noisy, tl.trans(keys), input_precision=PRECISION) * decay).to(dtype)
            corrected_sum += tl.dot(tl.trans(weight), grad, input_precision=PRECISION)
            weight = (tl.dot(grad, tl.trans(corrected), input_precision=PRECISION) * decay).to(dtype)
            keys_sum += tl.dot(tl.trans(weight), noisy, input_precision=PRECISION)
            factor = -tl.exp2(c + t) if GATE == 1 else row * 0.0 - 1.0
            grown_rows = (noisy.to(tl.float32) * factor[:, None]).to(dtype)
            states_sum += tl.dot(tl.trans(grown_rows), grad, input_precision=PRECISION)

    kc, vc = tl.arange(0, BK), tl.arange(0, BV)
    place = (
        grad_states + (chunk.to(tl.int64) * H + head) * key_dim * value_dim + vt * BV
        + kc[:, None] * value_dim + vc[None, :]
    )
    states_sum = states_sum.to(grad_states.dtype.element_ty)
    if EXACT_K and EXACT_V:
        tl.store(place, states_sum)
    else:
        tl.store(place, states_sum, mask=(kc < key_dim)[:, None] & (vc < width)[None, :])
    flat = chunk.to(tl.int64) * C + column  # chunk rows, padding included: nothing here is read behind chunk_length
    store_rows(grad_corrected + head * value_dim + vt * BV, corrected_sum, flat, clean_valid, H * value_dim, width, BV,
               EXACT_V)
    store_rows(grad_keys + head * key_dim, keys_sum, flat + vt * chunks * C, clean_valid, H * key_dim, key_dim, BK, EXACT_K)
    if GATE == 1:
        if vt == 0:
            tl.store(grad_gam + flat * H + head, gam_sum)
