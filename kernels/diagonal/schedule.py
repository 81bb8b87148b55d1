"""The schedule of diagonal recurrences (selective scan, gated recurrence): a walk along the row, and blocks beside it.

A diagonal recurrence needs no matrix products, so nothing is won by restarting chunks at documents as linear attention
does: all rows walk their clean slots together, and a document starts by forgetting the state. Chunks of `chunk_size`
slots bound what is kept at a time. The blocks that start from a state of a chunk are walked right after it, side by
side: panels of blocks with the same readout, sorted by chunk.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flarec.base.flat import Schedule, flat_input
from flarec.errors import LayoutError
from flarec.layout import CAUSAL, PADDING, Layout

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
CHUNK_SIZE = 32
PANEL_VIEWS = 4  # a panel holds at most that many times the tokens of a chunk
ZERO = -1  # a block that starts from zero


@flat_input
@dataclass(frozen=True)
class Panel:
    """Blocks begin..end of the schedule: they start from states of one chunk (`fresh`: from zero), read alike and have
    at most `longest` tokens; `padded` says that some have fewer."""

    chunk: int
    begin: int
    end: int
    longest: int
    fresh: bool
    causal: bool
    padded: bool


@flat_input
@dataclass(frozen=True)
class ScanSchedule(Schedule):
    """Index tensors of one layout, n blocks of at most S tokens.

    panels         per chunk of `chunk_size` clean slots its panels; rows without clean slots have one empty chunk
    reset_ranges   per chunk: begin and end of its entries in reset_slot, reset_row
    padding        [B, Lc] bool: clean slots without a token; clean_padded: whether there is any
    reset_slot, reset_row [r]: clean slots at which a document starts from zero, in slot order
    block_token    [n, S]  flat token index row * T + slot; B * T where the block has no token
    block_row      [n]
    block_entry    [n]  state that the block starts from: e for the state after e clean slots of its row (0: the initial
                        state of document 0), or ZERO
    """

    rows: int
    length: int
    clean_length: int
    chunk_size: int
    panels: tuple[tuple[Panel, ...], ...]
    reset_ranges: tuple[tuple[int, int], ...]
    clean_padded: bool
    padding: Tensor
    reset_slot: Tensor
    reset_row: Tensor
    block_token: Tensor
    block_row: Tensor
    block_entry: Tensor

    @property
    def chunks(self) -> int:
        return len(self.panels)

    def bounds(self, chunk: int) -> tuple[int, int]:
        """First clean slot of a chunk, and one past its last."""
        return chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, self.clean_length)

    @staticmethod
    def from_layout(layout: Layout, chunk_size: int | None = CHUNK_SIZE) -> ScanSchedule:
        """Derive the schedule on the host and move it to the layout's device; chunk_size None: one chunk per row.

        Raises `LayoutError` for a block that is anchored outside its document's clean tokens (before the cache ends,
        or behind the last clean token).
        """
        if chunk_size is None:
            chunk_size = max(CHUNK_SIZE, layout.clean_length)
        return _build(layout, chunk_size).to(layout.device)


def _build(layout: Layout, chunk_size: int) -> ScanSchedule:
    host = {f.name: getattr(layout, f.name).cpu().numpy() for f in fields(layout)}
    clean, length, rows = layout.clean_length, layout.length, layout.rows
    padding = host["clean_document"] == PADDING

    # document 0 goes on from the initial state, which is zero at its start
    starts = (host["clean_document"] > 0) & (host["clean_position"] == 0)
    starts[:, 1:] |= (host["clean_document"][:, 1:] == 0) & (host["clean_position"][:, 1:] == 0)
    reset_slot, reset_row = np.nonzero(starts.T)
    chunks = max(1, -(-clean // chunk_size))
    borders = np.searchsorted(reset_slot, np.arange(chunks + 1) * chunk_size)

    row, first, count, entry, causal = _blocks(layout, host)
    chunk = np.maximum(entry - 1, 0) // chunk_size
    order = np.lexsort((np.arange(len(row)), causal, entry == ZERO, chunk))
    row, first, count, entry, chunk = (x[order] for x in (row, first, count, entry, chunk))
    causal = causal[order]
    longest = int(count.max(initial=1))
    offset = np.arange(longest)
    token = np.where(offset < count[:, None], (row * length + clean + first)[:, None] + offset, rows * length)
    return ScanSchedule(
        rows=rows,
        length=length,
        clean_length=clean,
        chunk_size=chunk_size,
        panels=_panels(chunks, chunk, entry == ZERO, causal, count, PANEL_VIEWS * rows * chunk_size),
        reset_ranges=tuple((int(a), int(b)) for a, b in itertools.pairwise(borders)),
        clean_padded=bool(padding.any()),
        padding=torch.from_numpy(padding),
        reset_slot=torch.from_numpy(reset_slot),
        reset_row=torch.from_numpy(reset_row),
        block_token=torch.from_numpy(token),
        block_row=torch.from_numpy(row),
        block_entry=torch.from_numpy(entry),
    )


def _blocks(layout: Layout, host: dict[str, IntArray]) -> tuple[IntArray, IntArray, IntArray, IntArray, BoolArray]:
    """Blocks in slot order: row, first noisy slot, number of tokens, entry state, causal readout."""
    noisy = host["noisy_block"]
    row, slot = np.nonzero(noisy != PADDING)
    block = noisy[row, slot]
    begins = np.ones(len(row), dtype=bool)
    begins[1:] = (row[1:] != row[:-1]) | (block[1:] != block[:-1])
    place = np.flatnonzero(begins)
    count = np.diff(place, append=len(row))
    row, first, index = row[place], slot[place], block[place]
    document, anchor = host["block_document"][row, index], host["block_anchor"][row, index]

    # clean slot of a document's position 0 (before the row if it is cached), and the clean tokens known of it
    documents = 1 + max(int(host["clean_document"].max(initial=0)), int(document.max(initial=0)))
    cached = host["cached"]
    origin, end = np.zeros((2, layout.rows, documents), dtype=np.int64)
    origin[:, 0], end[:, 0] = -cached, cached
    clean_row, clean_slot = np.nonzero(host["clean_document"] != PADDING)
    clean_document = host["clean_document"][clean_row, clean_slot]
    clean_position = host["clean_position"][clean_row, clean_slot]
    origin[clean_row, clean_document] = clean_slot - clean_position
    np.maximum.at(end, (clean_row, clean_document), clean_position + 1)
    known = np.where(document == 0, cached[row], 0)
    wrong = (anchor < known) | (anchor > end[row, document])
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise LayoutError(
            f"row {row[i]}: a block of document {document[i]} is anchored at {anchor[i]}; its state is known from "
            f"position {known[i]} to {end[row[i], document[i]]} only"
        )
    entry = origin[row, document] + anchor
    entry[(anchor == 0) & (entry > 0)] = ZERO
    entry[(anchor == 0) & (document > 0)] = ZERO
    return row, first, count, entry, host["block_readout"][row, index] == CAUSAL


def _panels(
    chunks: int, chunk: IntArray, fresh: BoolArray, causal: BoolArray, count: IntArray, most: int
) -> tuple[tuple[Panel, ...], ...]:
    """Split the sorted blocks where chunk, start or readout changes, and where a panel would exceed `most` tokens."""
    kind = np.stack([chunk, fresh, causal])
    changes = np.flatnonzero((np.diff(kind, axis=1) != 0).any(axis=0)) + 1
    panels: list[list[Panel]] = [[] for _ in range(chunks)]
    for group in np.split(np.arange(len(chunk)), changes):
        size = max(1, most // int(count[group].max(initial=1)))
        for part in np.split(group, range(size, len(group), size)):
            if len(part) == 0:
                continue
            begin, end = int(part[0]), int(part[-1]) + 1
            longest = int(count[part].max())
            padded = bool((count[part] < longest).any())
            home = int(chunk[begin])
            panels[home].append(Panel(home, begin, end, longest, bool(fresh[begin]), bool(causal[begin]), padded))
    return tuple(tuple(group) for group in panels)
