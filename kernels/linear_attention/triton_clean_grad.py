"""Backward of the clean stream: the walk back over the states, then the gradients of every chunk's rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    load_matrix,
    load_tile,
    log_weights,
    product_of_tiles,
    product_with_state,
    row_norm,
    store_tile,
    through_factor,
)


@triton.jit(do_not_specialize=["chunk_step"])
def states_grad_kernel(
    k,
    decayed_k,
    tail_k,
    total,
    inverse,
    grad_final,
    grad_corrected,
    grad_states,
    grad_v,
    grad_initial,
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
    begin_token = tl.load(document_token + document).to(tl.int64)
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
        first = begin_token + step * chunk_step
        count = tl.minimum(length - step * chunk_step, chunk_step)
        chunk_head = chunk.to(tl.int64) * H + head
        place = grad_states + chunk_head * key_dim * value_dim + state_place
        if EXACT_K and EXACT_V:
            from_readers = tl.load(place).to(tl.float32)
        else:
            from_readers = tl.load(place, mask=state_mask, other=0.0).to(tl.float32)
        if GATE == 2:
            keys = load_tile(tail_k + head * key_dim, chunk * C, count, H * key_dim, key_dim, C, BK, EXACT_K)
        else:
            keys = load_tile(k + (head // GROUP) * k_head, first, count, k_token, key_dim, C, BK, EXACT_K)
            norm = row_norm(keys, C, L2NORM)
        rounded = grad_state.to(keys.dtype)
        if EXACT_K and EXACT_V:
            tl.store(place, rounded.to(grad_states.dtype.element_ty))
        else:
            tl.store(place, rounded.to(grad_states.dtype.element_ty), mask=state_mask)
        b = tl.load(chunk_beta + chunk_head * C + row)
        error = tl.dot(keys, rounded, input_precision=PRECISION)
        if GATE == 0:
            error = error * norm[:, None]
        if GATE == 1:
            gam = tl.load(chunk_gam + chunk_head * C + row)
            last = tl.load(chunk_gam + chunk_head * C + C - 1)
            error = error * (norm * tl.exp2(last - gam))[:, None]
            grad_state = grad_state * tl.exp2(last)
        if GATE == 2:
            passed = tl.load(total + chunk_head * key_dim + kc, mask=kc < key_dim, other=0.0)
            grad_state = grad_state * passed[:, None]
        error += load_tile(
            grad_corrected + head * value_dim + vt * BV, chunk * C, count, H * value_dim, width, C, BV, EXACT_V
        ).to(tl.float32)
        error = error * b[:, None]
        grad_state += from_readers
        if DELTA:
            solve = tl.load(inverse + chunk_head * C * C + row[:, None] * C + row[None, :])
            error = tl.dot(tl.trans(solve), error.to(solve.dtype), input_precision=PRECISION)
            grown = error
            if GATE == 0:
                grown = error * norm[:, None]
            if GATE == 1:
                grown = error * (norm * tl.exp2(gam))[:, None]
            if GATE == 2:
                keys = load_tile(decayed_k + head * key_dim, first, count, H * key_dim, key_dim, C, BK, EXACT_K)
            grad_state -= tl.dot(tl.trans(keys), grown.to(keys.dtype), input_precision=PRECISION)
        store_tile(grad_v + head * value_dim + vt * BV, error, first, count, H * value_dim, width, C, BV, EXACT_V)
    if INITIAL:
        if source >= 0:
            tl.store(
                grad_initial + (source.to(tl.int64) * H + head) * key_dim * value_dim + state_place, grad_state,
                mask=state_mask,
            )


@triton.jit
def inner_product(a, b, SIZE: tl.constexpr):
    """Sum of a[i] b[i] in fp32, a small piece at a time: whole states would not fit in registers."""
    total = tl.zeros([1024], dtype=tl.float32)
    for begin in range(0, SIZE, 1024):
        place = begin + tl.arange(0, 1024)
        if SIZE % 1024 == 0:
            left, right = tl.load(a + place), tl.load(b + place)
        else:
            left = tl.load(a + place, mask=place < SIZE, other=0.0)
            right = tl.load(b + place, mask=place < SIZE, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["chunks"])
def clean_grad_kernel(
    q,
    k,
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
    first = tl.load(chunk_token + chunk).to(tl.int64)
    count = tl.load(chunk_length + chunk)
    chunk_head = pid.to(tl.int64)
    state, after = states + chunk_head * key_dim * value_dim, grad_states + chunk_head * key_dim * value_dim
    b = tl.load(chunk_beta + chunk_head * C + row)
    out_stride = H * value_dim
    error_base, out_base, z_base = grad_v + head * value_dim, grad_out + head * value_dim, values + head * z_head
    gam, last = b, 0.0
    if GATE == 1:
        gam = tl.load(chunk_gam + chunk_head * C + row)
        last = tl.load(chunk_gam + chunk_head * C + C - 1)

    # queries
    keys = load_tile(k + key_head * k_head, first, count, k_token, key_dim, C, BK, EXACT_K)
    queries = load_tile(q + key_head * q_head, first, count, q_token, key_dim, C, BK, EXACT_K)
    dtype = keys.dtype
    k_norm, q_norm = row_norm(keys, C, L2NORM), row_norm(queries, C, L2NORM)
    seen, below = row[:, None] >= row[None, :], row[:, None] > row[None, :]
    grad_rows = product_with_state(out_base, state, first, count, out_stride, key_dim, value_dim, C, BK, BV, NV,
                                   EXACT_K, EXACT_V, PRECISION)  # fmt: skip
    if GATE == 1:
        grad_rows = grad_rows * tl.exp2(gam)[:, None]
    weight = product_of_tiles(out_base, z_base, first, first, count, count, out_stride, z_token, value_dim, C, C, BV, NV, EXACT_V, PRECISION)
    weight = (weight * (log_weights(gam, gam, seen, GATE) * (b * k_norm)[None, :])).to(dtype)
    grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION) * scale
    if GATE == 1:
        gate = tl.sum(grad_rows * queries.to(tl.float32), 1) * q_norm
    grad_rows = through_factor(grad_rows, queries, q_norm, L2NORM)
    store_tile(grad_q + head * key_dim, grad_rows, first, count, H * key_dim, key_dim, C, BK, EXACT_K)

    # keys as rows of the chunk's own solve. Vectors are loaded again in every phase: kept, the compiler shares matrices
    # built from them between phases and spills.
    grad_rows = tl.zeros([C, BK], dtype=tl.float32)
    row_sum = tl.zeros([C], dtype=tl.float32)
    if DELTA:
        tl.debug_barrier()
        b = tl.load(chunk_beta + chunk_head * C + row)
        if GATE == 1:
            gam = tl.load(chunk_gam + chunk_head * C + row)
        grad_rows = product_with_state(error_base, state, first, count, out_stride, key_dim, value_dim, C, BK, BV, NV,
                                       EXACT_K, EXACT_V, PRECISION)  # fmt: skip
        grad_rows = grad_rows * -tl.exp2(gam)[:, None] if GATE == 1 else -grad_rows
        weight = product_of_tiles(error_base, z_base, first, first, count, count, out_stride, z_token, value_dim, C, C, BV, NV, EXACT_V, PRECISION)
        weight = (weight * (log_weights(gam, gam, below, GATE) * (-b * k_norm)[None, :])).to(dtype)
        grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)
        if GATE == 1:
            row_sum = tl.sum(grad_rows * keys.to(tl.float32), 1) * k_norm
        # ... and as its columns
        tl.debug_barrier()
        b = tl.load(chunk_beta + chunk_head * C + row)
        if GATE == 1:
            gam = tl.load(chunk_gam + chunk_head * C + row)
        above = row[:, None] < row[None, :]
        weight = product_of_tiles(z_base, error_base, first, first, count, count, z_token, out_stride, value_dim, C, C, BV, NV, EXACT_V, PRECISION)
        factor = b[:, None] * (-k_norm)[None, :]
        weight = (weight * (log_weights(-gam, -gam, above, GATE) * factor)).to(dtype)
        grad_rows = tl.dot(weight, keys, grad_rows, input_precision=PRECISION)

    # keys as columns of the next state, and of every reader
    tl.debug_barrier()
    b = tl.load(chunk_beta + chunk_head * C + row)
    beta_sum = tl.zeros([C], dtype=tl.float32)
    tail = tl.zeros([C, BK], dtype=tl.float32)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        z = load_tile(z_base + vt * BV, first, count, z_token, width, C, BV, EXACT_V)
        error = load_tile(error_base + vt * BV, first, count, out_stride, width, C, BV, EXACT_V)
        beta_sum += tl.sum(error.to(tl.float32) * z.to(tl.float32), 1)
        next_grad = load_matrix(after + vt * BV, key_dim, value_dim, BK, BV, EXACT_K and EXACT_V, width)
        tail = tl.dot(z, tl.trans(next_grad), tail, input_precision=PRECISION)
    tl.store(grad_beta + (first + row) * H + head, (beta_sum / b).to(grad_beta.dtype.element_ty), mask=row < count)
    if GATE == 1:
        gam = tl.load(chunk_gam + chunk_head * C + row)
        last = tl.load(chunk_gam + chunk_head * C + C - 1)
        tail = tail * (b * tl.exp2(last - gam))[:, None]
        # gam of the last row scales the entry state and everything that is added to it
        at_end = tl.sum(tl.sum(tail * keys.to(tl.float32), 1) * k_norm, 0)
        at_end += tl.exp2(last) * inner_product(state, after, key_dim * value_dim)
    else:
        tail = tail * b[:, None]
    grad_rows += tail
    flat = chunk.to(tl.int64) * C
    for part in tl.static_range(NK):
        grad_rows += load_tile(
            grad_keys + head * key_dim, flat + part * chunks * C, count, H * key_dim, key_dim, C, BK, EXACT_K
        ).to(tl.float32)
    if GATE == 1:
        gate += 2.0 * row_sum - tl.sum(grad_rows * keys.to(tl.float32), 1) * k_norm
        gate += tl.load(grad_gam + chunk_head * C + row) + tl.where(row == C - 1, at_end, 0.0)
        gate = tl.cumsum(gate, 0, reverse=True)
        tl.store(grad_g + (first + row) * H + head, gate.to(grad_g.dtype.element_ty), mask=row < count)
    grad_rows = through_factor(grad_rows, keys, k_norm, L2NORM)
    store_tile(grad_k + head * key_dim, grad_rows, first, count, H * key_dim, key_dim, C, BK, EXACT_K)
