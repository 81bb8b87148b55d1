"""What a prefill of 16-bit rows leaves behind: states between chunks, corrected values, pending rows.

As `clean.clean_states_kernel`, but what becomes the state is as good as float32 (docs/kernels.md): keys are taken as
they are, which is exact in TF32, and states and corrected values as two of its numbers or three products. What outputs
read of them, states and corrected values, is rounded to 16 bits, as in training.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_tile, row_norm, store_tile


@triton.jit
def product_of_exact(a, b):
    """a b in float32 for float32 matrices; a has at most 11 significant bits: two products on tensor cores do."""
    high = ((b.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.dot(a, high, tl.dot(a, b - high, input_precision="tf32"), input_precision="tf32")


@triton.jit(do_not_specialize=["chunk_step", "slots", "noisy_slots"])
def prefill_states_kernel(
    k, v, inverse, initial, values, states, pending_d, chunk_gam, chunk_beta,
    document_token, document_length, document_chunk, document_row, chunk_step, slots, noisy_slots,
    key_dim: tl.constexpr, value_dim: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, NV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    L2NORM: tl.constexpr, EXACT_K: tl.constexpr, EXACT_V: tl.constexpr,
):
    """One program walks the chunks of a (document, head, tile of V), from the row's state in `initial` [B, H, K, V].

    states [N, H, K, V] before each chunk and values Z [B, T, H, V] (delta) in 16 bits; pending_d [B, Lc, H, V] float32
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
        out = states + chunk_head * key_dim * value_dim + state_place
        if EXACT_K and EXACT_V:
            tl.store(out, state.to(states.dtype.element_ty))
        else:
            tl.store(out, state.to(states.dtype.element_ty), mask=state_mask)
        keys = load_tile(k + (head // GROUP) * k_head, first, count, k_token, key_dim, C, BK, EXACT_K).to(tl.float32)
        norm = row_norm(keys, C, L2NORM)
        result = load_tile(v + head * v_head + tile * BV, first, count, v_token, width, C, BV, EXACT_V).to(tl.float32)
        b = tl.load(chunk_beta + chunk_head * C + row)
        if GATE == 1:
            gam = tl.load(chunk_gam + chunk_head * C + row)
            last = tl.load(chunk_gam + chunk_head * C + C - 1)
        if DELTA:
            read = product_of_exact(keys, state)
            read = read * (norm * tl.exp2(gam) if GATE == 1 else norm)[:, None]
            solve = tl.load(inverse + chunk_head * C * C + row[:, None] * C + row[None, :])
            result = tl.dot(solve, result - read, input_precision="tf32x3")
            store_tile(values + head * value_dim + tile * BV, result, first, count, H * value_dim, width, C, BV, EXACT_V)
        added = result * b[:, None]
        store_tile(pending_d + head * value_dim + tile * BV, added, kept + step * chunk_step, count, H * value_dim,
                   width, C, BV, EXACT_V)
        if GATE == 1:
            added = added * (norm * tl.exp2(last - gam))[:, None]
            state = state * tl.exp2(last)
        else:
            added = added * norm[:, None]
        state += product_of_exact(tl.trans(keys), added)


@triton.jit(do_not_specialize=["slots", "noisy_slots"])
def pending_keys_kernel(
    k, pending_k, chunk_token, chunk_length, slots, noisy_slots,
    key_dim: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr, KEY_HEADS: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, L2NORM: tl.constexpr, EXACT_K: tl.constexpr,
):
    """pending_k [B, Lc, Hk, K] float32: the clean keys of a chunk, normalised."""
    pid = tl.program_id(0)
    head, chunk = pid % KEY_HEADS, pid // KEY_HEADS
    first = tl.load(chunk_token + chunk).to(tl.int64)
    count = tl.load(chunk_length + chunk)
    keys = load_tile(k + head * k_head, first, count, k_token, key_dim, C, BK, EXACT_K).to(tl.float32)
    keys = keys * row_norm(keys, C, L2NORM)[:, None]
    kept = first - first // slots * noisy_slots
    store_tile(pending_k + head * key_dim, keys, kept, count, KEY_HEADS * key_dim, key_dim, C, BK, EXACT_K)
