"""Which rows a program works on: how every kernel begins."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(index, first, count):
    """(flat index of the first token as int64, number of tokens) of a chunk or a tile."""
    return tl.load(first + index).to(tl.int64), tl.load(count + index)


@triton.jit
def noisy_tile(
    head,
    tile,
    row,
    chunk_gam,
    chunk_beta,
    tile_logs,
    tile_beta,
    chunk_token,
    chunk_length,
    tile_chunk,
    tile_first,
    tile_count,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """Of the program of one (tile of noisy rows, head): places of (chunk, head), of (tile, head) and, [R], of the
    tile's rows in what is kept per head or row; `rows_of` the tile, and of the chunk that it reads; the vectors that
    `chunk_vectors` and `tile_vectors` load. row: 0 .. R."""
    chunk = tl.load(tile_chunk + tile)
    clean_first, clean_count = rows_of(chunk, chunk_token, chunk_length)
    meta = tile.to(tl.int64) * R + row
    first, count = rows_of(tile, tile_first, tile_count)
    chunk_head = chunk.to(tl.int64) * H + head
    tile_head = tile.to(tl.int64) * H + head
    gams, betas = chunk_gam + chunk_head * C, chunk_beta + chunk_head * C
    logs, own_betas = tile_logs + tile_head * 3 * R, tile_beta + tile_head * R
    return chunk_head, tile_head, meta, (first, count), (clean_first, clean_count), (gams, betas, logs, own_betas)
