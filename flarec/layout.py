"""The layout: where clean and noisy tokens sit. One type for training, prefill, denoising and draft-and-verify.

A layout describes a batch of rows. A row has `Lc` clean slots followed by `Ln` noisy slots; the lowered graph sees them
concatenated, `T = Lc + Ln`, clean first. Slots may be padding. Everything else (position ids, softmax mask, conv
windows, state schedule, targets) is derived from the layout. Contract: docs/semantics.md sections 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base.flat import flat_input, sent
from .errors import LayoutError

BLOCK_END = 0
CAUSAL = 1
READOUTS = {"block_end": BLOCK_END, "causal": CAUSAL}
PADDING = -1


@dataclass(frozen=True)
class Block:
    """One noisy block, for building layouts by hand.

    `anchor` is the document position of the first token = number of clean tokens of the document it may read.
    """

    document: int
    anchor: int
    length: int
    view: int = 0
    readout: str = "block_end"


@flat_input
@dataclass(frozen=True)
class Layout:
    """A batch of rows. All tensors are int64 on one device; -1 marks padding.

    clean_document  [rows, Lc]      document index inside the row
    clean_position  [rows, Lc]      position inside the document (0 on padding)
    noisy_block     [rows, Ln]      index into the block axis
    noisy_position  [rows, Ln]      position inside the document (0 on padding)
    block_document  [rows, blocks]  document index
    block_anchor    [rows, blocks]  document position of the block's first token
    block_view      [rows, blocks]  which masking of the response the block belongs to
    block_readout   [rows, blocks]  BLOCK_END or CAUSAL
    cached          [rows]          clean tokens of document 0 that are in the cache already (0 in training)

    Clean tokens of one document are consecutive slots with consecutive positions, starting at 0 (document 0 of a row
    with a cache: at `cached`). Tokens of one block are consecutive slots at positions anchor, anchor+1, ... Padding
    comes last.
    """

    clean_document: Tensor
    clean_position: Tensor
    noisy_block: Tensor
    noisy_position: Tensor
    block_document: Tensor
    block_anchor: Tensor
    block_view: Tensor
    block_readout: Tensor
    cached: Tensor

    @property
    def rows(self) -> int:
        return self.clean_document.shape[0]

    @property
    def clean_length(self) -> int:
        return self.clean_document.shape[1]

    @property
    def noisy_length(self) -> int:
        return self.noisy_block.shape[1]

    @property
    def length(self) -> int:
        """Tokens per row of the lowered graph, T = Lc + Ln."""
        return self.clean_length + self.noisy_length

    @property
    def blocks(self) -> int:
        return self.block_document.shape[1]

    @property
    def device(self) -> torch.device:
        return self.clean_document.device

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def longest_block(self) -> int | None:
        """Tokens of the longest noisy block, where the host knows it."""
        return None

    def to(self, device: torch.device | str) -> Layout:
        """Itself where it is there; nobody waits for its way to a GPU (`sent`)."""
        tensors = self.tensors()
        moved = [sent(tensor, device) for tensor in tensors]
        if all(there is here for there, here in zip(moved, tensors, strict=True)):
            return self
        return type(self)(*moved)

    def position_ids(self) -> Tensor:
        """[rows, T] int64: position of every token inside its document; 0 on padding (rotary input)."""
        return torch.cat([self.clean_position, self.noisy_position], dim=1)

    def per_noisy(self, block_values: Tensor) -> Tensor:
        """Spread a per-block tensor [rows, blocks] over noisy tokens: [rows, Ln]; padding slots get block 0's value."""
        if self.blocks == 0:
            return block_values.new_zeros(self.rows, self.noisy_length)
        return block_values.gather(1, self.noisy_block.clamp_min(0))

    def token_document(self) -> Tensor:
        """[rows, T] int64: document of every clean and noisy token, -1 on padding."""
        noisy = self.per_noisy(self.block_document).masked_fill(self.noisy_block < 0, PADDING)
        return torch.cat([self.clean_document, noisy], dim=1)

    def validate(self) -> Layout:
        """Raise `LayoutError` if the layout contradicts the class docstring; returns itself."""
        for row in range(self.rows):
            _validate_row(self, row)
        return self


@dataclass(frozen=True)
class SharedDerivations:
    """What is derived once for all steps of a shape, since it does not depend on how many tokens are cached.

    layout: of one such step, far from the start of its documents or as far as all of them; where its numbers are known
    on the host it is there. built: by derivation.
    """

    layout: Layout
    built: dict[object, Any] = field(default_factory=dict)


@flat_input
@dataclass(frozen=True)
class StepLayout(Layout):
    """The layout of a decode step whose blocks all take up the same number of slots.

    kept: of steps whose blocks stand at the same places behind the cached tokens; positions: of all its tokens, where
    they are known; host: the same layout on the host, where its numbers are known there, so that nobody reads them from
    the device; overwrites: nobody reads the states of the cache any more once the step has read them, so that the next
    ones may take their place. No leaves of the structure.
    """

    kept: ClassVar[SharedDerivations | None] = None
    positions: ClassVar[Tensor | None] = None
    host: ClassVar[Layout | None] = None
    overwrites: ClassVar[bool] = False

    def keeping(self, kept: SharedDerivations, positions: Tensor) -> StepLayout:
        """Itself, with what is kept, and `position_ids` [rows, T]."""
        object.__setattr__(self, "kept", kept)  # frozen, and a field would be an input of graphs
        object.__setattr__(self, "positions", positions)
        return self

    def known(self, host: Layout, kept: SharedDerivations) -> StepLayout:
        """Itself, with the same layout on the host, and what is kept."""
        object.__setattr__(self, "host", host)
        object.__setattr__(self, "kept", kept)
        return self

    def overwriting(self) -> StepLayout:
        """Itself, of a step that may overwrite states."""
        object.__setattr__(self, "overwrites", True)
        return self

    def position_ids(self) -> Tensor:
        return super().position_ids() if self.positions is None else self.positions

    @property
    def longest_block(self) -> int | None:
        return self.noisy_length // self.blocks if self.blocks else 1


