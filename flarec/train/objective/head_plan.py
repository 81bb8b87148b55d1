"""In which order the rows of the head are computed, so that no logits are kept and none are computed in vain.

A divergence needs a noisy row's logits beside those of its teacher, the clean row that predicts the same token. Such
pairs are put into one chunk; all other rows fill the chunks up. Made on the host, once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .loss import Scales


@dataclass(frozen=True)
class Chunk:
    """Rows `start .. stop` of the order: `pairs` students, their teachers, then single rows. The chunk's pairs are
    `first .. first + pairs` of all."""

    start: int
    stop: int
    first: int
    pairs: int


@dataclass(frozen=True)
class HeadPlan:
    """For `N` head rows, of which `M - N` teachers have several students and come again, and `P` pairs.

    order    [M] int64    into the head_rows axis
    place    [N] int64    where in the order each head row's own losses are
    target   [M] int64    token ids (0 for a row without one; its weights are 0)
    ce       [M] float64  weight of the row's cross entropy in the loss of the optimizer step
    kl       [P] float64  weight of the pair's divergence
    signal   [P] int64    into the Nd axis: the pair's diffusion signal
    """

    order: Tensor
    place: Tensor
    target: Tensor
    ce: Tensor
    kl: Tensor
    signal: Tensor
    chunks: tuple[Chunk, ...]

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> HeadPlan:
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)


def plan_head(batch: Batch, scales: Scales, chunk: int) -> HeadPlan:
    """The plan of a batch on the host, at most `chunk` rows at a time (2 if that is less)."""
    rows = len(batch.head_rows)
    paired = batch.noisy_kl.clone()
    paired[batch.all_masked_index] = True  # their overlap with the teacher is measured
    signal = paired.nonzero().squeeze(1)
    student, teacher = batch.noisy_index[signal], batch.teacher_index[signal]
    again = _again(teacher)
    alone = torch.ones(rows, dtype=torch.bool)
    alone[student] = alone[teacher] = False
    single = alone.nonzero().squeeze(1)

    target = torch.zeros(rows, dtype=torch.int64)
    target[batch.ar_index], target[batch.noisy_index] = batch.ar_target, batch.noisy_target
    weight = scales.diffusion * batch.noisy_weight.double()
    ce = torch.zeros(rows, dtype=torch.float64)
    ce[batch.ar_index] = scales.ar
    ce[batch.noisy_index] = torch.where(batch.noisy_kl, 0.0, weight)

    chunks, order, repeated = [], [], []
    for piece, pairs, singles in _cut(len(signal), len(single), max(2, chunk)):
        order += [student[pairs], teacher[pairs], single[singles]]
        repeated += [torch.zeros(piece.pairs, dtype=torch.bool), again[pairs],
                     torch.zeros(singles.stop - singles.start, dtype=torch.bool)]  # fmt: skip
        chunks.append(piece)
    empty = torch.zeros(0, dtype=torch.int64)
    at, twice = torch.cat([empty, *order]), torch.cat([empty.bool(), *repeated])
    place = torch.empty(rows, dtype=torch.int64)
    own = (~twice).nonzero().squeeze(1)
    place[at[own]] = own
    return HeadPlan(
        order=at,
        place=place,
        target=target[at],
        ce=ce[at].masked_fill(twice, 0.0),
        kl=torch.where(batch.noisy_kl, weight, 0.0)[signal],
        signal=signal,
        chunks=tuple(chunks),
    )


def _again(teacher: Tensor) -> Tensor:
    """[P] bool: a teacher that stands further left already."""
    order = teacher.argsort(stable=True)
    result = torch.zeros(len(teacher), dtype=torch.bool)
    result[order[1:]] = teacher[order[1:]] == teacher[order[:-1]]
    return result


def _cut(pairs: int, singles: int, chunk: int) -> list[tuple[Chunk, slice, slice]]:
    """Chunks of about equal size, pairs first, with their shares of the pairs and of the single rows."""
    left = 2 * pairs + singles
    size = max(2, -(-left // max(1, -(-left // chunk))))
    found: list[tuple[Chunk, slice, slice]] = []
    pair = single = start = 0
    while pair < pairs or single < singles:
        taken = min(size // 2, pairs - pair)
        more = min(size - 2 * taken, singles - single)
        stop = start + 2 * taken + more
        found.append((Chunk(start, stop, pair, taken), slice(pair, pair + taken), slice(single, single + more)))
        pair, single, start = pair + taken, single + more, stop
    return found
