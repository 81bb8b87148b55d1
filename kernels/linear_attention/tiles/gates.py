"""Per-row scalars of chunks and tiles, once per call: the other kernels load them as dense vectors.

All are float32; log decays are in base 2.
    chunk_gam  [N, H, C]     inclusive cumulative log decay inside the chunk
    chunk_beta [N, H, C]     beta (1 on padding)
    tile_logs  [M, H, 3, R]  t: in-block inclusive, e: up to the last row that the query reads, c: gam[anchor - 1]
    tile_beta  [M, H, R]     beta (1 on padding)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2E, TINY, load_beta, load_log_decay


@triton.jit
def tile_vectors(tile_logs, tile_beta, R: tl.constexpr, GATE: tl.constexpr):
    """(t, e, c, beta) [R] of the tile's rows."""
    row = tl.arange(0, R)
    b = tl.load(tile_beta + row)
    t, e, c = b, b, b  # without a gate per head they are not used
    if GATE == 1:
        t, e, c = tl.load(tile_logs + row), tl.load(tile_logs + R + row), tl.load(tile_logs + 2 * R + row)
    return t, e, c, b


@triton.jit
def chunk_vectors(chunk_gam, chunk_beta, C: tl.constexpr, GATE: tl.constexpr):
    """(gam, beta) [C] of a chunk."""
    column = tl.arange(0, C)
    b = tl.load(chunk_beta + column)
    gam = b
    if GATE == 1:
        gam = tl.load(chunk_gam + column)
    return gam, b


@triton.jit(do_not_specialize=["chunks"])
def chunk_gates_kernel(
    g,
    beta,
    chunk_gam,
    chunk_beta,
    chunk_token,
    chunk_length,
    chunks,
    g_token,
    beta_token,
    H: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
):
    pid = tl.program_id(0)
    head, chunk = pid % H, pid // H
    row = tl.arange(0, C)
    token = (tl.load(chunk_token + chunk) + row).to(tl.int64)
    valid = row < tl.load(chunk_length + chunk)
    place = pid.to(tl.int64) * C + row
    tl.store(chunk_beta + place, tl.where(valid, load_beta(beta + head, token, valid, beta_token), 1.0))
    if GATE == 1:
        tl.store(chunk_gam + place, tl.cumsum(load_log_decay(g + head, token, valid, g_token), 0))


@triton.jit(do_not_specialize=["tiles"])
def tile_gates_kernel(
    g,
    beta,
    chunk_gam,
    tile_logs,
    tile_beta,
    tile_chunk,
    tile_token,
    tile_anchor,
    tile_start,
    tile_stop,
    tiles,
    g_token,
    beta_token,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    GATE: tl.constexpr,
):
    """One program per (tile, 16 heads): in-block sums of all heads are one small product with a 0/1 matrix."""
    groups: tl.constexpr = (H + 15) // 16
    pid = tl.program_id(0)
    head, tile = (pid % groups) * 16 + tl.arange(0, 16), pid // groups
    known = head < H
    row = tl.arange(0, R)
    meta = tile.to(tl.int64) * R + row
    token = tl.load(tile_token + meta).to(tl.int64)
    mask = (token >= 0)[:, None] & known[None, :]
    tile_head = tile.to(tl.int64) * H + head
    b = tl.load(beta + token[:, None] * beta_token + head[None, :], mask=mask, other=1.0).to(tl.float32)
    b = tl.where(tl.abs(b) < TINY, TINY, b)
    tl.store(tile_beta + tile_head[None, :] * R + row[:, None], b, mask=known[None, :])
    if GATE == 1:
        decay = tl.load(g + token[:, None] * g_token + head[None, :], mask=mask, other=0.0).to(tl.float32) * LOG2E
        start = tl.load(tile_start + meta)[:, None]
        stop = tl.load(tile_stop + meta)[:, None]
        upto = (row[None, :] >= start) & (row[None, :] <= row[:, None])
        until = (row[None, :] >= start) & (row[None, :] < stop)
        t = tl.dot(tl.where(upto, 1.0, 0.0), decay, input_precision="ieee")
        e = tl.dot(tl.where(until, 1.0, 0.0), decay, input_precision="ieee")
        anchor = tl.load(tile_anchor + meta)[:, None]
        chunk_head = tl.load(tile_chunk + tile).to(tl.int64) * H + head[None, :]
        c = tl.load(chunk_gam + chunk_head * C + anchor - 1, mask=(anchor > 0) & known[None, :], other=0.0)
        logs = tile_logs + tile_head[None, :] * 3 * R + row[:, None]
        tl.store(logs, t, mask=known[None, :])
        tl.store(logs + R, e, mask=known[None, :])
        tl.store(logs + 2 * R, c, mask=known[None, :])
