"""The Triton programs of a decode step: partial attention over a part of the cache, and its combination.

The rows of a tile are (token, query head) pairs that share a key head. A token reads, in this order, cached positions
below min(`cached`, what it may read), this step's clean keys, and the noisy keys of its own block. The last two come
from the step itself, so that nothing which the launch writes into the cache is read in it. How far a row reads is on
the device: a launch depends on shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flarec.layout import BLOCK_END as LAYOUT_BLOCK_END

from ..triton_forward import dot, online_softmax, tanh

BLOCK_END = tl.constexpr(LAYOUT_BLOCK_END)
FAR = tl.constexpr(2**30)
# What differs between kinds of steps is no reason to compile again: counts, and where in a buffer tables lie.
COUNTS = ("clean", "noisy", "blocks", "tiles", "capacity", "window")
TABLES = (
    "clean_document", "clean_position", "noisy_block", "noisy_position", "block_anchor", "block_readout", "cached",
)


@triton.jit
def rows_of(
    clean_document, clean_position, noisy_block, noisy_position, block_anchor, block_readout,
    row, token, clean, noisy, blocks, window,
):
    """Of tokens: first position and end of the clean tokens that they read, own block (-1: none), and the end of the
    positions of the own block that they read."""
    is_clean, is_noisy = token < clean, (token >= clean) & (token < clean + noisy)
    row = row.to(tl.int64)
    document = tl.load(clean_document + row * clean + token, mask=is_clean, other=-1)
    slot = row * noisy + token - clean
    block = tl.load(noisy_block + slot, mask=is_noisy, other=-1)
    position = tl.load(clean_position + row * clean + token, mask=is_clean, other=0)
    position += tl.load(noisy_position + slot, mask=is_noisy, other=0)
    in_block = block >= 0
    anchor = tl.load(block_anchor + row * blocks + block, mask=in_block, other=0)
    readout = tl.load(block_readout + row * blocks + block, mask=in_block, other=0)
    end = tl.where(document >= 0, position + 1, anchor)
    first = tl.maximum(position - window + 1, 0)
    upto = tl.where(readout == BLOCK_END, FAR, position + 1)
    return first.to(tl.int32), end.to(tl.int32), block.to(tl.int32), upto.to(tl.int32)


@triton.jit
def queries_of(
    q, clean_document, clean_position, noisy_block, noisy_position, block_anchor, block_readout,
    row, key_head, tile, q_row, q_head, q_slot, clean, noisy, blocks, window,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """A tile's tokens, query heads, whether the tokens exist, what `rows_of` says of them, and queries."""
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = index // GROUP, key_head * GROUP + index % GROUP
    exists = token < clean + noisy
    first, end, block, upto = rows_of(
        clean_document, clean_position, noisy_block, noisy_position, block_anchor, block_readout,
        row, token, clean, noisy, blocks, window,
    )
    columns = tl.arange(0, BLOCK_D)
    real = exists & ((end > 0) | (block >= 0))
    q_at = q + row.to(tl.int64) * q_row + head.to(tl.int64)[:, None] * q_head + token.to(tl.int64)[:, None] * q_slot
    queries = tl.load(q_at + columns[None, :], mask=real[:, None] & (columns < D)[None, :], other=0.0)
    return token, head, exists, first, end, block, upto, queries


