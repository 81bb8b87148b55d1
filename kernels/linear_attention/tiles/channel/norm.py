"""Key-channel gates, backward: gradients of unit rows back to the rows that were normalised, in place."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import load_tile, reciprocal_norm, store_tile


@triton.jit
def channel_norm_grad_kernel(
    q,
    k,
    grad_q,
    grad_k,
    first_of,
    count_of,
    key_dim: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    EXACT_K: tl.constexpr,
):
    """grad_q, grad_k [B,T,H,K] of one run of tokens (a chunk or a tile: first_of, count_of) and one head."""
    pid = tl.program_id(0)
    head, run = pid % H, pid // H
    first, count = tl.load(first_of + run).to(tl.int64), tl.load(count_of + run)
    through_norm(q + head // GROUP * q_head, grad_q + head * key_dim, first, count, q_token, H, key_dim, C, BK, EXACT_K)
    through_norm(k + head // GROUP * k_head, grad_k + head * key_dim, first, count, k_token, H, key_dim, C, BK, EXACT_K)


@triton.jit
def through_norm(
    raw,
    grad,
    first,
    count,
    stride,
    H: tl.constexpr,
    key_dim: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    EXACT: tl.constexpr,
):
    x = load_tile(raw, first, count, stride, key_dim, ROWS, BK, EXACT).to(tl.float32)
    given = load_tile(grad, first, count, H * key_dim, key_dim, ROWS, BK, EXACT).to(tl.float32)
    norm = reciprocal_norm(x)[:, None]
    unit = x * norm
    value = norm * (given - unit * tl.sum(unit * given, 1)[:, None])
    store_tile(grad, value, first, count, H * key_dim, key_dim, ROWS, BK, EXACT)
