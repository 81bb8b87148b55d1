"""Key-channel gates, backward on the side of the keys: gradients of pair weights and decayed vectors to q, k and g.

The gradient of a log decay is value * gradient, rows growing and columns shrinking. Both ends of a pair use the same
rounded factors of the pair's dense product, so that what cancels between them cancels exactly, at strong decay too.

For chunks and tiles whose weights are direct products (`weights`); `finish_digits` has the rest.
A slice of channels is a program of its own, next to the others that read the same weights: in a loop over slices the
compiler keeps an address for every load, and spills. Gradients are of the unit rows; `norm` goes on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import load_tile, store_tile
from ..places import rows_of
from .pairs import exact_sums, key_head_rows, load_picked, load_unit, not_above, read_by


@triton.jit
def channel_tile_finish_kernel(
    q,
    k,
    cumulative,
    decayed_q,
    decayed_k,
    shrunk_k,
    block_weights,
    grad_clean_weights,
    grad_q,
    grad_k,
    grad_g,
    grad_keys,
    grad_gates,
    chunk_direct,
    tile_direct,
    chunk_token,
    chunk_length,
    tile_chunk,
    tile_first,
    tile_count,
    tile_anchor,
    tile_start,
    tile_stop,
    key_dim: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    NS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    DELTA: tl.constexpr,
    L2NORM: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_S: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One program per (tile, head, slice of channels): grad_q, grad_k (in: of decayed_q, decayed_k) and grad_g
    [B,T,H,K] of noisy rows, and the tile's share of the gradients of its chunk, grad_keys (of shrunk_k) and grad_gates
    (of gam) [M*C,H,K], which the clean kernel adds up. block_weights and grad_clean_weights hold gradients of (N, M)
    and (P, Pq)."""
    pid = tl.program_id(0)
    s, pid = pid % NS, pid // NS
    head, tile = pid % H, pid // H
    chunk = tl.load(tile_chunk + tile).to(tl.int64)
    tile_head = tile.to(tl.int64) * H + head
    if tl.load(chunk_direct + chunk * H + head) * tl.load(tile_direct + tile_head) == 0:
        return
    row, column = tl.arange(0, R), tl.arange(0, C)
    clean_first, clean_count = rows_of(chunk, chunk_token, chunk_length)
    meta = tile.to(tl.int64) * R + row
    first, count = rows_of(tile, tile_first, tile_count)
    stride = H * key_dim
    clean_place = grad_clean_weights + tile_head * 2 * R * C + row[:, None] * C + column[None, :]
    block_place = block_weights + tile_head * 2 * R * R + row[:, None] * R + row[None, :]
    k_base, q_base, k_norm, q_norm = key_head_rows(
        q, k, head // GROUP, first, count, q_token, q_head, k_token, k_head, key_dim, R, BK, EXACT_K, L2NORM
    )

    width = key_dim - s * BS
    place = head * key_dim + s * BS
    logs = cumulative + place
    anchor = tl.load(tile_anchor + meta)

    # what the rows read from the clean stream
    y = load_tile(shrunk_k + place, chunk * C, clean_count, stride, width, C, BS, EXACT_S)
    dtype = y.dtype
    x = load_tile(decayed_q + place, first, count, stride, width, R, BS, EXACT_S)
    weight = tl.load(clean_place + R * C)
    queries_grad = load_tile(grad_q + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)
    queries_grad += tl.dot(weight, y, input_precision=PRECISION)
    queries_sum = queries_grad * x.to(tl.float32)
    columns_grad = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
    keys_grad = tl.zeros([R, BS], dtype=tl.float32)
    keys_sum = tl.zeros([R, BS], dtype=tl.float32)
    if DELTA:
        x = load_tile(decayed_k + place, first, count, stride, width, R, BS, EXACT_S)
        weight = tl.load(clean_place)
        keys_grad = load_tile(grad_k + place, first, count, stride, width, R, BS, EXACT_S).to(tl.float32)
        keys_grad += tl.dot(weight, y, input_precision=PRECISION)
        keys_sum = keys_grad * x.to(tl.float32)
        columns_grad += tl.dot(tl.trans(weight), x, input_precision=PRECISION)
    share_first = tile.to(tl.int64) * C
    store_tile(grad_keys + place, columns_grad, share_first, clean_count, stride, width, C, BS, EXACT_S)
    gate = exact_sums(column[:, None] == anchor[None, :] - 1, queries_sum + keys_sum, PIECES)
    gate -= columns_grad * y.to(tl.float32)
    store_tile(grad_gates + place, gate, share_first, clean_count, stride, width, C, BS, EXACT_S)

    # what they read inside their blocks; gradients are of exp(e) q~ and exp(t) k~ from here on
    tl.debug_barrier()
    start, stop = tl.load(tile_start + meta), tl.load(tile_stop + meta)
    clean_logs = logs + clean_first * stride
    at_anchor = tl.exp2(load_picked(clean_logs, anchor - 1, anchor > 0, stride, width, BS, EXACT_S))
    queries_grad *= at_anchor
    keys_grad *= at_anchor
    t = load_tile(logs, first, count, stride, width, R, BS, EXACT_S)
    keys = load_unit(k_base + s * BS, first, count, k_norm, k_token, width, R, BS, EXACT_S, L2NORM)
    shrinking = not_above(-t, SPAN)
    y = (keys.to(tl.float32) * shrinking).to(dtype)
    own_logs = logs + first * stride
    growing = tl.exp2(load_picked(own_logs, stop - 1, row < count, stride, width, BS, EXACT_S))
    queries = load_unit(q_base + s * BS, first, count, q_norm, q_token, width, R, BS, EXACT_S, L2NORM)
    x = (queries.to(tl.float32) * growing).to(dtype)
    weight = tl.load(block_place + R * R)
    own = tl.dot(weight, y, input_precision=PRECISION)
    queries_sum += own * x.to(tl.float32)
    queries_grad = (queries_grad + own) * growing
    columns_grad = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
    if DELTA:
        growing = tl.exp2(t)
        x = (keys.to(tl.float32) * growing).to(dtype)
        weight = tl.load(block_place)
        own = tl.dot(weight, y, input_precision=PRECISION)
        keys_sum += own * x.to(tl.float32)
        keys_grad = (keys_grad + own) * growing
        columns_grad += tl.dot(tl.trans(weight), x, input_precision=PRECISION)
    keys_grad += columns_grad * shrinking
    keys_sum -= columns_grad * y.to(tl.float32)
    gate = exact_sums(read_by(start, stop, R), queries_sum, PIECES)
    gate += exact_sums(read_by(start, row + 1, R), keys_sum, PIECES)
    tl.debug_barrier()  # all threads have read the rows that are now overwritten
    store_tile(grad_q + place, queries_grad, first, count, stride, width, R, BS, EXACT_S)
    store_tile(grad_k + place, keys_grad, first, count, stride, width, R, BS, EXACT_S)
    store_tile(grad_g + place, gate, first, count, stride, width, R, BS, EXACT_S)


