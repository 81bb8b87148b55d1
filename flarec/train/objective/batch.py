"""From packed rows to the tensors of a forward pass: ids, layout, the rows that need logits, and their targets.

Contract: docs/semantics.md sections 1 and 3. A response of R tokens at document positions p .. p+R-1 has R AR targets
(clean rows p-1 .. p+R-2) and R-1 diffusion targets (noisy rows p .. p+R-2), each row predicting the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...decode.noise_ids import Ranges, pool_of
from ...errors import DataError
from ...layout import BLOCK_END, PADDING, Layout
from ...recipe.diffusion import Diffusion
from ..data.document import PackedRow
from .grid import Copies, Grid, lay_grids
from .kinds import COMPARING
from .noise import Noise, draw_noise


@dataclass(frozen=True)
class Batch:
    """One forward pass. `T = Lc + Ln` tokens per row, `N` rows with logits, `Na` AR targets, `Nd` diffusion signals.

    input_ids         [rows, T] int64  clean ids, then noisy ids (where masked the mask token, or an id at random); 0
                                       on padding
    head_rows         [N] int64        flat indices row * T + slot of the tokens whose logits are needed; sorted, unique
    ar_index          [Na] int64       into the head_rows axis
    ar_target         [Na] int64       token ids
    noisy_index       [Nd] int64       into the head_rows axis
    noisy_target      [Nd] int64       token ids
    noisy_weight      [Nd] float32     1 / number of signals of the same target
    noisy_loss        [Nd] int64       into `kinds.LOSSES`
    until_fail        [Nd] bool        multiplied with the weight of its slot (`kernels.row_losses.slot_weights`)
    teacher_index     [Nd] int64       into the head_rows axis: the clean row that predicts the same token
    slot              [Nd] int64       offset of the predicting row in its block
    all_masked_index  [Nm] int64       into the Nd axis: the signals of fully masked blocks (what decoding sees)
    blocks            [n, B] int64     the same by block and slot, -1 behind the last; blocks without any are left out
    `B` is the length of the longest block.
    """

    input_ids: Tensor
    layout: Layout
    head_rows: Tensor
    ar_index: Tensor
    ar_target: Tensor
    noisy_index: Tensor
    noisy_target: Tensor
    noisy_weight: Tensor
    noisy_loss: Tensor
    until_fail: Tensor
    teacher_index: Tensor
    slot: Tensor
    all_masked_index: Tensor
    blocks: Tensor
    block_size: int
    ar_count: int
    """AR targets."""
    diffusion_count: int
    """Diffusion targets = the sum of their signals' weights."""
    losses: tuple[str, ...]
    """Those of its noisy blocks."""
    weighs_slots: bool
    """Whether any signal is multiplied with the weight of its slot."""
    clean_tokens: int
    """Clean tokens without padding."""
    noisy_tokens: int
    """Noisy tokens without padding slots."""

    @property
    def compares(self) -> bool:
        """Whether a loss needs the distance of every pair."""
        return any(name in COMPARING for name in self.losses)

    @property
    def chained(self) -> bool:
        """Whether a signal's loss depends on the earlier slots of its block."""
        return self.weighs_slots or "el" in self.losses

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in values.items():
            values[name] = value.to(device) if isinstance(value, (Tensor, Layout)) else value
        return Batch(**values)


def build_batch(
    rows: Sequence[PackedRow],
    diffusion: Diffusion,
    mask_token_id: int,
    generator: torch.Generator,
    *,
    clean_length: int | None = None,
) -> Batch:
    """All rows in one forward pass; see `build_batches`."""
    return build_batches(rows, diffusion, mask_token_id, generator, clean_length=clean_length)[0]


def build_batches(
    rows: Sequence[PackedRow],
    diffusion: Diffusion,
    mask_token_id: int,
    generator: torch.Generator,
    *,
    micro_rows: int | None = None,
    clean_length: int | None = None,
    noisy: bool = True,
    entropies: Sequence[Tensor] | None = None,
    noise_ids: Ranges = (),
) -> list[Batch]:
    """The forward passes of one optimizer step, `micro_rows` rows each (None: all in one).

    Grids and noise are drawn, and noise stratified, over all rows together, so the micro batch size does not change
    them. Clean rows are padded to `clean_length` (None: to the longest row). noisy: False for the clean streams alone.
    entropies: see `lay_grids`. noise_ids: ranges [first, end) of the ids that masked positions show at random; none:
    they show the mask token. Raises `DataError` if the data contains the mask token.
    """
    assert rows, "no rows"
    micro_rows = micro_rows or len(rows)
    grid = lay_grids(rows if noisy else [], diffusion, generator, entropies)
    texts = [torch.from_numpy(document.ids).long() for packed in rows for document in packed.documents]
    pool = pool_of(noise_ids) if noise_ids else None
    noise = draw_noise(len(grid.row), diffusion, generator, texts, pool)
    batches = []
    for start in range(0, len(rows), micro_rows):
        part = rows[start : start + micro_rows]
        keep = ((grid.row >= start) & (grid.row < start + len(part))).nonzero().squeeze(1)
        cells = grid.select(keep)
        local = replace(cells, row=cells.row - start)
        batches.append(_build(part, local, noise.select(keep), mask_token_id, clean_length))
    return batches


