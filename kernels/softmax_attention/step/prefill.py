"""The Triton program of a step of many rows: a prompt's, of which most keys are read by whole tiles of queries.

As `kernel.attention_kernel`, with its operands and meaning, and in the same order of keys. Tiles of keys that every row
of a tile of queries reads need no mask, tiles of queries that read most start first, and each writes its own tokens
into the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_forward import dot, load_rows, online_softmax, tanh
from .kernel import COUNTS, FAR, TABLES, queries_of, store, write


@triton.jit
def _take_rows(
    q, base_k, base_v, start, stop, k_slot, v_slot, visible, there, total, peak, acc, inner, to_base2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, GAPS: tl.constexpr,
):
    """Take rows start .. start + BLOCK_N of two matrices, those before `stop` if MASKED, into the running sums.
    GAPS: of these only those that are `there` hold anything."""
    keys, columns, value_columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    key = load_rows(base_k, start, k_slot, keys, columns, stop, D, BLOCK_D, MASKED).to(q.dtype)
    if GAPS:
        key = tl.where(there[:, None], key, 0.0)
    scores = dot(q, tl.trans(key), None, PRECISION)
    if SOFTCAP:
        scores = tanh(scores * inner)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    value = load_rows(base_v, start, v_slot, keys, value_columns, stop, DV, BLOCK_DV, MASKED).to(q.dtype)
    if GAPS:
        value = tl.where(there[:, None], value, 0.0)
    return online_softmax(scores, value, total, peak, acc, to_base2, MASKED, PRECISION)


@triton.jit
def _walk(
    q, base_k, base_v, k_slot, v_slot, begin, stop, offset, first, end, all_first, all_end, total, peak, acc, inner,
    to_base2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
):
    """Rows begin .. stop of two matrices, of which row i has position offset + i. Every query reads the positions
    all_first .. all_end."""
    keys = tl.arange(0, BLOCK_N)
    count = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_N)
    lead = 0
    if WINDOW:
        lead = tl.minimum(tl.cdiv(tl.maximum(all_first - offset - begin, 0), BLOCK_N), count)
        for index in range(0, lead):
            start = begin + index * BLOCK_N
            place = offset + start + keys
            visible = (place[None, :] >= first[:, None]) & (place[None, :] < end[:, None])
            visible = visible & (start + keys < stop)[None, :]
            total, peak, acc = _take_rows(
                q, base_k, base_v, start, stop, k_slot, v_slot, visible, visible, total, peak, acc, inner, to_base2,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, SOFTCAP, PRECISION, True, False,
            )
    whole = tl.maximum(tl.maximum(tl.minimum(stop, all_end - offset) - begin, 0) // BLOCK_N, lead)
    for index in range(lead, whole):
        total, peak, acc = _take_rows(
            q, base_k, base_v, begin + index * BLOCK_N, stop, k_slot, v_slot, q, q, total, peak, acc, inner, to_base2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, SOFTCAP, PRECISION, False, False,
        )
    for index in range(whole, count):
        start = begin + index * BLOCK_N
        place = offset + start + keys
        visible = (place[None, :] >= first[:, None]) & (place[None, :] < end[:, None])
        visible = visible & (start + keys < stop)[None, :]
        total, peak, acc = _take_rows(
            q, base_k, base_v, start, stop, k_slot, v_slot, visible, visible, total, peak, acc, inner, to_base2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, SOFTCAP, PRECISION, True, False,
        )
    return total, peak, acc


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def prefill_kernel(
    q, k, v, k_cache, v_cache, clean_document, clean_position, noisy_block, noisy_position, block_anchor, block_readout,
    cached, out, part_total, part_peak,
    q_row, q_head, q_slot, k_row, k_head, k_slot, v_row, v_head, v_slot,
    kc_row, kc_head, kc_slot, vc_row, vc_head, vc_slot,
    inner, to_base2, key_heads, clean, noisy, blocks, capacity, window, tiles,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """out, part_total, part_peak: as of `attention_kernel`. Clean keys are slots 0, 1, ... at positions cached,
    cached + 1, ..., so that what is before the end of a row's keys is no padding."""
    program, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tile, pair = tiles - 1 - program % tiles, program // tiles
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
    # rows behind the last token read anything: nobody stores what they get
    all_first, all_end = tl.max(tl.where(exists, first, 0), 0), tl.min(tl.where(exists, end, FAR), 0)
    stop = tl.minimum(held, highest)
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - lowest, 0), BLOCK_N), splits) * BLOCK_N
    begin = lowest + split * share
    stop = tl.minimum(stop, begin + share)
    total, peak, acc = _walk(
        queries, k_cache + row64 * kc_row + head64 * kc_head, v_cache + row64 * vc_row + head64 * vc_head,
        kc_slot, vc_slot, begin, stop, 0, first, end, all_first, all_end, total, peak, acc, inner, to_base2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, SOFTCAP, PRECISION, WINDOW,
    )

    if split == splits - 1:
        base_k, base_v = k + row64 * k_row + head64 * k_head, v + row64 * v_row + head64 * v_head
        total, peak, acc = _walk(
            queries, base_k, base_v, k_slot, v_slot, tl.maximum(lowest - held, 0), tl.minimum(clean, highest - held),
            held, first, end, all_first, all_end, total, peak, acc, inner, to_base2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, SOFTCAP, PRECISION, WINDOW,
        )
        if tl.max(block, 0) >= 0:
            for start in range(0, noisy, BLOCK_N):
                at = start + tl.arange(0, BLOCK_N)
                other = tl.load(noisy_block + row64 * noisy + at, mask=at < noisy, other=-1).to(tl.int32)
                place = tl.load(noisy_position + row64 * noisy + at, mask=at < noisy, other=0).to(tl.int32)
                visible = (other[None, :] == block[:, None]) & (other >= 0)[None, :]
                visible = visible & (place[None, :] >= first[:, None]) & (place[None, :] < upto[:, None])
                total, peak, acc = _take_rows(
                    queries, base_k, base_v, clean + start, length, k_slot, v_slot, visible, other >= 0, total, peak,
                    acc, inner, to_base2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, SOFTCAP, PRECISION, True, True,
                )
        documents, positions = clean_document + row64 * clean, clean_position + row64 * clean
        begin, stop = tile * BLOCK_M // GROUP, tl.minimum(tl.cdiv((tile + 1) * BLOCK_M, GROUP), clean)
        write(
            k_cache + row64 * kc_row + head64 * kc_head, base_k, kc_slot, k_slot, documents, positions, begin, stop,
            capacity, D, BLOCK_D, BLOCK_N,
        )
        write(
            v_cache + row64 * vc_row + head64 * vc_head, base_v, vc_slot, v_slot, documents, positions, begin, stop,
            capacity, DV, BLOCK_DV, BLOCK_N,
        )

    store(
        out, part_total, part_peak, acc, total, peak, row64, token, head, exists, length, key_heads, tiles, split,
        GROUP, DV, BLOCK_DV, SPLIT,
    )
