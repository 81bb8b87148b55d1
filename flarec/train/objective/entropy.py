"""The clean stream's next-token entropies, which decide how long the spans of a step are (docs/semantics.md section 1).

They come from a forward pass of the clean rows alone, before the step's noise is laid. That costs about what the clean
half of a step costs, and waits for the device; a recipe without `span_entropy` does neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...ir.program import Program
from ...layout import CAUSAL, Layout
from ...recipe.diffusion import Diffusion
from ..data.document import PackedRow
from .batch import Batch, build_batches
from .head_loss import head_rows_at_once
from .loss import log_probabilities


@torch.no_grad()
def next_token_entropies(
    program: Program, rows: Sequence[PackedRow], diffusion: Diffusion, mask_token_id: int, *, micro_rows: int
) -> list[Tensor]:
    """Per row [clean tokens of the row], on the host: the entropy in nats of the token that follows, where the token is
    one of a response; 0 elsewhere. The mask token has probability 0."""
    found: list[Tensor] = []
    suppress = mask_token_id if mask_token_id < program.vocab_size else None
    generator = torch.Generator()  # without noise nothing is drawn
    batches = build_batches(rows, diffusion, mask_token_id, generator, micro_rows=micro_rows, noisy=False)
    for number, batch in enumerate(batches):
        ids, layout = _with_a_noisy_token(batch)
        row, slot = batch.head_rows // batch.layout.length, batch.head_rows % batch.layout.length
        head_rows = (row * layout.length + slot).to(program.device)
        moved = layout.to(program.device)
        derived = program.derive(layout, moved=moved)
        results, *_ = program.results(ids.to(program.device), layout=moved, head_rows=head_rows, derived=derived)
        values = torch.zeros(batch.input_ids.shape, dtype=torch.promote_types(results.dtype, torch.float32))
        values[row, slot] = torch.cat([
            _entropies(part if program.head is None else program.head.logits(program.module, part), suppress)
            for part in results.split(head_rows_at_once(program))
        ]).cpu()
        part = rows[number * micro_rows : (number + 1) * micro_rows]
        found += [own[: packed.length] for packed, own in zip(part, values, strict=True)]
    return found


def _entropies(logits: Tensor, suppress: int | None) -> Tensor:
    known = log_probabilities(logits, suppress)
    return -(known.exp() * known).sum(1)


def _with_a_noisy_token(batch: Batch) -> tuple[Tensor, Layout]:
    """Ids and layout with one noisy token per row, which nobody reads: graphs whose streams are apart need some."""
    rows = len(batch.input_ids)
    zero = torch.zeros(rows, 1, dtype=torch.int64)
    layout = replace(
        batch.layout, noisy_block=zero, noisy_position=zero, block_document=zero, block_anchor=zero, block_view=zero,
        block_readout=zero + CAUSAL,
    )
    return torch.cat([batch.input_ids, zero], dim=1), layout
