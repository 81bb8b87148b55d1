"""What all readers of a chunk, its own queries and its noisy tiles, send back to its corrected values and entry state.

One program per (chunk, head, tile of V) accumulates over the chunk's tiles, so that nothing of the size of a state
exists per tile or block:

    grad_D   += A_q^T do           - P^T E                 + Pq^T do~
    grad_S0  += (exp(gam) q)^T do  - (exp(c + t) k~)^T E   + (exp(c + e) q~)^T do~
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_tile, log_weights, row_norm, store_tile
from .gates import chunk_vectors, tile_vectors
from .places import rows_of


@triton.jit
def add_readers(rows, grad, keys, row_factor, decay, corrected_sum, states_sum, PRECISION: tl.constexpr):
    """rows [r, K] and grad [r, V] as in memory; decay [C, r]: weights without the keys' norms; row_factor [r]: decay,
    norm, sign and scale of the rows as readers of the entry state."""
    dtype = keys.dtype
    weight = tl.dot(keys, tl.trans(rows), input_precision=PRECISION)
    corrected_sum = tl.dot((weight * decay).to(dtype), grad, corrected_sum, input_precision=PRECISION)
    grown = (grad.to(tl.float32) * row_factor[:, None]).to(dtype)
    return corrected_sum, tl.dot(tl.trans(rows), grown, states_sum, input_precision=PRECISION)


@triton.jit(do_not_specialize=["chunks"])
def chunk_grad_kernel(
    q,
    k,
    grad_out,
    noisy_error,
    grad_states,
    grad_corrected,
    chunk_gam,
    chunk_beta,
    tile_logs,
    tile_beta,
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
    """grad_states [N, H, K, V] and grad_corrected [N * C, H, V]. noisy_error = E (gradient of v~)."""
    pid = tl.program_id(0)
    vt, pid = pid % NV, pid // NV
    head, chunk = pid % H, pid // H
    key_head = head // GROUP
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_first, clean_count = rows_of(chunk, chunk_token, chunk_length)
    begin, end = tl.load(chunk_tile + chunk), tl.load(chunk_tile + chunk + 1)
    width = value_dim - vt * BV
    chunk_head = chunk.to(tl.int64) * H + head
    out_stride = H * value_dim
    q_base, k_base = q + key_head * q_head, k + key_head * k_head
    out_base, error_base = grad_out + head * value_dim + vt * BV, noisy_error + head * value_dim + vt * BV
    gams, betas = chunk_gam + chunk_head * C, chunk_beta + chunk_head * C

    corrected_sum = tl.zeros([C, BV], dtype=tl.float32)  # without the keys' norms, which follow at the end
    states_sum = tl.zeros([BK, BV], dtype=tl.float32)
    keys = load_tile(k_base, clean_first, clean_count, k_token, key_dim, C, BK, EXACT_K)
    norm = row_norm(keys, C, L2NORM)
    gam, _ = chunk_vectors(gams, betas, C, GATE)
    rows = load_tile(q_base, clean_first, clean_count, q_token, key_dim, C, BK, EXACT_K)
    grad = load_tile(out_base, clean_first, clean_count, out_stride, width, C, BV, EXACT_V)
    factor = row_norm(rows, C, L2NORM) * scale
    decay = log_weights(-gam, -gam, column[:, None] <= column[None, :], GATE) * factor[None, :]
    grown = tl.exp2(gam) * factor if GATE == 1 else factor
    corrected_sum, states_sum = add_readers(rows, grad, keys, grown, decay, corrected_sum, states_sum, PRECISION)
    for step in range(0, end - begin):
        tile = begin.to(tl.int64) + step
        first = tl.load(tile_first + tile).to(tl.int64)
        count = tl.load(tile_count + tile)
        before = column[:, None] < tl.load(tile_anchor + tile * R + row)[None, :]
        gam, _ = chunk_vectors(gams, betas, C, GATE)
        t, e, c, _ = tile_vectors(tile_logs + (tile * H + head) * 3 * R, tile_beta + (tile * H + head) * R, R, GATE)
        rows = load_tile(q_base, first, count, q_token, key_dim, R, BK, EXACT_K)
        grad = load_tile(out_base, first, count, out_stride, width, R, BV, EXACT_V)
        factor = row_norm(rows, R, L2NORM) * scale
        decay = log_weights(-gam, -(c + e), before, GATE) * factor[None, :]
        grown = tl.exp2(c + e) * factor if GATE == 1 else factor
        corrected_sum, states_sum = add_readers(rows, grad, keys, grown, decay, corrected_sum, states_sum, PRECISION)
        if DELTA:
            rows = load_tile(k_base, first, count, k_token, key_dim, R, BK, EXACT_K)
            grad = load_tile(error_base, first, count, out_stride, width, R, BV, EXACT_V)
            factor = -row_norm(rows, R, L2NORM)
            decay = log_weights(-gam, -(c + t), before, GATE) * factor[None, :]
            grown = tl.exp2(c + t) * factor if GATE == 1 else factor
            corrected_sum, states_sum = add_readers(
                rows, grad, keys, grown, decay, corrected_sum, states_sum, PRECISION
            )

    kc, vc = tl.arange(0, BK), tl.arange(0, BV)
    place = grad_states + chunk_head * key_dim * value_dim + vt * BV + kc[:, None] * value_dim + vc[None, :]
    states_sum = states_sum.to(grad_states.dtype.element_ty)
    if EXACT_K and EXACT_V:
        tl.store(place, states_sum)
    else:
        tl.store(place, states_sum, mask=(kc < key_dim)[:, None] & (vc < width)[None, :])
    store_tile(grad_corrected + head * value_dim + vt * BV, corrected_sum * norm[:, None], chunk.to(tl.int64) * C,
               clean_count, out_stride, width, C, BV, EXACT_V)
