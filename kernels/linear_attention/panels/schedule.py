"""The state schedule: the chunks, boundary states and noisy rows of a layout, as index tensors shared by all layers.

Chunks of `chunk_size` clean tokens restart at every document. Chunks are numbered step by step: first every document's
chunk 0, then every chunk 1, ..., with the documents that have most chunks first, so that the state recurrence is one
loop over contiguous slices: step i covers `step_counts[i]` chunks, and its documents are a prefix of those of step
i-1.

A noisy block belongs to the chunk that holds clean token anchor-1 (anchor at the document's start: its first chunk).
The blocks of a chunk fill panels of `panel_slots` slots; a slot is `block_size` rows, so a panel is a dense matrix
and a block is a fixed small square on its diagonal. Several slots form a tile, the unit of the products inside blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flarec.base.flat import Schedule, flat_input
from flarec.errors import LayoutError
from flarec.layout import CAUSAL, Layout

IntArray = npt.NDArray[np.int64]
TILE_ROWS = 16
MAX_PANEL_ROWS = 256


@dataclass(frozen=True)
class HeadIndex:
    """Row gathers between token-major [B*T*heads, D] and the schedule's rows [N*H*C + M*H*R, D] (chunks, then panels).

    value [rows]: gather for tensors with H heads; key [rows]: for tensors with Hk heads; padding [n]: the rows
    without a token (their gather index is 0); token [B*T*H]: the way back (0 where the token is padding).
    """

    value: Tensor
    key: Tensor
    padding: Tensor
    token: Tensor


@flat_input
@dataclass(frozen=True)
class StateSchedule(Schedule):
    """Index tensors of one layout. N chunks of C clean rows, M panels of R = panel_slots * block_size noisy rows.

    clean_token   [N, C]   flat token index row * T + slot, -1 where the chunk has no token
    panel_token   [M, R]   the same for noisy rows
    panel_chunk   [M]      chunk whose tokens and entry state the panel reads
    panel_anchor  [M, R]   clean tokens of that chunk that the row's block reads, 0..C
    panel_causal  [M, R]   bool: the row reads its block up to itself (else the whole block)
    token_group, token_local, token_stride [B*T]: head h of H of a token is row group * H + h * stride + local
    token_padding [B*T, 1] bool
    first_chunk, first_row [n]: chunks that start document 0 of a row, and that row (where an initial state enters)
    """

    rows: int
    length: int
    chunk_size: int
    block_size: int
    tile_slots: int
    panel_slots: int
    step_counts: tuple[int, ...]
    rows_padded: bool
    tokens_padded: bool
    clean_token: Tensor
    panel_token: Tensor
    panel_chunk: Tensor
    panel_anchor: Tensor
    panel_causal: Tensor
    token_group: Tensor
    token_local: Tensor
    token_stride: Tensor
    token_padding: Tensor
    first_chunk: Tensor
    first_row: Tensor
    derived: dict[object, object] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What layers share, by use."""

    @property
    def chunks(self) -> int:
        return self.clean_token.shape[0]

    @property
    def panels(self) -> int:
        return self.panel_token.shape[0]

    @property
    def panel_rows(self) -> int:
        return self.panel_slots * self.block_size

    @property
    def tile_rows(self) -> int:
        return self.tile_slots * self.block_size

    def heads(self, value_heads: int, key_heads: int) -> HeadIndex:
        """Gathers for these head counts, computed once."""
        known = self.derived.get((value_heads, key_heads))
        if isinstance(known, HeadIndex):
            return known
        head = torch.arange(value_heads, device=self.clean_token.device)
        source = [t.clamp_min(0)[:, None, :] for t in (self.clean_token, self.panel_token)]
        empty = [(t < 0)[:, None, :].expand(-1, value_heads, -1) for t in (self.clean_token, self.panel_token)]
        key_head = head // (value_heads // key_heads)
        index = HeadIndex(
            value=torch.cat([(s * value_heads + head[:, None]).reshape(-1) for s in source]),
            key=torch.cat([(s * key_heads + key_head[:, None]).reshape(-1) for s in source]),
            padding=torch.cat([e.reshape(-1) for e in empty]).nonzero().squeeze(1),
            token=torch.where(
                self.token_padding,
                0,
                (self.token_group * value_heads + self.token_local)[:, None] + self.token_stride[:, None] * head,
            ).reshape(-1),
        )
        self.derived[value_heads, key_heads] = index
        return index

    @staticmethod
    def from_layout(layout: Layout, chunk_size: int = 64) -> StateSchedule:
        """Derive the schedule on the host and move it to the layout's device. Short documents get a smaller chunk.

        Raises `LayoutError` for a block that is anchored outside its document's clean tokens (before the cache ends,
        or behind the last clean token).
        """
        return _Builder(layout, chunk_size).build().to(layout.device)


