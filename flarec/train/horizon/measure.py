"""What the horizon head learns from: hidden rows of the clean stream, and how many drafts behind them were right.

At every place of a response a whole block of drafts is laid, fully masked and causal as in decoding. A draft is right
if the clean stream chooses the same token where the text has all tokens before it. That says what decoding would see as
long as the text is what the model itself would say: a place counts if the model chooses the token that starts the
block, and all that follow up to the first wrong draft. Drafts behind the end of a response are right: nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoint.manifest import MaskToken
from ...ir.program import Program
from ...recipe.diffusion import Diffusion
from ..data.document import PackedRow
from ..objective.batch import Batch, build_batches
from ..objective.head_loss import head_rows_at_once


@dataclass(frozen=True)
class Places:
    """hidden [n, D] float32: last hidden states of the rows that choose a block's first token; safe [n] int64: right
    drafts of the block behind it, up to the first wrong one. On the host. places: that were looked at."""

    hidden: Tensor
    safe: Tensor
    places: int


@torch.no_grad()
def measure(
    program: Program, rows: Sequence[PackedRow], size: int, mask: MaskToken,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Places:
    """The places of `rows`. program: lowered for training, its head split off; size: positions of a block."""
    assert program.head is not None, "the hidden rows are not there"
    everywhere = Diffusion(
        block_size=size, mask="all", views=1, supervise="masked-input", readout="causal", loss="ce", grids=size
    )
    hidden, safe, places = [], [], 0
    generator = torch.Generator()  # fully masked, fixed grids: nothing is drawn that matters, but random ids
    for done, row in enumerate(rows, 1):
        (batch,) = build_batches([row], everywhere, mask.token_id, generator, noise_ids=mask.ids)
        here = batch.to(program.device)
        derived = program.derive(batch.layout, moved=here.layout)
        results, *_ = program.results(here.input_ids, layout=here.layout, head_rows=here.head_rows, derived=derived)
        at, count, known = judged(batch, _choices(program, results, mask.suppress).cpu())
        places += len(at)
        hidden.append(results[at[known].to(results.device)].float().cpu())
        safe.append(count[known])
        tick(done, len(rows))
    return Places(torch.cat(hidden), torch.cat(safe), places)


def judged(batch: Batch, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the blocks of a fully masked batch, given what each head row chooses [N]: the head row in front of the block,
    how many of its drafts are right up to the first wrong one, and whether the text tells ([n] each)."""
    blocks, there = batch.blocks, batch.blocks >= 0
    signal = blocks.clamp_min(0)
    teacher = batch.teacher_index[signal]
    right = (choice[batch.noisy_index[signal]] == choice[teacher]) | ~there
    said = torch.zeros(len(choice), dtype=torch.bool)  # the text goes on as the model would
    said[batch.ar_index] = choice[batch.ar_index] == batch.ar_target
    front = teacher[:, 0] - 1  # clean rows of a response are neighbours among the head rows
    own = said[teacher] | ~there
    count = right.long().cumprod(1).sum(1)
    # draft j stands for what the text says as far as the drafts before it are in the text
    lost = right & ~own
    known = said[front] & ~(lost & (torch.arange(blocks.shape[1]) < count[:, None])).any(1)
    return front, count, known


def _choices(program: Program, hidden: Tensor, suppress: int | None) -> Tensor:
    """[N] the token that every row chooses greedily."""
    assert program.head is not None
    found = []
    for part in hidden.split(head_rows_at_once(program)):
        logits = program.head.logits(program.module, part)
        if suppress is not None:
            logits[:, suppress] = -torch.inf
        found.append(logits.argmax(1))
    return torch.cat(found)
