"""Backward of the clean stream: the walk back over the states, then the gradients of every chunk's rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    load_beta,
    load_log_decay,
    load_matrix,
    load_rows,
    normalised,
    prefix_decay,
    store_rows,
    through_norm,
)


@triton.jit
def states_grad_kernel(
    k,
    g,
    beta,
    inverse,
    grad_final,
    grad_corrected,
    grad_states,
    grad_v,
    grad_initial,
    document_token,
    document_length,
    document_chunk,
    document_row,
    key_dim,
    value_dim,
    k_token,
    k_head,
    g_token,
    beta_token,
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
    """One program walks back over the chunks of a (document, head, tile of V).

    grad_states [N, H, K, V]: in, the gradient of each chunk's entry state from its readers; out, the gradient of the
    state AFTER the chunk. grad_v [B, T, H, V] of the clean rows (E). grad_initial, grad_final [rows, H, K, V].
    """
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
    head, document = pid % H, pid // H
    first = tl.load(document_token + document)
    length = tl.load(document_length + document)
    begin = tl.load(document_chunk + document)
    end = tl.load(document_chunk + document + 1)
    source = tl.load(document_row + document)
    row, kc, vc = tl.arange(0, C), tl.arange(0, BK), vt * BV + tl.arange(0, BV)
    state_place = kc[:, None] * value_dim + vc[None, :]
    state_mask = (kc < key_dim)[:, None] & (vc < value_dim)[None, :]
    width = value_dim - vt * BV

    grad_state = tl.zeros([BK, BV], dtype=tl.float32)
    if FINAL:
        if source >= 0:
            grad_state = tl.load(
                grad_final + (source.to(tl.int64) * H + head) * key_dim * value_dim + state_place, mask=state_mask,
                other=0.0,
            ).to(tl.float32)
    for back in range(0, end - begin):
        step = end - begin - 1 - back
        chunk = begin.to(tl.int64) + step
        local = step * C + row
        valid = local < length
        token = (first + local).to(tl.int64)
        chunk_head = chunk.to(tl.int64) * H + head
        place = grad_states + chunk_head * key_dim * value_dim + state_place
        if EXACT_K and EXACT_V:
            from_readers = tl.load(place).to(tl.float32)
        else:
            from_readers = tl.load(place, mask=state_mask, other=0.0).to(tl.float32)
        keys = normalised(load_rows(k + (head // GROUP) * k_head, token, valid, k_token, key_dim, BK, EXACT_K), L2NORM)
        rounded = grad_state.to(keys.dtype)
        if EXACT_K and EXACT_V:
            tl.store(place, rounded.to(grad_states.dtype.element_ty))
        else:
            tl.store(place, rounded.to(grad_states.dtype.element_ty), mask=state_mask)
        b = load_beta(beta + head, token, valid, beta_token)
        flat = chunk.to(tl.int64) * C + row
        error = tl.dot(keys, rounded, input_precision=PRECISION)
        if GATE == 1:
            gam = tl.cumsum(load_log_decay(g + head, token, valid, g_token), 0)
            last = tl.sum(tl.where(row == C - 1, gam, 0.0), 0)
            error = error * tl.exp2(last - gam)[:, None]
            grad_state = grad_state * tl.exp2(last)
        error += load_rows(
            grad_corrected + head * value_dim + vt * BV, flat, valid, H * value_dim, width, BV, EXACT_V
        ).to(tl.float32)
        error = error * b[:, None]
        grad_state += from_readers
        if DELTA:
            solve = tl.load(inverse + chunk_head * C * C + row[:, None] * C + row[None, :])
            error = tl.dot(tl.trans(solve), error.to(solve.dtype), input_precision=PRECISION)
            grown = error * tl.exp2(gam)[:, None] if GATE == 1 else error
            grad_state -= tl.dot(tl.trans(keys), grown.to(keys.dtype), input_precision=PRECISION)
        store_rows(grad_v + head * value_dim + vt * BV, error, token, valid, H * value_dim, width, BV, EXACT_V)
    if INITIAL:
        if source >= 0:
            tl.store(
                grad_initial + (source.to(tl.int64) * H + head) * key_dim * value_dim + state_place, grad_state,
                mask=state_mask,
            )


@triton.jit(do_not_specialize=["chunks"])
def clean_grad_kernel(
    q,
    k,
    g,
    beta,
    values,
    states,
    grad_out,
    grad_states,
    grad_keys,
    grad_gam,
    grad_q,
    grad_k,
    grad_v,
    grad_g,
    grad_beta,
    chunk_token,
    chunk_length,
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
    NK: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_q, grad_k [B,T,H,K], grad_g, grad_beta [B,T,H] of the clean rows of one (chunk, head). grad_v holds E;
    grad_states the gradient of the state after each chunk; grad_keys has NK partial sums."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    key_head = head // GROUP
    row = tl.arange(0, C)
    token = (tl.load(chunk_token + chunk) + row).to(tl.int64)
    valid = row < tl.load(chunk_length + chunk)
    state_place = (chunk.to(tl.int64) * H + head) * key_dim * value_dim
    b = load_beta(beta + head, token, valid, beta_token)
    seen, below = row[:, None] >= row[None, :], row[:, None] > row[None, :]
    if GATE == 1:
        gam = tl.cumsum(load_log_decay(g + head, token, valid, g_token), 0)
        last = tl.sum(tl.where(row == C - 1, gam, 0.0), 0)
        ends = 0.0
    keys = normalised(load_rows(k + key_head * k_head, token, valid, k_token, key_dim, BK, EXACT_K), L2NORM)
    dtype = keys.dtype

    # queries
    rows_grad = tl.zeros([C, BK], dtype=tl.float32)
    weight = tl.zeros([C, C], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        grad = load_rows(grad_out + head * value_dim + vt * BV, token, valid, H * value_dim, width, BV, EXACT_V)
        z = load_rows(values + head * z_head + vt * BV, token, valid, z_token, width, BV, EXACT_V)
        corrected = (z.to(tl.float32) * b[:, None]).to(dtype)
        weight += tl.dot(grad, tl.trans(corrected), input_precision=PRECISION)
        state = load_matrix(states + state_place + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        rows_grad += tl.dot(grad, tl.trans(state), input_precision=PRECISION)
    if GATE == 1:
        weight = weight * prefix_decay(gam, gam, seen)
        rows_grad = rows_grad * tl.exp2(gam)[:, None]
    weight = tl.where(seen, weight, 0.0).to(dtype)
    rows_grad += tl.dot(weight, keys, input_precision=PRECISION)
    rows_grad = rows_grad * scale
    raw = load_rows(q + key_head * q_head, token, valid, q_token, key_dim, BK, EXACT_K)
    if GATE == 1:
        gate = tl.sum(rows_grad * normalised(raw, L2NORM).to(tl.float32), 1)
    store_rows(grad_q + head * key_dim, through_norm(rows_grad, raw, L2NORM), token, valid, H * key_dim, key_dim, BK,
               EXACT_K)

    # keys: columns of every reader (grad_keys), of the next state, and of the chunk's own solve; rows of that solve
    column_grad = tl.zeros([C, BK], dtype=tl.float32)
    rows_grad = tl.zeros([C, BK], dtype=tl.float32)
    weight = tl.zeros([C, C], dtype=tl.float32)
    beta_sum = tl.zeros([C], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        z = load_rows(values + head * z_head + vt * BV, token, valid, z_token, width, BV, EXACT_V)
        corrected = (z.to(tl.float32) * b[:, None]).to(dtype)
        error = load_rows(grad_v + head * value_dim + vt * BV, token, valid, H * value_dim, width, BV, EXACT_V)
        beta_sum += tl.sum(error.to(tl.float32) * z.to(tl.float32), 1)
        after = load_matrix(grad_states + state_place + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        column_grad += tl.dot(corrected, tl.trans(after), input_precision=PRECISION)
        if DELTA or GATE == 1:
            state = load_matrix(states + state_place + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        if GATE == 1:
            ends += tl.sum(tl.sum(state.to(tl.float32) * after.to(tl.float32), 1), 0)
        if DELTA:
            weight += tl.dot(error, tl.trans(corrected), input_precision=PRECISION)
            rows_grad += tl.dot(error, tl.trans(state), input_precision=PRECISION)
    tl.store(grad_beta + token * H + head, (beta_sum / b).to(grad_beta.dtype.element_ty), mask=valid)
    if GATE == 1:
        column_grad = column_grad * tl.exp2(last - gam)[:, None]
        at_end = ends * tl.exp2(last) + tl.sum(tl.sum(column_grad * keys.to(tl.float32), 1), 0)
    if DELTA:
        if GATE == 1:
            weight = weight * prefix_decay(gam, gam, below)
            rows_grad = rows_grad * tl.exp2(gam)[:, None]
        weight = tl.where(below, weight, 0.0).to(dtype)
        rows_grad += tl.dot(weight, keys, input_precision=PRECISION)
        column_grad -= tl.dot(tl.trans(weight), keys, input_precision=PRECISION)
        if GATE == 1:
            gate -= tl.sum(rows_grad * keys.to(tl.float32), 1)
    flat = chunk.to(tl.int64) * C + row
    for part in tl.static_range(NK):
        part_row = flat + part * chunks * C
        column_grad += load_rows(
            grad_keys + head * key_dim, part_row, valid, H * key_dim, key_dim, BK, EXACT_K
        ).to(tl.float32)
    raw = load_rows(k + key_head * k_head, token, valid, k_token, key_dim, BK, EXACT_K)
    store_rows(grad_k + head * key_dim, through_norm(column_grad - rows_grad, raw, L2NORM), token, valid, H * key_dim,
               key_dim, BK, EXACT_K)
    if GATE == 1:
        gate -= tl.sum(column_grad * keys.to(tl.float32), 1)
        gate += tl.load(grad_gam + flat * H + head)
        gate += tl.where(row == C - 1, at_end, 0.0)
        gate = tl.cumsum(gate, 0, reverse=True)
        tl.store(grad_g + token * H + head, gate.to(grad_g.dtype.element_ty), mask=valid)