def _panel_shapes(most: int, block_size: int) -> list[tuple[int, int]]:
    """(slots per panel, slots per tile) worth considering when the fullest chunk has `most` blocks."""
    usual = max(1, TILE_ROWS // block_size)
    tiles = max(1, -(-most // usual))
    fitted = max(1, -(-most // tiles))  # the fullest chunk in one panel, with as little padding as equal tiles allow
    most_tiles = max(1, MAX_PANEL_ROWS // (usual * block_size))
    shapes = [(usual * count, usual) for count in range(1, min(tiles, most_tiles) + 1)]
    return [*shapes, (fitted * tiles, fitted)] if tiles <= most_tiles else shapes


class _Builder:
    """Host-side derivation with numpy; names follow the class above. Documents are numbered row * stride + document."""

    def __init__(self, layout: Layout, chunk_size: int) -> None:
        host = {f.name: getattr(layout, f.name).cpu().numpy() for f in fields(layout)}
        self.rows, self.clean_length, self.length = layout.rows, layout.clean_length, layout.length
        self.clean_document: IntArray = host["clean_document"]
        self.clean_position: IntArray = host["clean_position"]
        self.cached: IntArray = host["cached"]
        self._find_blocks(host)
        self.stride = 1 + max(int(self.clean_document.max(initial=0)), int(self.document.max(initial=0)))
        self._find_documents(chunk_size)

    def _find_blocks(self, host: dict[str, IntArray]) -> None:
        """Blocks in slot order: row, first noisy slot, length, document, anchor, readout."""
        noisy = host["noisy_block"]
        row, slot = np.nonzero(noisy >= 0)
        block = noisy[row, slot]
        starts = np.ones(len(row), dtype=bool)
        starts[1:] = (row[1:] != row[:-1]) | (block[1:] != block[:-1])
        first = np.flatnonzero(starts)
        self.block_row, self.block_slot = row[first], slot[first]
        self.block_length = np.diff(first, append=len(row))
        index = block[first]
        self.document = host["block_document"][self.block_row, index]
        self.anchor = host["block_anchor"][self.block_row, index]
        self.causal = host["block_readout"][self.block_row, index] == CAUSAL

    def _find_documents(self, chunk_size: int) -> None:
        row, slot = np.nonzero(self.clean_document >= 0)
        self.clean_flat = row * self.length + slot
        self.clean_key = row * self.stride + self.clean_document[row, slot]
        self.block_key = self.block_row * self.stride + self.document
        keys = self.rows * self.stride
        clean_tokens = np.bincount(self.clean_key, minlength=keys)
        exists = clean_tokens > 0
        exists[self.block_key] = True
        self.start = np.zeros(keys, dtype=np.int64)  # document position of the first clean token of this layout
        self.start[:: self.stride] = self.cached
        self.clean_local = self.clean_position[row, slot] - self.start[self.clean_key]
        self.block_local = self.anchor - self.start[self.block_key]
        wrong = (self.block_local < 0) | (self.block_local > clean_tokens[self.block_key])
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            key = self.block_key[i]
            low, high = int(self.start[key]), int(self.start[key] + clean_tokens[key])
            raise LayoutError(
                f"row {self.block_row[i]}: a block of document {self.document[i]} is anchored at {self.anchor[i]}; "
                f"its state is known from position {low} to {high} only"
            )
        self.chunk_size = max(1, min(chunk_size, int(clean_tokens.max(initial=0))))
        documents = np.flatnonzero(exists)
        chunks = np.maximum(1, -(-clean_tokens[documents] // self.chunk_size))
        order = np.argsort(-chunks, kind="stable")
        self.documents, chunks = documents[order], chunks[order]
        self.rank = np.zeros(keys, dtype=np.int64)
        self.rank[self.documents] = np.arange(len(documents))
        steps = int(chunks.max(initial=0))
        self.counts = len(documents) - np.searchsorted(chunks[::-1], np.arange(steps), side="right")
        self.step_offset = np.concatenate([[0], np.cumsum(self.counts)])

    def _panels(self, block_chunk: IntArray) -> None:
        """Choose slots per panel and place every block: panel, slot."""
        per_chunk = np.bincount(block_chunk, minlength=int(self.step_offset[-1]))
        most = int(per_chunk.max(initial=0))
        self.block_size = int(self.block_length.max(initial=1))
        candidates = _panel_shapes(most, self.block_size)

        def work(candidate: tuple[int, int]) -> tuple[int, int]:
            """Rows of all panels, and of the chunk copies that they multiply with."""
            panels = int((-(-per_chunk // candidate[0])).sum())
            return panels * (candidate[0] * self.block_size + self.chunk_size), -candidate[1]

        self.panel_slots, self.tile_slots = min(candidates, key=work)
        per_panel = -(-per_chunk // self.panel_slots)
        self.panel_chunk = np.repeat(np.arange(len(per_chunk)), per_panel)
        order = np.argsort(block_chunk, kind="stable")
        rank = np.zeros(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - (np.cumsum(per_chunk) - per_chunk)[block_chunk[order]]
        self.block_panel = (np.cumsum(per_panel) - per_panel)[block_chunk] + rank // self.panel_slots
        self.block_place = rank % self.panel_slots

    def build(self) -> StateSchedule:
        size, chunks = self.chunk_size, int(self.step_offset[-1])
        clean_row = (
            self.step_offset[self.clean_local // size] + self.rank[self.clean_key]
        ) * size + self.clean_local % size
        step = np.maximum(self.block_local - 1, 0) // size
        block_chunk = self.step_offset[step] + self.rank[self.block_key]
        self._panels(block_chunk)

        # rows of blocks: block index and offset of every noisy token, in slot order
        block = np.repeat(np.arange(len(self.block_length)), self.block_length)
        offset = np.arange(len(block)) - np.repeat(np.cumsum(self.block_length) - self.block_length, self.block_length)
        flat = self.block_row[block] * self.length + self.clean_length + self.block_slot[block] + offset
        panel_rows, panels = self.panel_slots * self.block_size, len(self.panel_chunk)
        noisy_local = self.block_place[block] * self.block_size + offset
        noisy_row = self.block_panel[block] * panel_rows + noisy_local

        clean_token = np.full(chunks * size, -1, dtype=np.int64)
        clean_token[clean_row] = self.clean_flat
        panel_token = np.full(panels * panel_rows, -1, dtype=np.int64)
        panel_token[noisy_row] = flat
        panel_anchor = np.zeros(panels * panel_rows, dtype=np.int64)
        panel_anchor[noisy_row] = (self.block_local - step * size)[block]
        panel_causal = np.zeros(panels * panel_rows, dtype=bool)
        panel_causal[noisy_row] = self.causal[block]

        tokens = self.rows * self.length
        group, local, stride = (np.zeros(tokens, dtype=np.int64) for _ in range(3))
        real = np.zeros(tokens, dtype=bool)
        local[self.clean_flat], stride[self.clean_flat], real[self.clean_flat] = clean_row % size, size, True
        group[self.clean_flat] = clean_row - clean_row % size
        local[flat], stride[flat], real[flat] = noisy_local, panel_rows, True
        group[flat] = chunks * size + noisy_row - noisy_local
        first = np.flatnonzero(self.documents % self.stride == 0)
        return StateSchedule(
            rows=self.rows,
            length=self.length,
            chunk_size=size,
            block_size=self.block_size,
            tile_slots=self.tile_slots,
            panel_slots=self.panel_slots,
            step_counts=tuple(int(count) for count in self.counts),
            rows_padded=bool((clean_token < 0).any() or (panel_token < 0).any()),
            tokens_padded=not bool(real.all()),
            clean_token=torch.from_numpy(clean_token).reshape(chunks, size),
            panel_token=torch.from_numpy(panel_token).reshape(panels, panel_rows),
            panel_chunk=torch.from_numpy(self.panel_chunk),
            panel_anchor=torch.from_numpy(panel_anchor).reshape(panels, panel_rows),
            panel_causal=torch.from_numpy(panel_causal).reshape(panels, panel_rows),
            token_group=torch.from_numpy(group),
            token_local=torch.from_numpy(local),
            token_stride=torch.from_numpy(stride),
            token_padding=torch.from_numpy(~real)[:, None],
            first_chunk=torch.from_numpy(first),
            first_row=torch.from_numpy(self.documents[first] // self.stride),
        )
