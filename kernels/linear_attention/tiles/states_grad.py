"""Backward of the clean stream, the walk back over the states."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_tile, row_norm, store_tile


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