@triton.jit
def channel_clean_finish_kernel(
    cumulative,
    decayed_q,
    decayed_k,
    tail_k,
    shrunk_k,
    total,
    grad_tail,
    grad_total,
    weights,
    query_weights,
    grad_keys,
    grad_gates,
    grad_q,
    grad_k,
    grad_g,
    chunk_direct,
    tile_direct,
    chunk_token,
    chunk_length,
    chunk_tile,
    key_dim: tl.constexpr,
    H: tl.constexpr,
    BS: tl.constexpr,
    NS: tl.constexpr,
    C: tl.constexpr,
    DELTA: tl.constexpr,
    EXACT_S: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One program per (chunk, head, slice of channels): grad_q, grad_k (in: of decayed_q, decayed_k) and grad_g
    [B,T,H,K] of clean rows. weights and query_weights hold the gradients of A and A_q."""
    pid = tl.program_id(0)
    s, pid = pid % NS, pid // NS
    head, chunk = pid % H, pid // H
    chunk_head = chunk.to(tl.int64) * H + head
    if tl.load(chunk_direct + chunk_head) == 0:
        return
    row = tl.arange(0, C)
    first, count = rows_of(chunk, chunk_token, chunk_length)
    begin, end = tl.load(chunk_tile + chunk), tl.load(chunk_tile + chunk + 1)
    stride = H * key_dim
    chunk_row = chunk.to(tl.int64) * C
    corner = chunk_head * C * C + row[:, None] * C + row[None, :]
    width = key_dim - s * BS
    place = head * key_dim + s * BS
    channel = s * BS + tl.arange(0, BS)

    # rows before, and the entry state
    y = load_tile(shrunk_k + place, chunk_row, count, stride, width, C, BS, EXACT_S)
    x = load_tile(decayed_q + place, first, count, stride, width, C, BS, EXACT_S)
    weight = tl.load(query_weights + corner)
    queries_grad = load_tile(grad_q + place, first, count, stride, width, C, BS, EXACT_S).to(tl.float32)
    queries_grad += tl.dot(weight, y, input_precision=PRECISION)
    gate = queries_grad * x.to(tl.float32)
    columns_grad = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
    keys_grad = tl.zeros([C, BS], dtype=tl.float32)
    if DELTA:
        x = load_tile(decayed_k + place, first, count, stride, width, C, BS, EXACT_S)
        weight = tl.load(weights + corner)
        keys_grad = load_tile(grad_k + place, first, count, stride, width, C, BS, EXACT_S).to(tl.float32)
        keys_grad += tl.dot(weight, y, input_precision=PRECISION)
        gate += keys_grad * x.to(tl.float32)
        columns_grad += tl.dot(tl.trans(weight), x, input_precision=PRECISION)
    gate -= columns_grad * y.to(tl.float32)

    # the state at the end
    gam = load_tile(cumulative + place, first, count, stride, width, C, BS, EXACT_S)
    end_place = cumulative + place + (first + count - 1) * stride + tl.arange(0, BS)
    end_gam = tl.load(end_place, mask=channel < tl.where(count > 0, key_dim, 0), other=0.0)
    grad = load_tile(grad_tail + place, chunk_row, count, stride, width, C, BS, EXACT_S).to(tl.float32)
    ends = grad * load_tile(tail_k + place, chunk_row, count, stride, width, C, BS, EXACT_S).to(tl.float32)
    gate -= ends
    at_end = tl.sum(ends, 0)
    passed = tl.load(total + chunk_head * key_dim + channel, mask=channel < key_dim, other=0.0)
    at_end += passed * tl.load(grad_total + chunk_head * key_dim + channel, mask=channel < key_dim, other=0.0)

    # what the tiles send; those of the digits' kernel send gradients of k, not of exp(-gam) k
    growing, shrinking = tl.exp2(gam), not_above(-gam, SPAN)
    keys_grad = keys_grad * growing + grad * tl.exp2(tl.minimum(end_gam[None, :] - gam, 0.0))
    for other in range(0, end - begin):
        tile = begin.to(tl.int64) + other
        share = load_tile(grad_keys + place, tile * C, count, stride, width, C, BS, EXACT_S).to(tl.float32)
        if tl.load(tile_direct + tile * H + head) == 0:
            keys_grad += share
        else:
            columns_grad += share
        gate += load_tile(grad_gates + place, tile * C, count, stride, width, C, BS, EXACT_S)
    keys_grad += columns_grad * shrinking
    gate = exact_sums(row[:, None] <= row[None, :], gate, PIECES) + at_end[None, :]
    queries_grad *= growing
    tl.debug_barrier()  # all threads have read what is now overwritten
    store_tile(grad_q + place, queries_grad, first, count, stride, width, C, BS, EXACT_S)
    store_tile(grad_k + place, keys_grad, first, count, stride, width, C, BS, EXACT_S)
    store_tile(grad_g + place, gate, first, count, stride, width, C, BS, EXACT_S)
