"""Products of vectors that decay per key channel: W[l, j] = sum_c x_lc y_jc exp(a_lc - b_jc), in dense products only.

Row l reads a prefix of its columns (docs/kernels.md, "Exponents"). The binary digits of the prefix's length cut it into
aligned pieces of 2^p columns. With r the last column of a piece, exp(a - b_j) = exp(a - b_r) exp(b_r - b_j) has both
factors <= 1, so that every digit costs one dense product. `pair_decay.py` is the CPU form of the same.

`cumulative` [B, T, H, K] float32 holds log2 decays: of clean rows since the chunk's start (gam), of noisy rows since
the block's start (t), inclusive.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import load_tile, reciprocal_norm, store_tile

# Triton's interpreter multiplies bfloat16 matrices as integers: there one float32 piece takes the place of them all.
PIECE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def exact_sums(member, x, PIECES: tl.constexpr):
    """[n, K] fp32 sums over the rows m of x [m, K] fp32 with member[n, m]: x as PIECES bfloat16 (3 are exact)."""
    member = tl.where(member, 1.0, 0.0).to(PIECE)
    high = x.to(PIECE)
    rest = x - high.to(tl.float32)
    middle = rest.to(PIECE)
    total = tl.dot(member, middle)
    if PIECES == 3:
        low = (rest - middle.to(tl.float32)).to(PIECE)
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
def finish_norm(
    grad,
    raw,
    first,
    count,
    norm,
    along,
    stride,
    grad_stride,
    width,
    ROWS: tl.constexpr,
    BS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradient of raw rows, in place, from that of the unit rows; along [n]: sum of unit * gradient over channels."""
    unit = load_tile(raw, first, count, stride, width, ROWS, BS, EXACT).to(tl.float32) * norm[:, None]
    given = load_tile(grad, first, count, grad_stride, width, ROWS, BS, EXACT).to(tl.float32)
    value = norm[:, None] * (given - unit * along[:, None])
    store_tile(grad, value, first, count, grad_stride, width, ROWS, BS, EXACT)


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
