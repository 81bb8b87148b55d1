"""Where the chunk form of the generalised delta rule finds its rows: clean slots in chunks, blocks beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import Schedule, flat_input
from flarec.errors import LayoutError
from flarec.layout import CAUSAL, PADDING, Layout

CHUNK_SIZE = 16


@flat_input
@dataclass(frozen=True)
class DeltaSchedule(Schedule):
    """Index tensors of one layout: N chunks of C clean slots per row, n blocks of at most S tokens.

    Tokens are flat, row * T + slot; B * T stands for no token.

    chunk_token     [B, N, C]  padding is no token
    chunk_document  [B, N, C]  document of a slot, PADDING without one
    chunk_before    [B, N]     document that goes on at the start of a chunk; of chunk 0 document 0
    block_token     [n, S]
    block_chunk     [n]        flat chunk, row * N + chunk, on whose way the block starts
    block_inside    [n]        clean slots of that chunk before it
    block_document  [n]        PADDING for a block that starts from zero
    block_causal    [n] bool
    """

    rows: int
    length: int
    clean_length: int
    chunk_token: Tensor
    chunk_document: Tensor
    chunk_before: Tensor
    block_token: Tensor
    block_chunk: Tensor
    block_inside: Tensor
    block_document: Tensor
    block_causal: Tensor

    @staticmethod
    def from_layout(layout: Layout, chunk_size: int = CHUNK_SIZE) -> DeltaSchedule:
        """Derive the schedule on the host and move it to the layout's device.

        Raises `LayoutError` for a block that is anchored outside its document's clean tokens (before the cache ends,
        or behind the last clean token).
        """
        return _build(layout.to("cpu"), chunk_size).to(layout.device)


def _build(layout: Layout, size: int) -> DeltaSchedule:
    rows, length, clean = layout.rows, layout.length, layout.clean_length
    chunks = max(1, -(-clean // size))
    document = torch.full((rows, chunks * size), PADDING)
    document[:, :clean] = layout.clean_document
    token = torch.arange(rows)[:, None] * length + torch.arange(chunks * size)
    token = token.masked_fill(document == PADDING, rows * length)
    before = torch.zeros(rows, chunks, dtype=torch.int64)
    before[:, 1:] = document[:, size - 1 : -1 : size]

    blocks = [_block(layout, row, block) for row in range(rows) for block in layout.noisy_block[row].unique().tolist()]
    found = [block for block in blocks if block is not None]
    longest = max((len(slots) for slots, *_ in found), default=1)
    block_token = torch.full((len(found), longest), rows * length)
    for place, (slots, row, *_) in enumerate(found):
        block_token[place, : len(slots)] = row * length + clean + slots
    of_row, entry, own, causal = (torch.tensor(part, dtype=torch.int64) for part in _columns(found))
    chunk = (entry - 1).clamp_min(0) // size
    return DeltaSchedule(
        rows=rows,
        length=length,
        clean_length=clean,
        chunk_token=token.view(rows, chunks, size),
        chunk_document=document.view(rows, chunks, size),
        chunk_before=before,
        block_token=block_token,
        block_chunk=of_row * chunks + chunk,
        block_inside=entry - chunk * size,
        block_document=own,
        block_causal=causal.bool(),
    )


_Found = tuple[Tensor, int, int, int, bool]


def _columns(found: list[_Found]) -> tuple[list[int], list[int], list[int], list[bool]]:
    return [f[1] for f in found], [f[2] for f in found], [f[3] for f in found], [f[4] for f in found]


def _block(layout: Layout, row: int, block: int) -> _Found | None:
    """(noisy slots, row, clean slots of the row before the block, document or PADDING for zero, causal readout)."""
    if block == PADDING:
        return None
    slots = (layout.noisy_block[row] == block).nonzero().squeeze(1)
    document, anchor = int(layout.block_document[row, block]), int(layout.block_anchor[row, block])
    causal = int(layout.block_readout[row, block]) == CAUSAL
    known = int(layout.cached[row]) if document == 0 else 0
    if anchor == known:
        return slots, row, 0, document if document == 0 else PADDING, causal
    last = (layout.clean_document[row] == document) & (layout.clean_position[row] == anchor - 1)
    if anchor < known or not bool(last.any()):
        raise LayoutError(
            f"row {row}: a block of document {document} is anchored at {anchor}, where its state is not known (it is "
            f"from position {known} to the last clean token only)"
        )
    return slots, row, int(last.nonzero()[0]) + 1, document, causal