def _validate_row(layout: Layout, row: int) -> None:
    documents = layout.clean_document[row].tolist()
    positions = layout.clean_position[row].tolist()
    cached = int(layout.cached[row])
    length: dict[int, int] = {0: cached} if cached else {}
    previous = None
    for slot, (document, position) in enumerate(zip(documents, positions, strict=True)):
        if document == PADDING:
            if any(d != PADDING for d in documents[slot:]):
                raise LayoutError(f"row {row}: clean padding at slot {slot} is followed by tokens; put padding last")
            break
        if document != previous and document in length and not (document == 0 and cached and previous is None):
            raise LayoutError(f"row {row}: document {document} is not contiguous at clean slot {slot}")
        expected = length.get(document, 0)
        if position != expected:
            raise LayoutError(
                f"row {row}: clean slot {slot} of document {document} has position {position}, expected {expected}"
            )
        length[document] = expected + 1
        previous = document
    seen: set[int] = set()
    last, offset = None, 0
    for slot, block in enumerate(layout.noisy_block[row].tolist()):
        if block == PADDING:
            if bool((layout.noisy_block[row, slot:] != PADDING).any()):
                raise LayoutError(f"row {row}: noisy padding at slot {slot} is followed by tokens; put padding last")
            break
        if block != last:
            if block in seen:
                raise LayoutError(f"row {row}: block {block} is not contiguous at noisy slot {slot}")
            seen.add(block)
            last, offset = block, 0
            document, anchor = int(layout.block_document[row, block]), int(layout.block_anchor[row, block])
            if document == 0 and anchor < cached:
                raise LayoutError(
                    f"row {row}: block {block} is anchored at {anchor}, before the cached {cached} tokens; no state is "
                    "kept there"
                )
            if not 0 <= anchor <= length.get(document, 0):
                raise LayoutError(
                    f"row {row}: block {block} is anchored at {anchor}, but document {document} has "
                    f"{length.get(document, 0)} clean tokens"
                )
        if int(layout.noisy_position[row, slot]) != int(layout.block_anchor[row, block]) + offset:
            raise LayoutError(f"row {row}: noisy slot {slot} is not at its block's anchor plus {offset}")
        offset += 1


def build_layout(
    documents: Sequence[Sequence[int]],
    blocks: Sequence[Sequence[Block]],
    *,
    cached: Sequence[int] | None = None,
    clean_length: int | None = None,
    noisy_length: int | None = None,
    device: torch.device | str = "cpu",
) -> Layout:
    """Build a layout from Python lists.

    documents[row] = lengths of the row's documents (clean tokens in this layout, not counting cached ones);
    blocks[row] = its noisy blocks, in slot order; cached[row] = cached clean tokens of document 0.
    Rows are right-padded to the longest row, or to `clean_length` / `noisy_length`.
    """
    rows = len(documents)
    cached = list(cached) if cached is not None else [0] * rows
    lc = max([sum(d) for d in documents], default=0)
    ln = max([sum(b.length for b in row) for row in blocks], default=0)
    if clean_length is not None:
        if clean_length < lc:
            raise LayoutError(f"clean_length {clean_length} is smaller than the longest row ({lc} clean tokens)")
        lc = clean_length
    if noisy_length is not None:
        if noisy_length < ln:
            raise LayoutError(f"noisy_length {noisy_length} is smaller than the longest row ({ln} noisy tokens)")
        ln = noisy_length
    nb = max([len(row) for row in blocks], default=0)

    def pad(values: list[int], length: int, fill: int) -> list[int]:
        return values + [fill] * (length - len(values))

    columns: dict[str, list[list[int]]] = {field.name: [] for field in fields(Layout) if field.name != "cached"}
    for row in range(rows):
        doc_ids, doc_pos = [], []
        for index, size in enumerate(documents[row]):
            start = cached[row] if index == 0 else 0
            doc_ids += [index] * size
            doc_pos += list(range(start, start + size))
        noisy_ids, noisy_pos = [], []
        for index, block in enumerate(blocks[row]):
            noisy_ids += [index] * block.length
            noisy_pos += list(range(block.anchor, block.anchor + block.length))
        columns["clean_document"].append(pad(doc_ids, lc, PADDING))
        columns["clean_position"].append(pad(doc_pos, lc, 0))
        columns["noisy_block"].append(pad(noisy_ids, ln, PADDING))
        columns["noisy_position"].append(pad(noisy_pos, ln, 0))
        columns["block_document"].append(pad([b.document for b in blocks[row]], nb, PADDING))
        columns["block_anchor"].append(pad([b.anchor for b in blocks[row]], nb, 0))
        columns["block_view"].append(pad([b.view for b in blocks[row]], nb, PADDING))
        columns["block_readout"].append(pad([READOUTS[b.readout] for b in blocks[row]], nb, BLOCK_END))
    widths = {"clean": lc, "noisy": ln, "block": nb}
    tensors = {
        name: torch.tensor(values, dtype=torch.int64).reshape(rows, widths[name.split("_")[0]])
        for name, values in columns.items()
    }
    layout = Layout(**tensors, cached=torch.tensor(cached, dtype=torch.int64))
    return layout.to(device)
