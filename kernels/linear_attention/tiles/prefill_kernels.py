"""The clean stream of a prefill in bfloat16: what becomes the state is computed with 16 bits of a number, not with 8.

As `clean`, with D = beta Z and entry state S of every chunk, but
    Z = U - W S,   U = X v,   W = X diag(exp(gam)) k,   X = (I + A diag(beta))^-1,
where U and W need no state and are found for all chunks at once, so that a step from chunk to chunk is two products. A
float32 number is handed to the tensor cores as two of bfloat16 (its first and its second eight bits). Keys and values
are one each, as they come. Outputs read states and Z rounded to one, as in training.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_tile, log_weights, row_norm, store_tile, unit_triangular_inverse
from .places import rows_of

# Triton's interpreter multiplies bfloat16 matrices as integers: there factors are widened to float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _product(a, b, total):
    """total + a b in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def _halves(x):
    """Two matrices of bfloat16 whose sum is x, but for 2^-17 of it."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["chunks"])
def prefill_solve_kernel(
    k, v, solved_k, solved_v, chunk_gam, chunk_beta, chunk_token, chunk_length, chunks,
    key_dim: tl.constexpr, value_dim: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, NV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr, EXACT_V: tl.constexpr,
):
    """W as two numbers each, solved_k [N, H, 2, C, K] bfloat16, and U, solved_v [N, H, C, V] float32."""
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    row = tl.arange(0, C)
    chunk_head = pid.to(tl.int64)
    below = row[:, None] > row[None, :]
    b = tl.load(chunk_beta + chunk_head * C + row)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    keys = load_tile(k + (head // GROUP) * k_head, first, count, k_token, key_dim, C, BK, EXACT_K).to(tl.bfloat16)
    norm = row_norm(keys, C, L2NORM)
    gam = b
    if GATE == 1:
        gam = tl.load(chunk_gam + chunk_head * C + row)
    lower = _product(keys, tl.trans(keys), tl.zeros([C, C], tl.float32))
    lower = lower * (log_weights(gam, gam, below, GATE) * (norm[:, None] * (norm * b)[None, :]))
    inverse = unit_triangular_inverse(lower, row, False, C, C, "tf32", tl.float32)
    # one step of Newton's method: TF32 has 11 bits, and twice as many are wanted
    rest = tl.where(row[:, None] == row[None, :], 1.0, 0.0) - inverse
    rest -= tl.dot(lower, inverse, input_precision="tf32x3")
    inverse += tl.dot(inverse, rest, input_precision="tf32")

    high, low = _halves(inverse)
    for vt in tl.static_range(NV):
        width = value_dim - vt * BV
        value = load_tile(v + head * v_head + vt * BV, first, count, v_token, width, C, BV, EXACT_V).to(tl.bfloat16)
        found = _product(high, value, _product(low, value, tl.zeros([C, BV], tl.float32)))
        store_tile(solved_v + vt * BV, found, chunk_head * C, C, value_dim, width, C, BV, EXACT_V)
    high, low = _halves(inverse * (norm * tl.exp2(gam) if GATE == 1 else norm)[None, :])
    found = _product(high, keys, _product(low, keys, tl.zeros([C, BK], tl.float32)))
    high, low = _halves(found)
    store_tile(solved_k, high, 2 * chunk_head * C, C, key_dim, key_dim, C, BK, EXACT_K)
    store_tile(solved_k, low, (2 * chunk_head + 1) * C, C, key_dim, key_dim, C, BK, EXACT_K)


@triton.jit(do_not_specialize=["chunk_step", "slots", "noisy_slots"])
def prefill_states_kernel(
    k, v, solved_k, solved_v, initial, values, states, pending_d, chunk_gam, chunk_beta,
    document_token, document_length, document_chunk, document_row, chunk_step, slots, noisy_slots,
    key_dim: tl.constexpr, value_dim: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, NV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    L2NORM: tl.constexpr, EXACT_K: tl.constexpr, EXACT_V: tl.constexpr,
):
    """One program walks the chunks of a (document, head, tile of V), from the row's state in `initial` [B, H, K, V].

    states [N, H, K, V] before each chunk and values Z [B, T, H, V] (delta), rounded; pending_d [B, Lc, H, V] float32
    = beta Z. slots: tokens of a row, of which noisy_slots stand behind the clean ones.
    """
    pid = tl.program_id(0)
    tile, pid = pid % NV, pid // NV
    head, document = pid % H, pid // H
    begin_token = tl.load(document_token + document).to(tl.int64)
    length = tl.load(document_length + document)
    begin = tl.load(document_chunk + document)
    end = tl.load(document_chunk + document + 1)
    source = tl.load(document_row + document)

    row, kc, vc = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    width = value_dim - tile * BV
    state_place = kc[:, None] * value_dim + vc[None, :]
    state_mask = (kc < key_dim)[:, None] & (vc < value_dim)[None, :]
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if source >= 0:
        place = initial + (source.to(tl.int64) * H + head) * key_dim * value_dim + state_place
        state = tl.load(place, mask=state_mask, other=0.0)
    kept = begin_token - begin_token // slots * noisy_slots
    for step in range(0, end - begin):
        chunk_head = (begin.to(tl.int64) + step) * H + head
        first = begin_token + step * chunk_step
        count = tl.minimum(length - step * chunk_step, chunk_step)
        high, low = _halves(state)
        out = states + chunk_head * key_dim * value_dim + state_place
        if EXACT_K and EXACT_V:
            tl.store(out, high.to(states.dtype.element_ty))
        else:
            tl.store(out, high.to(states.dtype.element_ty), mask=state_mask)
        keys = load_tile(k + (head // GROUP) * k_head, first, count, k_token, key_dim, C, BK, EXACT_K).to(tl.bfloat16)
        b = tl.load(chunk_beta + chunk_head * C + row)
        if DELTA:
            read_high = load_tile(solved_k, 2 * chunk_head * C, C, key_dim, key_dim, C, BK, EXACT_K)
            read_low = load_tile(solved_k, (2 * chunk_head + 1) * C, C, key_dim, key_dim, C, BK, EXACT_K)
            result = load_tile(solved_v + tile * BV, chunk_head * C, C, value_dim, width, C, BV, EXACT_V)
            read = _product(read_low, high, tl.zeros([C, BV], tl.float32))
            read = _product(read_high, low, read)
            result -= _product(read_high, high, read)
            store_tile(values + head * value_dim + tile * BV, result, first, count, H * value_dim, width, C, BV,
                       EXACT_V)
        else:
            result = load_tile(v + head * v_head + tile * BV, first, count, v_token, width, C, BV, EXACT_V)
        added = result.to(tl.float32) * b[:, None]
        store_tile(pending_d + head * value_dim + tile * BV, added, kept + step * chunk_step, count, H * value_dim,
                   width, C, BV, EXACT_V)
        norm = row_norm(keys, C, L2NORM)
        if GATE == 1:
            gam = tl.load(chunk_gam + chunk_head * C + row)
            last = tl.load(chunk_gam + chunk_head * C + C - 1)
            added = added * (norm * tl.exp2(last - gam))[:, None]
            state = state * tl.exp2(last)
        else:
            added = added * norm[:, None]
        high, low = _halves(added)
        state = _product(tl.trans(keys), low, state)
        state = _product(tl.trans(keys), high, state)


@triton.jit(do_not_specialize=["slots", "noisy_slots"])
def pending_keys_kernel(
    k, pending_k, chunk_token, chunk_length, slots, noisy_slots,
    key_dim: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr, KEY_HEADS: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, L2NORM: tl.constexpr, EXACT_K: tl.constexpr,
):
    """pending_k [B, Lc, Hk, K] float32: the clean keys of a chunk, normalised."""
    pid = tl.program_id(0)
    head, chunk = pid % KEY_HEADS, pid // KEY_HEADS
    first, count = rows_of(chunk, chunk_token, chunk_length)
    keys = load_tile(k + head * k_head, first, count, k_token, key_dim, C, BK, EXACT_K).to(tl.float32)
    keys = keys * row_norm(keys, C, L2NORM)[:, None]
    kept = first - first // slots * noisy_slots
    store_tile(pending_k + head * key_dim, keys, kept, count, KEY_HEADS * key_dim, key_dim, C, BK, EXACT_K)
