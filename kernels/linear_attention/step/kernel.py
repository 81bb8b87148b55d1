"""The Triton program of a decode step: one tile of rows, one value head, one range of value columns, dense products.

Clean and noisy rows are one system (docs/kernels.md, "Decoding with the same equations"). Row l has ancestors: the
clean rows before it or its block, and the rows of its block before it. With `M` the 0/1 matrix "j is l or an ancestor
of l", `Mq` that of the rows which l's query reads, and S0 the committed state,

    A_lj = exp(sum_i M_li (1 - M_ji) g_i) k_l . k_j  for ancestors j of l
    P_lj = exp(sum_i Mq_li (1 - M_ji) g_i) q_l . k_j  for rows j that l's query reads
    (I + diag(b) A) D = diag(b) (V - diag(exp(M g)) K S0)
    O = scale (diag(exp(Mq g)) Q S0 + P D)

The exponents are sums of the decays between two rows, never differences of longer sums: nothing overflows or cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import L2_EPSILON

EPSILON = tl.constexpr(L2_EPSILON)
PENDING_TILE = tl.constexpr(16)
# Triton's interpreter multiplies bfloat16 matrices as integers: there 16-bit factors are widened to float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def _sums(a, b):
    """a @ b where one factor is a 0/1 mask: exact up to the order of the sum.

    Not cut into 16-bit pieces for the tensor cores: Triton 3.6 then read shared memory out of bounds at 32 and 64 rows.
    """
    return tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)


@triton.jit
def _state_product(a, state, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ state; EXACT: `a` has at most 11 significant bits, and two products on tensor cores are as good as three."""
    if EXACT and PRECISION == "tf32x3":
        high = ((state.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        return tl.dot(a, high, tl.dot(a, state - high, input_precision="tf32"), input_precision="tf32")
    return _product(a, state, PRECISION)


@triton.jit
def _unit_lower_inverse(lower, ancestor, T: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1, lower [T, T] nonzero only where ancestor[l, j] (j is an ancestor of l).

    Rows are grouped by level, their number of ancestors. Groups of `width` levels are inverted; two neighbours merge by
    [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]. Unlike repeated squaring, that forms no powers of `lower`.
    """
    row, col = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    level = tl.sum(ancestor.to(tl.int32), axis=1)
    level_of_row, level_of_col = level[:, None], level[None, :]
    depth = tl.max(level, axis=0)
    parent = (level_of_row // 2 == level_of_col // 2) & (level_of_row != level_of_col)
    inverse = tl.where(row == col, 1.0, tl.where(parent, -lower, 0.0)).to(lower.dtype)
    width = 2
    while width <= depth:
        joined = level_of_row // (2 * width) == level_of_col // (2 * width)
        apart = level_of_row // width != level_of_col // width
        between = tl.where(joined & apart, lower, 0.0)
        inverse -= _product(_product(inverse, between, PRECISION), inverse, PRECISION)
        width *= 2
    return inverse


@triton.jit
def _decay_behind(pending_g, first, rows, accepted, step, k_cols, held, GATE: tl.constexpr, PRECISION: tl.constexpr,
                  CT: tl.constexpr):
    """Log decay of a tile of pending rows [1 or k_cols], and of its rows behind each row [tile, 1 or k_cols].

    first = its first row; pending_g + slot * step is a row's log decay, that of channel 0 if GATE is 2. Rows that are
    not accepted do not decay.
    """
    row = tl.arange(0, PENDING_TILE)[:, None]
    col = tl.arange(0, PENDING_TILE)[None, :]
    if GATE == 2:
        slot = first + row
        own = tl.load(pending_g + slot * step + k_cols[None, :], mask=(slot < rows) & held[None, :], other=0).to(CT)
        own = tl.where(slot < accepted, own, 0)
        return tl.sum(own, axis=0), _sums((col > row).to(CT), own)
    else:
        slot = first + col
        own = tl.load(pending_g + slot * step, mask=slot < rows, other=0).to(CT)
        own = tl.where(slot < accepted, own, 0)
        return tl.sum(own, axis=1), tl.sum(tl.where(col > row, own, 0), axis=1)[:, None]


@triton.jit
def _pending_update(
    pending_k, pending_d, pending_g, rows, accepted, k_cols, v_cols, held, seen,
    H: tl.constexpr, KEY_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr, CT: tl.constexpr,
):
    """What any number of accepted pending rows add to the state, and the log decay [1 or k_cols] of what it held.

    The pointers are those of the request's row 0 and this head; masks `held` of `k_cols` and `seen` of `v_cols`. Tiles
    are walked from the last accepted row to the first, so that a row's decay is the sum of those behind it.
    """
    added = tl.zeros([k_cols.shape[0], v_cols.shape[0]], dtype=CT)
    decay = tl.zeros([k_cols.shape[0] if GATE == 2 else 1], dtype=CT)
    tiles = tl.cdiv(accepted, PENDING_TILE)
    for i in tl.range(0, tiles, num_stages=1):
        first = (tiles - 1 - i) * PENDING_TILE
        slot = first + tl.arange(0, PENDING_TILE)[:, None]
        used = slot < accepted
        keys = tl.load(pending_k + slot * (KEY_HEADS * K) + k_cols[None, :], mask=used & held[None, :], other=0).to(CT)
        values = tl.load(pending_d + slot * (H * V) + v_cols[None, :], mask=used & seen[None, :], other=0).to(CT)
        if GATE != 0:
            step = H * K if GATE == 2 else H
            own, behind = _decay_behind(pending_g, first, rows, accepted, step, k_cols, held, GATE, PRECISION, CT)
            keys *= tl.exp(behind + decay[None, :])
            decay += own
        added += _product(tl.trans(keys), values, PRECISION)
    return added, decay


@triton.jit
def _channel_weights(
    queries, keys, gates, key_rows, stride_kt, gate_mask, query_mask, table, slots, shift, used, clean, k_cols,
    DELTA: tl.constexpr, K: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, CT: tl.constexpr,
):
    """The sums over `k_cols` of k_l . k_j and q_l . k_j [T, T] under a decay per key channel, column j by column.

    key_rows, table: the request's slot 0; the tile has `used` rows.
    """
    col = tl.arange(0, T)
    key_key = tl.zeros([T, T], dtype=CT)
    query_key = tl.zeros([T, T], dtype=CT)
    for j in tl.range(0, used, num_stages=1):
        moved = tl.where(j < clean, 0, shift)
        anchor = tl.load(table + j + moved)
        begin = tl.load(table + slots + j + moved) - moved
        own = (col < anchor) | ((col >= begin) & (col <= j))  # row j of gate_mask
        mask = k_cols < tl.where(anchor >= 0, K, 0)
        key = tl.load(key_rows + (j + moved) * stride_kt + k_cols, mask=mask, other=0).to(CT)
        here = col[None, :] == j
        between = _sums(tl.where(own[None, :], 0.0, query_mask), gates)
        column = tl.sum(queries * tl.exp(between) * key[None, :], axis=1)
        query_key = tl.where(here, column[:, None], query_key)
        if DELTA:
            between = _sums(tl.where(own[None, :], 0.0, gate_mask), gates)
            column = tl.sum(keys * tl.exp(between) * key[None, :], axis=1)
            key_key = tl.where(here, column[:, None], key_key)
    return key_key, query_key


@triton.jit(do_not_specialize=["slots", "clean", "tiles", "pending_rows", "stride_bb"])
def step_kernel(
    q, k, v, g, beta, state, pending_k, pending_d, pending_g, accepted, row_table, tile_start,
    out, next_state, next_k, next_d, next_g,
    slots, clean, tiles, pending_rows,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, stride_bb, stride_bt, stride_bh,
    scale: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    T: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ONE_TILE: tl.constexpr, FEW_PENDING: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, L2NORM: tl.constexpr,
    NATIVE: tl.constexpr, PRECISION: tl.constexpr, CT: tl.constexpr,
):
    """Grid: B * H * ceil(V / BV) * tiles. Every program commits its part of the state; those of tile 0 alone store it.

    T: rows of a tile; BG, BK: key channels per round of the products between rows, and with the state; ONE_TILE: there
    are no others; FEW_PENDING: the pending rows fit into one tile of theirs; GATE: 0 none, 1 per head, 2 per key
    channel; NATIVE: q and k have the same 16-bit type; CT: type of the arithmetic.

    Offsets inside a request are 32-bit (the launcher checks), the request's own offset is 64-bit.
    """
    COLUMNS: tl.constexpr = (V + BV - 1) // BV
    KEY_HEADS: tl.constexpr = H // GROUP
    program = tl.program_id(0)
    tile = 0
    shift = 0
    stop = slots - clean
    if not ONE_TILE:
        tile = program % tiles
        program //= tiles
    column = program % COLUMNS
    head = (program // COLUMNS % H).to(tl.int64)
    row = (program // (COLUMNS * H)).to(tl.int64)
    key_head = head // GROUP
    if not ONE_TILE:
        tile_start += row * (tiles + 1) + tile
        shift = tl.load(tile_start)
        stop = tl.load(tile_start + 1)
        if (tile > 0) & (shift == stop):
            return
    place = tl.arange(0, T)
    is_clean = place < clean
    moved = tl.where(is_clean, 0, shift)
    slot = place + moved
    inside = is_clean | (slot < clean + stop)

    q += row * stride_qb + key_head * stride_qh
    k += row * stride_kb + key_head * stride_kh
    v += row * stride_vb + head * stride_vh
    beta += row * stride_bb + head * stride_bh
    row_table += row * 3 * slots
    state += (row * H + head) * (K * V)
    next_state += (row * H + head) * (K * V)
    pending_k += (row * pending_rows * KEY_HEADS + key_head) * K
    pending_d += (row * pending_rows * H + head) * V
    if GATE != 0:
        g += row * stride_gb + head * stride_gh
    if GATE == 1:
        pending_g += row * pending_rows * H + head
    if GATE == 2:
        pending_g += (row * pending_rows * H + head) * K

    # All first loads start together. Hence they do not wait for the table that tells padding, which is cleared later.
    v_cols = column * BV + tl.arange(0, BV)
    seen = v_cols < V
    g_cols = tl.arange(0, BG)
    k_cols = tl.arange(0, BK)
    at_state = k_cols[:, None] * V + v_cols[None, :]
    started = inside[:, None] & (g_cols < K)[None, :]
    anchor = tl.load(row_table + slot, mask=inside, other=-1)
    begin = tl.load(row_table + slots + slot, mask=inside, other=slot) - moved
    last = tl.load(row_table + 2 * slots + slot, mask=inside, other=slot) - moved
    raw_k = tl.load(k + slot[:, None] * stride_kt + g_cols[None, :], mask=started, other=0)
    raw_q = tl.load(q + slot[:, None] * stride_qt + g_cols[None, :], mask=started, other=0)
    weight = tl.load(beta + slot * stride_bt, mask=inside, other=0)
    if GATE == 1:
        gate = tl.load(g + slot * stride_gt, mask=inside, other=0)
    accepted_rows = tl.load(accepted + row).to(tl.int32)
    next_rows = tl.load(state + at_state, mask=(k_cols < K)[:, None] & seen[None, :], other=0)
    values = tl.load(v + slot[:, None] * stride_vt + v_cols[None, :], mask=inside[:, None] & seen[None, :], other=0)
    if FEW_PENDING:
        pending = tl.arange(0, PENDING_TILE)[:, None]
        at_pending = pending * (KEY_HEADS * K) + k_cols[None, :]
        next_keys = tl.load(
            pending_k + at_pending, mask=(pending < pending_rows) & (k_cols < K)[None, :], other=0
        )
        corrections = tl.load(
            pending_d + pending * (H * V) + v_cols[None, :], mask=(pending < pending_rows) & seen[None, :], other=0
        )
        corrections = tl.where(pending < accepted_rows, corrections.to(CT), 0)
        if GATE == 0:
            decay = tl.zeros([1], dtype=CT)
        if GATE == 1:
            decay, behind = _decay_behind(
                pending_g, 0, pending_rows, accepted_rows, H, k_cols, seen, GATE, PRECISION, CT
            )
            corrections *= tl.exp(behind)

    # whom the rows of this tile read
    real = anchor >= 0
    earlier = place[None, :] < anchor[:, None]
    in_block = place[None, :] >= begin[:, None]
    reads_key = earlier | (in_block & (place[None, :] <= place[:, None]))
    reads_query = earlier | (in_block & (place[None, :] <= last[:, None]))
    ancestor = reads_key & (place[None, :] != place[:, None])
    weight = tl.where(real, weight.to(CT), 0)
    values = tl.where(real[:, None], values.to(CT), 0)

    # everything that does not need the state, while the state is on its way
    key_key = tl.zeros([T, T], dtype=CT)
    query_key = tl.zeros([T, T], dtype=CT)
    key_square = tl.zeros([T], dtype=CT)
    query_square = tl.zeros([T], dtype=CT)
    gate_mask = reads_key.to(CT)
    query_mask = reads_query.to(CT)
    for c in tl.range(0, K, BG, num_stages=1):
        cols = c + g_cols
        raw_k = tl.where(real[:, None], raw_k, 0.0)
        raw_q = tl.where(real[:, None], raw_q, 0.0)
        keys, queries = raw_k.to(CT), raw_q.to(CT)
        mask = real[:, None] & (cols < K)[None, :]
        if L2NORM:
            key_square += tl.sum(keys * keys, axis=1)
            query_square += tl.sum(queries * queries, axis=1)
        if GATE == 2:
            gates = tl.load(g + slot[:, None] * stride_gt + cols[None, :], mask=mask, other=0).to(CT)
            added_k, added_q = _channel_weights(
                queries, keys, gates, k, stride_kt, gate_mask, query_mask, row_table, slots, shift,
                clean + stop - shift, clean, cols, DELTA, K, T, PRECISION, CT,
            )
            key_key += added_k
            query_key += added_q
        elif NATIVE and not INTERPRETED:  # products of 16-bit numbers are exact
            query_key = tl.dot(raw_q, tl.trans(raw_k), query_key)
            if DELTA:
                key_key = tl.dot(raw_k, tl.trans(raw_k), key_key)
        else:
            query_key += _product(queries, tl.trans(keys), PRECISION)
            if DELTA:
                key_key += _product(keys, tl.trans(keys), PRECISION)
        if K > BG:
            mask = inside[:, None] & (cols + BG < K)[None, :]
            raw_k = tl.load(k + slot[:, None] * stride_kt + cols[None, :] + BG, mask=mask, other=0)
            raw_q = tl.load(q + slot[:, None] * stride_qt + cols[None, :] + BG, mask=mask, other=0)
    key_factor = tl.full([T], 1.0, dtype=CT)  # factors of the products with the state
    query_factor = key_factor
    if L2NORM:
        key_norm = 1.0 / tl.sqrt(key_square + EPSILON)
        key_factor = key_norm
        query_factor = 1.0 / tl.sqrt(query_square + EPSILON)
        query_key *= query_factor[:, None] * key_factor[None, :]
        key_key *= key_factor[:, None] * key_factor[None, :]

    if GATE == 1:
        gate = tl.where(real, gate.to(CT), 0)
        unread = tl.trans(1.0 - gate_mask)
        by_query = query_mask * gate[None, :]
        query_factor *= tl.exp(tl.sum(by_query, axis=1))
        query_key *= tl.exp(_sums(by_query, unread))
        if DELTA:
            by_key = gate_mask * gate[None, :]
            key_factor *= tl.exp(tl.sum(by_key, axis=1))
            key_key *= tl.exp(_sums(by_key, unread))
    query_key = tl.where(reads_query, query_key, 0)
    if DELTA:
        key_key = tl.where(ancestor, key_key * weight[:, None], 0)
        inverse = _unit_lower_inverse(key_key, ancestor, T, PRECISION)

    # one pass over the state: commit, store, and its products with keys and queries
    from_state = tl.zeros([T, BV], dtype=CT)
    read_state = tl.zeros([T, BV], dtype=CT)
    for c in tl.range(0, K, BK, num_stages=1):
        cols = c + k_cols
        held = cols < K
        committed = next_rows.to(CT)
        if K > BK:
            more = cols + BK < K
            next_rows = tl.load(
                state + (c + BK) * V + at_state, mask=more[:, None] & seen[None, :], other=0
            )
        if FEW_PENDING:
            keys = tl.where(pending < accepted_rows, next_keys.to(CT), 0)
            if K > BK:
                next_keys = tl.load(
                    pending_k + c + BK + at_pending, mask=(pending < pending_rows) & more[None, :], other=0
                )
            if GATE == 2:
                decay, behind = _decay_behind(
                    pending_g, 0, pending_rows, accepted_rows, H * K, cols, held, GATE, PRECISION, CT
                )
                keys *= tl.exp(behind)
            added = _product(tl.trans(keys), corrections, PRECISION)
        else:
            added, decay = _pending_update(
                pending_k, pending_d, pending_g, pending_rows, accepted_rows, cols, v_cols, held, seen,
                H, KEY_HEADS, K, V, GATE, PRECISION, CT,
            )
        committed = committed * tl.exp(decay)[:, None] + added
        if tile == 0:
            tl.store(next_state + c * V + at_state, committed, mask=held[:, None] & seen[None, :])
        mask = real[:, None] & held[None, :]
        queries = tl.load(q + slot[:, None] * stride_qt + cols[None, :], mask=mask, other=0).to(CT)
        if GATE == 2:
            gates = tl.load(g + slot[:, None] * stride_gt + cols[None, :], mask=mask, other=0).to(CT)
            queries *= tl.exp(_sums(query_mask, gates))
        read_state += _state_product(queries, committed, NATIVE and GATE != 2, PRECISION)
        if DELTA:
            keys = tl.load(k + slot[:, None] * stride_kt + cols[None, :], mask=mask, other=0).to(CT)
            if GATE == 2:
                keys *= tl.exp(_sums(gate_mask, gates))
            from_state += _state_product(keys, committed, NATIVE and GATE != 2, PRECISION)

    corrected = values
    if DELTA:
        corrected -= from_state * key_factor[:, None]
    corrected *= weight[:, None]
    if DELTA:
        corrected = _product(inverse, corrected, PRECISION)
    result = read_state * query_factor[:, None] + _product(query_key, corrected, PRECISION)
    result = tl.where(real[:, None], result * scale, 0).to(out.dtype.element_ty)
    at_out = slot[:, None] * (H * V) + v_cols[None, :]
    stored = inside & (place >= tl.where(tile == 0, 0, clean))
    tl.store(out + (row * slots * H + head) * V + at_out, result, mask=stored[:, None] & seen[None, :])

    # the next pending rows
    if tile > 0:
        return
    kept = row * clean
    tl.store(next_d + (kept * H + head) * V + at_out, corrected, mask=is_clean[:, None] & seen[None, :])
    if column > 0:
        return
    if GATE == 1:
        tl.store(next_g + kept * H + head + slot * H, gate, mask=is_clean)
    next_k += (kept * KEY_HEADS + key_head) * K
    for c in tl.range(0, K, BK, num_stages=1):
        cols = c + k_cols
        mask = is_clean[:, None] & (cols < K)[None, :]
        full = real[:, None] & mask
        if GATE == 2:
            gates = tl.load(g + slot[:, None] * stride_gt + cols[None, :], mask=full, other=0).to(CT)
            to = next_g + (kept * H + head) * K + slot[:, None] * (H * K) + cols[None, :]
            tl.store(to, gates, mask=mask)
        if head % GROUP == 0:
            keys = tl.load(k + slot[:, None] * stride_kt + cols[None, :], mask=full, other=0).to(CT)
            if L2NORM:
                keys *= key_norm[:, None]
            tl.store(next_k + slot[:, None] * (KEY_HEADS * K) + cols[None, :], keys, mask=mask)
