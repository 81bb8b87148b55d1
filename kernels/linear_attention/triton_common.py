"""Pieces that the linear-attention kernels share: loads of rows, decays, the inverse of a small triangular matrix.

Log decays are handled in base 2 inside the kernels (exp2 is one instruction). Every exponent that is used is <= 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
L2_EPSILON = tl.constexpr(1e-6)
TINY = tl.constexpr(1e-30)


@triton.jit
def load_rows(base, token, valid, stride, width, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """Rows [n, WIDTH] of a token-major tensor: columns 0..width of every valid token, 0 elsewhere."""
    column = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if not EXACT:
        mask = mask & (column < width)[None, :]
    return tl.load(base + token[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, value, token, valid, stride, width, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if not EXACT:
        mask = mask & (column < width)[None, :]
    tl.store(base + token[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=mask)


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
def normalised(x, L2NORM: tl.constexpr):
    """Rows as the state sees them, in their own dtype."""
    if L2NORM:
        return (x.to(tl.float32) * reciprocal_norm(x)[:, None]).to(x.dtype)
    return x


@triton.jit
def through_norm(grad, raw, L2NORM: tl.constexpr):
    """Gradient of the raw rows from that of the normalised ones."""
    if L2NORM:
        norm = reciprocal_norm(raw)[:, None]
        unit = raw.to(tl.float32) * norm
        return norm * (grad - unit * tl.sum(unit * grad, 1)[:, None])
    return grad


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
def prefix_decay(row_log, column_log, read):
    """exp2(row_log - column_log) [l, j] where read, else 0; the exponent is masked before it is used."""
    return tl.where(read, tl.exp2(tl.where(read, row_log[:, None] - column_log[None, :], 0.0)), 0.0)


@triton.jit
def unit_lower_inverse(lower, offset, SIZE: tl.constexpr, LARGEST: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 [SIZE, SIZE] fp32 for a strictly lower, block-diagonal matrix; offset [SIZE]: row inside its block.

    Block elimination by doubling: with the inverse of all diagonal pieces of `half` rows known, that of pieces of
    2 half rows is X - X lower' X, lower' being the entries between the two halves. As stable as forward substitution
    (no powers of `lower` appear), and dense products only. LARGEST: rows of the largest block.
    """
    row = tl.arange(0, SIZE)
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for level in tl.static_range(6):
        if (1 << level) < LARGEST:
            piece = offset >> level
            between = ((piece & 1) == 1)[:, None] & ((piece[:, None] - 1) == piece[None, :])
            part = tl.where(between, lower, 0.0)
            if level == 0:
                inverse -= part
            else:
                inverse -= tl.dot(
                    inverse, tl.dot(part, inverse, input_precision=PRECISION), input_precision=PRECISION
                )
    return inverse