def _clean(rows: Sequence[PackedRow], length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, document and position of the clean stream [rows, length], and a mask of the rows with an AR target."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    documents, positions = torch.full_like(ids, PADDING), torch.zeros_like(ids)
    targets = torch.zeros_like(ids, dtype=torch.bool)
    for row, packed in enumerate(rows):
        offset = 0
        for index, document in enumerate(packed.documents):
            stop = offset + len(document)
            ids[row, offset:stop] = torch.from_numpy(document.ids)
            documents[row, offset:stop] = index
            positions[row, offset:stop] = torch.arange(len(document))
            for start, end in document.responses:
                targets[row, offset + start - 1 : offset + end - 1] = True
            offset = stop
    return ids, documents, positions, targets


def _build(
    rows: Sequence[PackedRow],
    grid: Grid,
    noise: Noise,
    mask_token_id: int,
    clean_length: int | None,
) -> Batch:
    lengths = [packed.length for packed in rows]
    size = noise.masked.shape[1]
    clean_length = clean_length or max(lengths)
    assert max(lengths) <= clean_length, "packed rows are longer than clean_length"
    ids, documents, positions, ar_rows = _clean(rows, clean_length)
    if bool((ids[documents != PADDING] == mask_token_id).any()):
        raise DataError(f"the data contains the mask token (id {mask_token_id}); clean the data or choose another")

    copies = Copies.of(grid, noise, len(rows))
    cell, at = copies.cell, copies.at
    position = at.anchor[:, None] + torch.arange(size)  # [copies, B]
    inside = (position < at.end[:, None]) & (torch.arange(size) < at.length[:, None])
    # Beyond the response every view is masked: a shorter block, or visible padding, would reveal where it ends.
    masked = (noise.masked[cell] ^ (copies.view == 1)[:, None]) | ~inside
    slot = (at.offset[:, None] + position).clamp_max(clean_length - 1)
    own = ids[at.row[:, None], slot]
    shown = own if noise.wrong is None else torch.where(noise.wrong[cell] < 0, own, noise.wrong[cell])
    layout = _layout(documents, positions, copies, position)

    signal = copies.kinds.signals(masked | (shown != own), inside & (position + 1 < at.end[:, None]))
    count = torch.zeros(len(grid.row), size).index_add_(0, cell, signal.float())  # signals per target
    copy, column = signal.nonzero(as_tuple=True)
    row, offset, kinds = at.row[copy], at.offset[copy], copies.kinds[copy]
    ar_row, ar_slot = ar_rows.nonzero(as_tuple=True)
    total = layout.length
    ar_flat = ar_row * total + ar_slot
    noisy_flat = row * total + clean_length + copies.begin[copy] + column
    teacher_slot = offset + position[copy, column]
    teacher_flat = row * total + teacher_slot
    head_rows = torch.cat([ar_flat, noisy_flat]).sort().values
    return Batch(
        input_ids=torch.cat([ids, copies.spread_tokens(noise.hide(shown, masked, cell, mask_token_id), 0)], dim=1),
        layout=layout,
        head_rows=head_rows,
        ar_index=torch.searchsorted(head_rows, ar_flat),
        ar_target=ids[ar_row, ar_slot + 1],
        noisy_index=torch.searchsorted(head_rows, noisy_flat),
        noisy_target=ids[row, teacher_slot + 1],
        noisy_weight=1.0 / count[cell[copy], column],
        noisy_loss=kinds.loss,
        until_fail=kinds.until_fail,
        teacher_index=torch.searchsorted(head_rows, teacher_flat),
        slot=column,
        all_masked_index=masked.all(1)[copy].nonzero().squeeze(1),
        blocks=_blocks(masked, signal),
        block_size=size,
        ar_count=len(ar_flat),
        diffusion_count=int((count > 0).sum()),
        losses=kinds.losses(),
        weighs_slots=kinds.weighs_slots(),
        clean_tokens=sum(lengths),
        noisy_tokens=int(at.length.sum()),
    )


def _blocks(masked: Tensor, signal: Tensor) -> Tensor:
    """[n, B] numbers of the signals of fully masked blocks that have any; masked, signal [copies, B]."""
    number = torch.full(signal.shape, -1).masked_scatter(signal, torch.arange(int(signal.sum())))
    return number[masked.all(1) & signal.any(1)]


def _layout(documents: Tensor, positions: Tensor, copies: Copies, position: Tensor) -> Layout:
    """documents, positions [rows, Lc] of the clean stream; position [copies, B] in the document."""
    return Layout(
        clean_document=documents,
        clean_position=positions,
        noisy_block=copies.spread_tokens(copies.index[:, None].expand_as(position), PADDING),
        noisy_position=copies.spread_tokens(position, 0),
        block_document=copies.spread(copies.at.document, PADDING),
        block_anchor=copies.spread(copies.at.anchor, 0),
        block_view=copies.spread(2 * copies.at.grid + copies.view, PADDING),
        block_readout=copies.spread(copies.kinds.readout, BLOCK_END),
        cached=torch.zeros(copies.rows, dtype=torch.int64),
    )

