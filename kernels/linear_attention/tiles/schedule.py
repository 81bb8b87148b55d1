"""The state schedule of the Triton kernels: documents, chunks of clean tokens, tiles of noisy rows, as int32 tensors.

Clean tokens of a document are consecutive slots, so a chunk is a first token and a length and needs no gather; chunks
restart at every document. A noisy block belongs to the chunk that holds clean token `anchor` if its document has one
there, else to the document's last chunk (anchor at the document's end); it reads that chunk's entry state and its
first (anchor - chunk start) rows. Blocks of one chunk whose slots follow each other fill tiles of at most `tile_rows`
consecutive tokens, whole blocks only: a tile needs no gather either, and every product of a block is a dense square
inside its tile.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flarec.base.flat import Schedule, flat_input
from flarec.errors import LayoutError
from flarec.layout import CAUSAL, Layout

IntArray = npt.NDArray[np.int64]


H100_SHARED = 227 * 1024
"""Bytes of shared memory of a program on an H100: what kernels are compiled for where there is no GPU."""
MIN_ROWS = 16
MATRICES = 7
"""Most matrices of C rows that a kernel holds in shared memory at a time, for sm_90; for sm_80 fewer do."""


def shared_memory() -> int:
    """Bytes of shared memory that a program may take on the current GPU; those of an H100 where there is none."""
    if not torch.cuda.is_available():
        return H100_SHARED
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.shared_memory_per_block_optin)


def bytes_needed(rows: int, dtype: torch.dtype, key_dim: int, value_dim: int) -> int:
    """Of shared memory, at most, for chunks and tiles of that many rows; heads are padded to a power of two."""
    width = 1 << (max(key_dim, value_dim, 16) - 1).bit_length()
    return MATRICES * rows * width * dtype.itemsize


def largest_chunk(dtype: torch.dtype, key_dim: int, value_dim: int) -> int:
    """Rows of a chunk, and of a tile, that these inputs leave room for in the GPU's shared memory; 0 if not even the
    smallest ones fit."""
    wide = dtype == torch.float32 and max(key_dim, value_dim) > 64
    sizes = [64, 32, MIN_ROWS] if not wide else [32, MIN_ROWS] if key_dim <= 128 else [MIN_ROWS]
    room = shared_memory()
    return next((rows for rows in sizes if bytes_needed(rows, dtype, key_dim, value_dim) <= room), 0)


@flat_input
@dataclass(frozen=True)
class TileSchedule(Schedule):
    """Index tensors (int32) of one layout: D documents, N chunks of at most C clean rows, M tiles of R noisy rows.

    chunk_size C, tile_rows R: rows of the kernels' matrices; chunk_step: clean tokens of a full chunk, at most C.

    document_token  [D]     flat token index (row * T + slot) of the document's first clean token
    document_length [D]     clean tokens of the document in this layout
    document_chunk  [D + 1] chunks of document d are document_chunk[d] .. document_chunk[d + 1]
    document_row    [D]     row whose initial state the document starts from (document 0 of each row), else -1
    chunk_token     [N]     flat token index of the chunk's first token
    chunk_length    [N]     clean tokens in the chunk, 0..C
    chunk_tile      [N + 1] tiles of chunk n are chunk_tile[n] .. chunk_tile[n + 1]
    tile_chunk      [M]     the chunk a tile reads
    tile_first      [M]     flat token index of the tile's first row
    tile_count      [M]     rows of the tile, 1..R; the others are padding
    tile_token      [M, R]  flat token index of the row, -1 on padding
    tile_anchor     [M, R]  rows of the chunk that the row's block reads, 0..C
    tile_start      [M, R]  first row of the block inside the tile (padding: the row itself)
    tile_stop       [M, R]  end (exclusive) of the rows that the row's query reads: block_end the block's end, causal
                            the row after this one (padding: the row itself)
    """

    rows: int
    length: int
    chunk_size: int
    chunk_step: int
    tile_rows: int
    largest_block: int
    tokens_padded: bool
    document_token: Tensor
    document_length: Tensor
    document_chunk: Tensor
    document_row: Tensor
    chunk_token: Tensor
    chunk_length: Tensor
    chunk_tile: Tensor
    tile_chunk: Tensor
    tile_first: Tensor
    tile_count: Tensor
    tile_token: Tensor
    tile_anchor: Tensor
    tile_start: Tensor
    tile_stop: Tensor

    @property
    def documents(self) -> int:
        return self.document_row.shape[0]

    @property
    def chunks(self) -> int:
        return self.chunk_token.shape[0]

    @property
    def tiles(self) -> int:
        return self.tile_chunk.shape[0]

    @staticmethod
    def from_layout(layout: Layout, chunk_size: int = 64, tile_rows: int | None = None) -> TileSchedule:
        """Derive the schedule on the host and move it to the layout's device. tile_rows: chunk_size unless given.

        If all blocks have one length, chunks hold the largest multiple of it up to `chunk_size` tokens (63 for blocks
        of 3), so that blocks on a grid fill whole tiles; kernels pad chunks to `chunk_size` rows.
        Raises `LayoutError` for a block longer than `tile_rows`, or anchored outside its document's clean tokens
        (before the cache ends, or behind the last clean token).
        """
        return _Builder(layout, chunk_size, tile_rows or chunk_size).build().to(layout.device)


class _Builder:
    """Host-side derivation with numpy. Documents are numbered row * stride + document, then sorted, longest first."""

    def __init__(self, layout: Layout, chunk_size: int, tile_rows: int) -> None:
        self.layout, self.chunk_size, self.tile_rows = layout, chunk_size, tile_rows
        host = {f.name: getattr(layout, f.name).cpu().numpy() for f in fields(layout)}
        self._find_blocks(host)
        self._find_documents(host)

    def _find_blocks(self, host: dict[str, IntArray]) -> None:
        """Blocks in slot order: row, flat token, length, document, anchor, readout."""
        noisy = host["noisy_block"]
        row, slot = np.nonzero(noisy >= 0)
        block = noisy[row, slot]
        starts = np.ones(len(row), dtype=bool)
        starts[1:] = (row[1:] != row[:-1]) | (block[1:] != block[:-1])
        first = np.flatnonzero(starts)
        self.block_row = row[first]
        self.block_token = self.block_row * self.layout.length + self.layout.clean_length + slot[first]
        self.block_length = np.diff(first, append=len(row))
        index = block[first]
        self.block_document = host["block_document"][self.block_row, index]
        self.block_anchor = host["block_anchor"][self.block_row, index]
        self.block_causal = host["block_readout"][self.block_row, index] == CAUSAL
        longest = int(self.block_length.max(initial=0))
        if longest > self.tile_rows:
            raise LayoutError(
                f"a noisy block has {longest} tokens; the Triton kernels take blocks of at most {self.tile_rows}, "
                "use shorter blocks or the torch kernels"
            )

    def _find_documents(self, host: dict[str, IntArray]) -> None:
        document, length = host["clean_document"], self.layout.length
        row, slot = np.nonzero(document >= 0)
        stride = 1 + max(int(document.max(initial=0)), int(self.block_document.max(initial=0)))
        key = row * stride + document[row, slot]
        keys = self.layout.rows * stride
        tokens = np.bincount(key, minlength=keys)
        first = np.full(keys, 0, dtype=np.int64)
        head = np.ones(len(key), dtype=bool)
        head[1:] = key[1:] != key[:-1]
        first[key[head]] = (row * length + slot)[head]
        cached = np.zeros(keys, dtype=np.int64)
        cached[::stride] = host["cached"]

        block_key = self.block_row * stride + self.block_document
        local = self.block_anchor - cached[block_key]
        wrong = (local < 0) | (local > tokens[block_key])
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            low = int(cached[block_key[i]])
            high = low + int(tokens[block_key[i]])
            raise LayoutError(
                f"row {self.block_row[i]}: a block of document {self.block_document[i]} is anchored at "
                f"{self.block_anchor[i]}; its state is known from position {low} to {high} only"
            )
        exists = tokens > 0
        exists[block_key] = True
        exists[::stride] |= host["cached"] > 0  # an initial state passes through, also where nothing reads it
        documents = np.flatnonzero(exists)
        lengths = np.unique(self.block_length)
        step_size = self.chunk_size - (self.chunk_size % int(lengths[0]) if len(lengths) == 1 else 0)
        chunks = np.maximum(1, -(-tokens[documents] // step_size))
        order = np.argsort(-chunks, kind="stable")
        documents, chunks = documents[order], chunks[order]
        self.document_length, self.document_token = tokens[documents], first[documents]
        self.document_row = np.where(documents % stride == 0, documents // stride, -1)
        self.document_chunk = np.concatenate([[0], np.cumsum(chunks)])
        inside = np.arange(int(chunks.sum())) - np.repeat(self.document_chunk[:-1], chunks)
        of = np.repeat(np.arange(len(documents)), chunks)
        self.chunk_token = self.document_token[of] + inside * step_size
        self.chunk_length = np.clip(self.document_length[of] - inside * step_size, 0, step_size)
        self.step_size = step_size

        rank = np.zeros(keys, dtype=np.int64)
        rank[documents] = np.arange(len(documents))
        position = rank[block_key]
        step = np.minimum(local // step_size, chunks[position] - 1) if len(local) else local
        self.block_chunk = self.document_chunk[position] + step
        self.block_local = local - step * step_size

    def _tiles(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Blocks by chunk, then slot: (order, tile of each, first row of each, chunk of each tile), next-fit."""
        order = np.argsort(self.block_chunk, kind="stable")
        length, chunk = self.block_length[order], self.block_chunk[order]
        ends = np.cumsum(length)
        begins = ends - length
        token = self.block_token[order]
        breaks = np.ones(len(order), dtype=bool)  # a run: blocks of one chunk whose slots follow each other
        breaks[1:] = (chunk[1:] != chunk[:-1]) | (token[1:] != token[:-1] + length[:-1])
        run = np.cumsum(breaks)
        run_end = np.searchsorted(run, run, side="right")
        # the block that opens the next tile if this one opens a tile
        following = np.minimum(np.searchsorted(ends, begins + self.tile_rows, side="right"), run_end).tolist()
        opens, at = [], 0
        while at < len(order):
            opens.append(at)
            at = following[at]
        opened = np.asarray(opens, dtype=np.int64)
        tile = np.searchsorted(opened, np.arange(len(order)), side="right") - 1
        return order, tile, begins - begins[opened][tile] if len(opens) else begins, chunk[opened]

    def build(self) -> TileSchedule:
        order, tile, first_row, tile_chunk = self._tiles()
        size, tiles = self.tile_rows, len(tile_chunk)
        length = self.block_length[order]
        block = np.repeat(np.arange(len(order)), length)  # of every noisy token, in tile order
        offset = np.arange(len(block)) - np.repeat(np.cumsum(length) - length, length)
        row = first_row[block] + offset
        place = tile[block] * size + row

        own = np.tile(np.arange(size), tiles)
        opens = first_row == 0
        tile_count = np.bincount(tile, weights=length, minlength=tiles)
        tile_token, tile_anchor = np.full(tiles * size, -1, dtype=np.int64), np.zeros(tiles * size, dtype=np.int64)
        tile_start, tile_stop = own.copy(), own.copy()
        tile_token[place] = self.block_token[order][block] + offset
        tile_anchor[place] = self.block_local[order][block]
        tile_start[place] = first_row[block]
        tile_stop[place] = np.where(self.block_causal[order][block], row + 1, (first_row + length)[block])
        counts = np.bincount(tile_chunk, minlength=len(self.chunk_token))
        layout = self.layout
        tokens = int(self.document_length.sum() + self.block_length.sum())

        def int32(x: IntArray, *shape: int) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x.astype(np.int32))).reshape(shape or (-1,))

        return TileSchedule(
            rows=layout.rows,
            length=layout.length,
            chunk_size=self.chunk_size,
            chunk_step=self.step_size,
            tile_rows=size,
            largest_block=int(self.block_length.max(initial=0)),
            tokens_padded=tokens < layout.rows * layout.length,
            document_token=int32(self.document_token),
            document_length=int32(self.document_length),
            document_chunk=int32(self.document_chunk),
            document_row=int32(self.document_row),
            chunk_token=int32(self.chunk_token),
            chunk_length=int32(self.chunk_length),
            chunk_tile=int32(np.concatenate([[0], np.cumsum(counts)])),
            tile_chunk=int32(tile_chunk),
            tile_first=int32(self.block_token[order][opens]),
            tile_count=int32(tile_count),
            tile_token=int32(tile_token, tiles, size),
            tile_anchor=int32(tile_anchor, tiles, size),
            tile_start=int32(tile_start, tiles, size),
            tile_stop=int32(tile_stop, tiles, size),
        )
