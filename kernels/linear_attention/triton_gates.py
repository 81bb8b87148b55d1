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

from .triton_common import load_beta, load_log_decay


@triton.jit
def block_sums(log_decay, start, stop, R: tl.constexpr):
    """t [R] (inclusive, inside the block) and e [R] (up to the last row that the query reads)."""
    row = tl.arange(0, R)
    in_block = row[None, :] >= start[:, None]
    t = tl.sum(tl.where(in_block & (row[None, :] <= row[:, None]), log_decay[None, :], 0.0), 1)
    e = tl.sum(tl.where(in_block & (row[None, :] < stop[:, None]), log_decay[None, :], 0.0), 1)
    return t, e


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
    pid = tl.program_id(0)
    head, tile = pid % H, pid // H
    row = tl.arange(0, R)
    meta = tile.to(tl.int64) * R + row
    token = tl.load(tile_token + meta).to(tl.int64)
    valid = token >= 0
    place = pid.to(tl.int64) * R + row
    tl.store(tile_beta + place, tl.where(valid, load_beta(beta + head, token, valid, beta_token), 1.0))
    if GATE == 1:
        start = tl.load(tile_start + meta)
        stop = tl.load(tile_stop + meta)
        anchor = tl.load(tile_anchor + meta)
        t, e = block_sums(load_log_decay(g + head, token, valid, g_token), start, stop, R)
        chunk_head = tl.load(tile_chunk + tile).to(tl.int64) * H + head
        c = tl.load(chunk_gam + chunk_head * C + anchor - 1, mask=anchor > 0, other=0.0)
        logs = tile_logs + pid.to(tl.int64) * 3 * R + row
        tl.store(logs, t)
        tl.store(logs + R, e)
        tl.store(logs + 2 * R, c)