@triton.jit
def store(
    out, part_total, part_peak, acc, total, peak, row64, token, head, exists, length, key_heads, tiles, split,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLIT: tl.constexpr,
):
    """A tile's result, or if SPLIT its share of sums that are not divided yet."""
    value_columns = tl.arange(0, BLOCK_DV)
    rows = (row64 * length + token) * (key_heads * GROUP) + head
    if not SPLIT:
        acc = tl.where(total[:, None] > 0, acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    else:
        rows += split.to(tl.int64) * (tl.num_programs(0) // tiles // key_heads) * length * (key_heads * GROUP)
        tl.store(part_total + rows, total, mask=exists)
        tl.store(part_peak + rows, peak, mask=exists)
    tl.store(
        out + rows[:, None] * DV + value_columns[None, :], acc.to(out.dtype.element_ty),
        mask=exists[:, None] & (value_columns < DV)[None, :],
    )


@triton.jit
def _take(
    q, base_k, base_v, k_slot, v_slot, at, there, visible, total, peak, acc, inner, to_base2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):
    """Take the keys and values in rows `at` of two matrices into the running sums."""
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = at.to(tl.int64)
    key_mask = there[:, None] & (columns < D)[None, :]
    key = tl.load(base_k + at[:, None] * k_slot + columns[None, :], mask=key_mask, other=0.0).to(q.dtype)
    scores = dot(q, tl.trans(key), None, PRECISION)
    if SOFTCAP:
        scores = tanh(scores * inner)
    scores = tl.where(visible, scores, float("-inf"))
    value_mask = there[:, None] & (value_columns < DV)[None, :]
    value = tl.load(base_v + at[:, None] * v_slot + value_columns[None, :], mask=value_mask, other=0.0).to(q.dtype)
    return online_softmax(scores, value, total, peak, acc, to_base2, True, PRECISION)


@triton.jit
def write(
    cache, new, cache_slot, new_slot, clean_document, clean_position, begin, stop, capacity,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Copy this step's clean rows begin .. stop into the cache at their positions; pointers are those of the row and
    key head."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(begin, stop, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        real = (slot < stop) & (tl.load(clean_document + slot, mask=slot < stop, other=-1) >= 0)
        position = tl.load(clean_position + slot, mask=real, other=0)
        mask = (real & (position < capacity))[:, None] & (columns < D)[None, :]
        found = tl.load(new + slot.to(tl.int64)[:, None] * new_slot + columns[None, :], mask=mask, other=0.0)
        place = cache + position.to(tl.int64)[:, None] * cache_slot + columns[None, :]
        tl.store(place, found.to(cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def attention_kernel(
    q, k, v, k_cache, v_cache, clean_document, clean_position, noisy_block, noisy_position, block_anchor, block_readout,
    cached, out, part_total, part_peak,
    q_row, q_head, q_slot, k_row, k_head, k_slot, v_row, v_head, v_slot,
    kc_row, kc_head, kc_slot, vc_row, vc_head, vc_slot,
    inner, to_base2, key_heads, clean, noisy, blocks, capacity, window, tiles,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid: B * Hkv * tiles, splits. out: [B, T, H, DV] if not SPLIT, else sums that are not divided yet
    [splits, B, T, H, DV] float32 beside part_total and part_peak [splits, B, T, H]."""
    program, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tile, pair = program % tiles, program // tiles
    row, key_head = pair // key_heads, pair % key_heads
    length = clean + noisy
    token, head, exists, first, end, block, upto, queries = queries_of(
        q, clean_document, clean_position, noisy_block, noisy_position, block_anchor, block_readout,
        row, key_head, tile, q_row, q_head, q_slot, clean, noisy, blocks, window, GROUP, D, BLOCK_D, BLOCK_M,
    )
    held = tl.load(cached + row).to(tl.int32)
    row64, head64 = row.to(tl.int64), key_head.to(tl.int64)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    lowest, highest = tl.min(tl.where(end > 0, first, FAR), 0), tl.max(end, 0)
    stop = tl.minimum(held, highest)
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - lowest, 0), BLOCK_N), splits) * BLOCK_N
    begin = lowest + split * share
    stop = tl.minimum(stop, begin + share)
    base_k, base_v = k_cache + row64 * kc_row + head64 * kc_head, v_cache + row64 * vc_row + head64 * vc_head
    for start in range(begin, stop, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        there = at < stop
        visible = there[None, :] & (at[None, :] >= first[:, None]) & (at[None, :] < end[:, None])
        total, peak, acc = _take(
            queries, base_k, base_v, kc_slot, vc_slot, at, there, visible, total, peak, acc, inner, to_base2,
            D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, PRECISION,
        )

    if split == splits - 1:
        base_k, base_v = k + row64 * k_row + head64 * k_head, v + row64 * v_row + head64 * v_head
        for start in range(tl.maximum(lowest - held, 0), tl.minimum(clean, highest - held), BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            there = at < tl.minimum(clean, highest - held)
            there = there & (tl.load(clean_document + row64 * clean + at, mask=there, other=-1) >= 0)
            place = held + at
            visible = there[None, :] & (place[None, :] >= first[:, None]) & (place[None, :] < end[:, None])
            total, peak, acc = _take(
                queries, base_k, base_v, k_slot, v_slot, at, there, visible, total, peak, acc, inner, to_base2,
                D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, PRECISION,
            )
        if tl.max(block, 0) >= 0:
            for start in range(0, noisy, BLOCK_N):
                at = start + tl.arange(0, BLOCK_N)
                other = tl.load(noisy_block + row64 * noisy + at, mask=at < noisy, other=-1).to(tl.int32)
                place = tl.load(noisy_position + row64 * noisy + at, mask=at < noisy, other=0).to(tl.int32)
                visible = (other[None, :] == block[:, None]) & (other >= 0)[None, :]
                visible = visible & (place[None, :] >= first[:, None]) & (place[None, :] < upto[:, None])
                total, peak, acc = _take(
                    queries, base_k, base_v, k_slot, v_slot, clean + at, other >= 0, visible, total, peak, acc, inner,
                    to_base2, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, PRECISION,
                )
        if tile == 0:
            documents, positions = clean_document + row64 * clean, clean_position + row64 * clean
            write(
                k_cache + row64 * kc_row + head64 * kc_head, base_k, kc_slot, k_slot, documents, positions, 0, clean,
                capacity, D, BLOCK_D, BLOCK_N,
            )
            write(
                v_cache + row64 * vc_row + head64 * vc_head, base_v, vc_slot, v_slot, documents, positions, 0, clean,
                capacity, DV, BLOCK_DV, BLOCK_N,
            )

    store(
        out, part_total, part_peak, acc, total, peak, row64, token, head, exists, length, key_heads, tiles, split,
        GROUP, DV, BLOCK_DV, SPLIT,
    )


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    part, part_total, part_peak, out, rows, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """The output of a (token, head) from its partial sums."""
    row = tl.program_id(0).to(tl.int64)
    split, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    at = split.to(tl.int64) * rows + row
    peak = tl.load(part_peak + at, mask=split < splits, other=float("-inf"))
    highest = tl.max(peak, 0)
    factor = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(tl.load(part_total + at, mask=split < splits, other=0.0) * factor, 0)
    mask = (split < splits)[:, None] & (columns < DV)[None, :]
    sums = tl.load(part + at[:, None] * DV + columns[None, :], mask=mask, other=0.0)
    found = tl.sum(sums * factor[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DV + columns, found.to(out.dtype.element_ty), mask=columns < DV)
