"""Pieces that the linear-attention kernels share: loads of rows, decays, the inverse of a small triangular matrix.

A kernel that goes through several phases loads its vectors again in each, after a barrier: kept, the compiler forms the
matrices of decays and masks of all phases at the start, and spills them.

A gradient of a log decay is a small rest of large sums over pairs of rows, once as readers and once as what is read.
Both ends of a pair therefore round the same number: weights carry the factors of both rows (norms, beta, scale), and
gradients of rows come multiplied with the row's own norm.

Log decays are handled in base 2 inside the kernels (exp2 is one instruction). Every exponent that is used is <= 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
L2_EPSILON = tl.constexpr(1e-6)
TINY = tl.constexpr(1e-30)


@triton.jit
def load_tile(base, first, count, stride, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """[ROWS, WIDTH]: columns 0..width of tokens first .. first + count of a token-major tensor, 0 elsewhere. Addresses
    are one int64 scalar plus small constants (the stride is a constexpr of every kernel)."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (row < count)[:, None]
    if not EXACT:
        mask = mask & (column < width)[None, :]
    return tl.load(base + first * stride + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(
    base, value, first, count, stride, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr
):
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (row < count)[:, None]
    if not EXACT:
        mask = mask & (column < width)[None, :]
    place = base + first * stride + (row[:, None] * stride + column[None, :])
    tl.store(place, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_matrix(base, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, columns):
    """[ROWS, COLUMNS] of a matrix with this row stride; 0 outside rows x columns (EXACT: nothing is outside)."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pointer = base + r[:, None] * stride + c[None, :]
    if EXACT:
        return tl.load(pointer)
    return tl.load(pointer, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def reciprocal_norm(x):
    """[n] of rows [n, K]"""
    x = x.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, 1) + L2_EPSILON)


@triton.jit
def row_norm(x, ROWS: tl.constexpr, L2NORM: tl.constexpr):
    """[ROWS] fp32 factors that normalise the rows: products take raw rows, and weights carry their factors."""
    if L2NORM:
        return reciprocal_norm(x)
    return tl.full([ROWS], 1.0, dtype=tl.float32)


@triton.jit
def through_factor(grad, raw, norm, L2NORM: tl.constexpr):
    """Gradient of the raw rows from that of the normalised ones times norm [n], as from `row_norm`."""
    if L2NORM:
        x = raw.to(tl.float32)
        along = tl.sum(x * grad, 1) * norm * norm
        return grad - x * along[:, None]
    return grad


@triton.jit
def product_of_tiles(
    left,
    right,
    a,
    b,
    a_first,
    b_first,
    a_count,
    b_count,
    a_stride,
    b_stride,
    width: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A B^T [A_ROWS, B_ROWS] of token-major rows of `width` columns, in NV tiles of BV; left, right: the first."""
    total = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    for vt in tl.static_range(1, NV):
        left = load_tile(a + vt * BV, a_first, a_count, a_stride, width - vt * BV, A_ROWS, BV, EXACT)
        right = load_tile(b + vt * BV, b_first, b_count, b_stride, width - vt * BV, B_ROWS, BV, EXACT)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def product_with_state(
    rows,
    a,
    state,
    first,
    count,
    stride,
    key_dim: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A S^T [ROWS, BK] for token-major rows A, of which `rows` is the first tile, and a state [key_dim, width]."""
    part = load_matrix(state, key_dim, width, BK, BV, EXACT_K and EXACT_V, width)
    total = tl.dot(rows, tl.trans(part), input_precision=PRECISION)
    for vt in tl.static_range(1, NV):
        rows = load_tile(a + vt * BV, first, count, stride, width - vt * BV, ROWS, BV, EXACT_V)
        part = load_matrix(state + vt * BV, key_dim, width, BK, BV, EXACT_K and EXACT_V, width - vt * BV)
        total = tl.dot(rows, tl.trans(part), total, input_precision=PRECISION)
    return total


@triton.jit
def row_dot(a, rows):
    """[n] of fp32 a and raw rows"""
    return tl.sum(a * rows.to(tl.float32), 1)


@triton.jit
def log_weights(row_log, column_log, read, GATE: tl.constexpr):
    """Decays exp2(row_log - column_log) where read, else 0; without a gate per head just the mask as numbers."""
    if GATE == 1:
        return tl.exp2(tl.where(read, row_log[:, None] - column_log[None, :], float("-inf")))
    return tl.where(read, 1.0, 0.0)


@triton.jit
def load_log_decay(g, token, valid, stride):
    """[n] fp32 log2 decays, 0 on padding."""
    return tl.load(g + token * stride, mask=valid, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def load_beta(beta, token, valid, stride):
    """[n] fp32; never exactly 0, because the gradient of beta divides by it (TINY changes nothing that is rounded)."""
    b = tl.load(beta + token * stride, mask=valid, other=0.0).to(tl.float32)
    return tl.where(tl.abs(b) < TINY, TINY, b)


@triton.jit
def unit_triangular_inverse(
    part_of,
    offset,
    UPPER: tl.constexpr,
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """(I + part_of)^-1 [SIZE, SIZE] fp32 of a strictly triangular, block-diagonal matrix (lower, or UPPER).

    offset [SIZE]: row inside its block. Block elimination by doubling: with the inverse X of all diagonal pieces of n
    rows known, that of pieces of 2n rows is X - X part X, part being the entries between two halves. As stable as
    substitution (no powers of the matrix appear), and dense products only, with operands of `dtype`. LARGEST: rows of
    the largest block (power of two).
    """
    row = tl.arange(0, SIZE)
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for level in tl.static_range(6):
        if (1 << level) < LARGEST:
            piece = offset >> level
            if UPPER:
                between = ((piece & 1) == 0)[:, None] & ((piece[:, None] + 1) == piece[None, :])
            else:
                between = ((piece & 1) == 1)[:, None] & ((piece[:, None] - 1) == piece[None, :])
            part = tl.where(between, part_of, 0.0)
            if level == 0:
                inverse -= part
            else:
                x = inverse.to(dtype)
                inner = tl.dot(part.to(dtype), x, input_precision=PRECISION)
                inverse -= tl.dot(x, inner.to(dtype), input_precision=PRECISION)
    return inverse


