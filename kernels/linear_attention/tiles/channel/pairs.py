"""Products of vectors that decay per key channel: W[l, j] = sum_c x_lc y_jc exp(a_lc - b_jc), in dense products only.

Row l reads a prefix of its columns (docs/kernels.md, "Exponents"). With any reference r, exp(a - b_j) = exp(a - r)
exp(r - b_j): one dense product, if no factor overflows. Where the log decays of a piece of rows span at most SPAN (in
bits, in all channels of the slice), r is a row in the piece's middle and one product takes all pairs of the piece. The
rest goes by the binary digits of the prefix's length, which cut it into aligned pieces of 2^p columns: with r the last
column of a piece both factors are <= 1, whatever the decay, and every digit costs one product. `pair_decay.py` is the
CPU form of the digits.

`cumulative` [B, T, H, K] float32 holds log2 decays: of clean rows since the chunk's start (gam), of noisy rows since
the block's start (t), inclusive.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import load_tile, reciprocal_norm

# Triton's interpreter multiplies bfloat16 matrices as integers: there one float32 piece takes the place of them all.
PIECE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def exact_sums(member, x, PIECES: tl.constexpr):
    """[n, K] fp32 sums over the rows m of x [m, K] fp32 with member[n, m]: x as PIECES bfloat16 (3 are exact)."""
    member = tl.where(member, 1.0, 0.0).to(PIECE)
    high = x.to(PIECE)
    rest = x - high.to(tl.float32)
    middle = rest.to(PIECE)
    if PIECES == 2:
        # side by side in one product: pieces of a number are neighbours, in the same thread
        sums = tl.dot(member, tl.reshape(tl.join(high, middle), [x.shape[0], 2 * x.shape[1]]))
        return tl.sum(tl.reshape(sums, [member.shape[0], x.shape[1], 2]), 2)
    low = (rest - middle.to(tl.float32)).to(PIECE)
    total = tl.dot(member, middle)
    total += tl.dot(member, low)
    return total + tl.dot(member, high)


@triton.jit
def not_above_one(log):
    """exp2 of a log decay that is <= 0 up to rounding, or that belongs to a column which nothing reads."""
    return tl.exp2(tl.minimum(log, 0.0))


@triton.jit
def whole_norm(
    x, first, count, stride, key_dim, ROWS: tl.constexpr, BK: tl.constexpr, EXACT_K: tl.constexpr, L2NORM: tl.constexpr
):
    """[ROWS] reciprocal norms of whole rows; 1 without l2norm."""
    if L2NORM:
        return reciprocal_norm(load_tile(x, first, count, stride, key_dim, ROWS, BK, EXACT_K))
    return tl.full([ROWS], 1.0, dtype=tl.float32)


@triton.jit
def key_head_rows(
    q,
    k,
    key_head,
    first,
    count,
    q_token,
    q_head,
    k_token,
    k_head,
    key_dim,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    EXACT_K: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """Where keys and queries of a head begin, and the reciprocal norms [ROWS] of those of a chunk or a tile."""
    k_base, q_base = k + key_head * k_head, q + key_head * q_head
    k_norm = whole_norm(k_base, first, count, k_token, key_dim, ROWS, BK, EXACT_K, L2NORM)
    q_norm = whole_norm(q_base, first, count, q_token, key_dim, ROWS, BK, EXACT_K, L2NORM)
    return k_base, q_base, k_norm, q_norm


@triton.jit
def load_unit(
    x,
    first,
    count,
    norm,
    stride,
    width,
    ROWS: tl.constexpr,
    BS: tl.constexpr,
    EXACT: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """A slice of channels of the rows as the state sees them, in their own dtype."""
    raw = load_tile(x, first, count, stride, width, ROWS, BS, EXACT)
    if L2NORM:
        raw = (raw.to(tl.float32) * norm[:, None]).to(raw.dtype)
    return raw


@triton.jit
def load_picked(base, row, wanted, stride, width, BS: tl.constexpr, EXACT: tl.constexpr):
    """[n, BS] rows `row` [n] of a matrix where wanted, else 0."""
    column = tl.arange(0, BS)
    mask = wanted[:, None]
    if not EXACT:
        mask = mask & (column < width)[None, :]
    return tl.load(base + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def pair_gradients(weight, x, y, by_row, by_column, PRECISION: tl.constexpr):
    """Of W = x y^T with x = u by_row, y = v by_column, and the masked gradient `weight` of W: gradients of u and v, and
    of the logs of both factors (those of the columns' with the sign of a product: a caller takes them off)."""
    rows = tl.dot(weight, y, input_precision=PRECISION)
    columns = tl.dot(tl.trans(weight), x, input_precision=PRECISION)
    return rows * by_row, rows * x.to(tl.float32), columns * by_column, columns * y.to(tl.float32)


@triton.jit
def direct_level(
    logs,
    count,
    stride,
    width,
    ROWS: tl.constexpr,
    BS: tl.constexpr,
    LEVELS: tl.constexpr,
    SPAN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Level p <= LEVELS such that log decays inside any aligned piece of 2^p of the chunk's rows span at most SPAN in
    this slice of channels: the whole chunk, pieces of 16, or 0."""
    column = tl.arange(0, BS)
    real = column < tl.where(count > 0, width, 0)
    whole = tl.load(logs + column, mask=real, other=0.0)
    whole -= tl.load(logs + (count - 1) * stride + column, mask=real, other=0.0)
    level = tl.where(tl.max(whole, 0) <= SPAN, LEVELS, 0)
    if level == 0:
        row = tl.arange(0, ROWS)
        begin = (row >> 4) << 4
        end = tl.minimum(begin + 15, count - 1)
        piece = load_picked(logs, begin, row < count, stride, width, BS, EXACT)
        piece -= load_picked(logs, end, row < count, stride, width, BS, EXACT)
        level = tl.where(tl.max(tl.max(piece, 1), 0) <= SPAN, 4 if LEVELS > 4 else 0, 0)
    return level


@triton.jit
def load_middle(logs, piece, level, count, stride, width, BS: tl.constexpr, EXACT: tl.constexpr):
    """[n, BS] log decays of the rows in the middle of aligned pieces of 2^level rows."""
    middle = tl.minimum((piece << level) + ((1 << level) >> 1), count - 1)
    return load_picked(logs, middle, middle >= 0, stride, width, BS, EXACT)


@triton.jit
def not_above(log, SPAN: tl.constexpr):
    """exp2 of a log decay that is <= SPAN, or that belongs to rows which make no pair."""
    return tl.exp2(tl.minimum(log, SPAN))


@triton.jit
def prefix_start(anchor, level, LEVELS: tl.constexpr):
    """([n] piece of 2^level columns in which the prefix ends, first digit that it does not cover). At LEVELS the one
    piece holds every prefix, that of all columns too."""
    whole = level == LEVELS
    return tl.where(whole, 0, anchor >> level), tl.where(whole, LEVELS + 1, level)


@triton.jit
def direct_prefix_pairs(anchor, piece, level, C: tl.constexpr):
    """[R, C] the pairs (row, clean column) inside the piece in which the row's prefix ends."""
    column = tl.arange(0, C)
    return ((column >> level)[None, :] == piece[:, None]) & (column[None, :] < anchor[:, None])


@triton.jit
def direct_prefix_rows(
    logs, c, anchor, piece, level, count, stride, width, BS: tl.constexpr, EXACT: tl.constexpr, SPAN: tl.constexpr
):
    """[R, BS] exp(gam[anchor - 1] - gam in the middle of the piece), 0 for rows that read nothing of it."""
    at = load_middle(logs, piece, level, count, stride, width, BS, EXACT)
    return tl.where((anchor > (piece << level))[:, None], not_above(c - at, SPAN), 0.0)


@triton.jit
def blocks_span(logs, start, last, count, stride, width, R: tl.constexpr, BS: tl.constexpr, EXACT: tl.constexpr):
    """([R, BS] t at the first row of each row's block, what t spans at most in a block, in this slice of channels)."""
    valid = tl.arange(0, R) < count
    at = load_picked(logs, start, valid, stride, width, BS, EXACT)
    span = at - load_picked(logs, last, valid, stride, width, BS, EXACT)
    return at, tl.max(tl.max(span, 1), 0)


@triton.jit
def direct_block_pairs(prefix, start, R: tl.constexpr):
    """[R, R] the pairs (row, row of the same block among the first `prefix` of it)."""
    row = tl.arange(0, R)
    return (row[None, :] >= start[:, None]) & (row[None, :] < (start + prefix)[:, None])


@triton.jit
def triangle_factor(logs, gam, count, stride, width, p, C: tl.constexpr, BS: tl.constexpr, EXACT: tl.constexpr):
    """Digit p of strictly lower pairs inside a chunk: [C, BS] the one factor of every row.

    Row l reads at this digit if bit p of l is set, otherwise it is read: the reference is the last row of the even
    piece. logs: `cumulative` of the chunk.
    """
    row = tl.arange(0, C)
    odd = ((row >> p) & 1) == 1
    reference = tl.minimum((((row >> p) | 1) << p) - 1, count - 1)
    at = load_picked(logs, reference, reference >= 0, stride, width, BS, EXACT)
    return not_above_one(tl.where(odd[:, None], gam - at, at - gam))


@triton.jit
def triangle_pairs(p, C: tl.constexpr):
    """[C, C] the pairs (row, column) of digit p."""
    row = tl.arange(0, C)
    same = (row >> (p + 1))[:, None] == (row >> (p + 1))[None, :]
    return same & (((row >> p) & 1) == 1)[:, None] & (((row >> p) & 1) == 0)[None, :]


@triton.jit
def prefix_rows(logs, c, anchor, stride, width, p, BS: tl.constexpr, EXACT: tl.constexpr):
    """[R, BS] exp(gam[anchor - 1] - gam at the end of the piece that digit p of the anchor reads), 0 if it reads none.
    logs: `cumulative` of the chunk."""
    piece = anchor >> p
    used = (piece & 1) == 1
    at = load_picked(logs, (piece << p) - 1, used, stride, width, BS, EXACT)
    return tl.where(used[:, None], not_above_one(c - at), 0.0)


@triton.jit
def prefix_columns(logs, gam, count, stride, width, p, C: tl.constexpr, BS: tl.constexpr, EXACT: tl.constexpr):
    """[C, BS] exp(gam at the end of the column's piece - gam)."""
    column = tl.arange(0, C)
    end = tl.minimum((((column >> p) + 1) << p) - 1, count - 1)
    at = load_picked(logs, end, end >= 0, stride, width, BS, EXACT)
    return not_above_one(at - gam)


@triton.jit
def prefix_pairs(anchor, p, C: tl.constexpr):
    """[R, C] the pairs (row, clean column) of digit p."""
    column = tl.arange(0, C)
    piece = anchor >> p
    return ((piece & 1) == 1)[:, None] & ((column >> p)[None, :] == piece[:, None] - 1)


@triton.jit
def block_rows(logs, log, prefix, start, stride, width, p, BS: tl.constexpr, EXACT: tl.constexpr):
    """[R, BS] exp(log - t at the end of the piece of the row's own block that digit p of `prefix` reads), or 0.
    logs: `cumulative` of the tile."""
    piece = prefix >> p
    used = (piece & 1) == 1
    at = load_picked(logs, start + (piece << p) - 1, used, stride, width, BS, EXACT)
    return tl.where(used[:, None], not_above_one(log - at), 0.0)


@triton.jit
def block_columns(
    logs, t, start, last, count, stride, width, p, R: tl.constexpr, BS: tl.constexpr, EXACT: tl.constexpr
):
    """[R, BS] exp(t at the end of the row's piece - t); a piece that the block cuts off is read by nothing."""
    row = tl.arange(0, R)
    end = tl.minimum(start + ((((row - start) >> p) + 1) << p) - 1, last)
    at = load_picked(logs, end, row < count, stride, width, BS, EXACT)
    return not_above_one(at - t)


@triton.jit
def block_pairs(prefix, start, p, R: tl.constexpr):
    """[R, R] the pairs (row, row of the same block) of digit p."""
    row = tl.arange(0, R)
    piece = prefix >> p
    place = (row - start) >> p
    same = start[:, None] == start[None, :]
    return same & ((piece & 1) == 1)[:, None] & (place[None, :] == piece[:, None] - 1)


@triton.jit
def block_last(start, R: tl.constexpr):
    """[R] last row of each row's block."""
    row = tl.arange(0, R)
    return tl.max(tl.where(start[:, None] == start[None, :], row[None, :], 0), 1)


@triton.jit
def read_by(start, stop, R: tl.constexpr):
    """[R, R] which rows l (columns here) read row i (rows here): start_l <= i < stop_l."""
    row = tl.arange(0, R)
    return (start[None, :] <= row[:, None]) & (row[:, None] < stop[None, :])
