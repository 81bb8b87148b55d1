"""In which order the rows of the head are computed, so that no logits are kept and none are computed in vain.

A divergence needs a noisy row's logits beside those of its teacher, the clean row that predicts the same token. Such
pairs are put into one chunk, and so are the pairs of a block if the earlier slots decide what the later ones weigh.
Pairs of the same teacher (of views and grids) follow each other, so that it is seldom computed again; all other rows
fill the chunks up. Made on the host, once per batch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.row_losses import Chain, RowWeights
from .batch import Batch
from .kinds import LOSSES
from .loss import Scales


@dataclass(frozen=True)
class Chunk:
    """Rows `start .. stop` of the order: `pairs` students, single rows, the students' teachers. The chunk's pairs are
    `first .. first + pairs` of all, its chained blocks `block .. block + blocks`; the first `learning` rows have a
    gradient. Students may share teachers; without, row `stop - pairs + i` is the teacher of student `i`."""

    start: int
    stop: int
    first: int
    pairs: int
    learning: int
    block: int = 0
    blocks: int = 0
    shared: bool = False


@dataclass(frozen=True)
class HeadPlan:
    """For `N` head rows, of which `M - N` teachers have students in several chunks and come again, and `P` pairs.

    order    [M] int64    into the head_rows axis
    place    [N] int64    where in the order each head row's own losses are
    target   [M] int64    token ids (0 for a row without one; its weights are 0)
    ce       [M] float64  weight of the row's cross entropy in the loss of the optimizer step
    kl, tv   [P] float64  weights of the pair's divergences; None if no pair has one
    chain    of the pairs, None if no signal depends on its block
    signal   [P] int64    into the Nd axis: the pair's diffusion signal
    teacher  [P] int64    row of the pair's teacher in its chunk
    """

    order: Tensor
    place: Tensor
    target: Tensor
    ce: Tensor
    kl: Tensor | None
    tv: Tensor | None
    chain: Chain | None
    signal: Tensor
    teacher: Tensor
    chunks: tuple[Chunk, ...]
    scales: Scales

    def to(self, device: torch.device | str) -> HeadPlan:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if self.chain is not None:
            moved["chain"] = Chain(*(tensor.to(device) for tensor in vars(self.chain).values()))
        return replace(self, **moved)

    def in_dtype(self, dtype: torch.dtype) -> HeadPlan:
        """With weights in the dtype of the losses."""
        kl, tv = (None if weight is None else weight.to(dtype) for weight in (self.kl, self.tv))
        chain = None if self.chain is None else replace(self.chain, length=self.chain.length.to(dtype))
        return replace(self, ce=self.ce.to(dtype), kl=kl, tv=tv, chain=chain)

    def weights(self, chunk: Chunk) -> RowWeights:
        """Of the rows of one chunk."""
        pairs = slice(chunk.first, chunk.first + chunk.pairs)
        kl, tv = (None if weight is None else weight[pairs] for weight in (self.kl, self.tv))
        chain = None
        if self.chain is not None:
            chain = self.chain.part(slice(chunk.block, chunk.block + chunk.blocks), pairs)
        teacher = self.teacher[pairs] if chunk.shared else None
        return RowWeights(self.ce[chunk.start : chunk.stop], chunk.pairs, kl, tv, chain, chunk.learning, teacher)


def plan_head(batch: Batch, scales: Scales, chunk: int) -> HeadPlan:
    """The plan of a batch on the host, at most `chunk` rows at a time (a pair, or a chained block, if that is more)."""
    rows = len(batch.head_rows)
    codes = {name: batch.noisy_loss == number for number, name in enumerate(LOSSES)}
    paired = ~codes["ce"]
    paired[batch.all_masked_index] = True  # their overlap with the teacher is measured
    signal, units = _units(batch, paired.nonzero().squeeze(1))
    student, teacher = batch.noisy_index[signal], batch.teacher_index[signal]
    single, learning = _singles(batch, scales, student, teacher)

    target = torch.zeros(rows, dtype=torch.int64)
    target[batch.ar_index], target[batch.noisy_index] = batch.ar_target, batch.noisy_target
    weight = scales.diffusion * batch.noisy_weight.double()
    ce = torch.zeros(rows, dtype=torch.float64)
    ce[batch.ar_index] = scales.ar
    ce[batch.noisy_index] = torch.where(codes["ce"], weight, 0.0)
    kl, tv, length = (
        torch.where(codes[name], weight, 0.0)[signal] if name in batch.losses else None for name in ("kl", "tv", "el")
    )
    chain = _chain(batch, signal, length) if batch.chained else None

    chunks: list[Chunk] = []
    order, places = [], []
    for pairs, singles in _cut(units.tolist(), teacher, len(single), max(2, chunk)):
        own = teacher[pairs]
        distinct, index = own.unique(return_inverse=True)
        shared = len(distinct) < len(own)
        order += [student[pairs], single[singles], distinct if shared else own]
        start, fore = (chunks[-1].stop if chunks else 0), len(own) + singles.stop - singles.start
        places.append(fore + (index if shared else torch.arange(len(own))))
        stop = start + fore + len(order[-1])
        taught = len(own) + max(0, min(learning, singles.stop) - singles.start)
        block, end = (0, 0) if chain is None else (
            int((chain.blocks[:, 0] < pair).sum()) for pair in (pairs.start, pairs.stop)
        )
        chunks.append(Chunk(
            start, stop, pairs.start, len(own), stop - start if scales.ar > 0 else taught, block, end - block, shared
        ))
    empty = torch.zeros(0, dtype=torch.int64)
    at = torch.cat([empty, *order])
    twice = _again(at)
    place = torch.empty(rows, dtype=torch.int64)
    place[at[~twice]] = (~twice).nonzero().squeeze(1)
    return HeadPlan(
        at, place, target[at], ce[at].masked_fill(twice, 0.0), kl, tv, chain, signal, torch.cat([empty, *places]),
        tuple(chunks), scales,
    )


def _singles(batch: Batch, scales: Scales, student: Tensor, teacher: Tensor) -> tuple[Tensor, int]:
    """(rows in no pair [S], how many of them learn); those that learn come first."""
    alone = torch.ones(len(batch.head_rows), dtype=torch.bool)
    alone[student] = alone[teacher] = False
    learns = torch.full_like(alone, scales.ar > 0)
    learns[batch.noisy_index] = True
    parts = [(alone & chosen).nonzero().squeeze(1) for chosen in (learns, ~learns)]
    return torch.cat(parts), len(parts[0])


def _units(batch: Batch, signal: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs in the order of their teachers, as far as what must stay together allows: (signals [P], first pair of
    everything that stays together). The pairs of a chained block do, all others stand alone."""
    starts = torch.ones(len(batch.slot), dtype=torch.bool)
    if batch.chained:
        later = batch.blocks[:, 1:]
        starts[later[later >= 0]] = False
    first = starts[signal].nonzero().squeeze(1)
    size = torch.diff(first, append=torch.tensor([len(signal)]))
    unit = batch.teacher_index[signal[first]].argsort(stable=True)
    first, size = first[unit], size[unit]
    begin = size.cumsum(0) - size  # where the unit stands now
    return signal[torch.arange(len(signal)) + (first - begin).repeat_interleave(size)], begin


def _chain(batch: Batch, signal: Tensor, length: Tensor | None) -> Chain:
    """The chain of the pairs, blocks in their order; `signal` [P] into the Nd axis."""
    pair = torch.full((len(batch.slot) + 1,), -1)
    pair[signal] = torch.arange(len(signal))
    blocks = pair[torch.where(batch.blocks < 0, len(batch.slot), batch.blocks)]
    weight = torch.zeros(len(signal), dtype=torch.float64) if length is None else length
    return Chain(blocks[blocks[:, 0].argsort()], weight, batch.until_fail[signal])


def _again(rows: Tensor) -> Tensor:
    """[M] bool: a row that stands further left already."""
    order = rows.argsort(stable=True)
    result = torch.zeros(len(rows), dtype=torch.bool)
    result[order[1:]] = rows[order[1:]] == rows[order[:-1]]
    return result


def _before(rows: Tensor) -> Tensor:
    """[P] int64: where the same value stands next to the left, -1 if it does not."""
    order = rows.argsort(stable=True)
    same = rows[order[1:]] == rows[order[:-1]]
    result = torch.full((len(rows),), -1)
    result[order[1:][same]] = order[:-1][same]
    return result


def _cut(units: list[int], teacher: Tensor, singles: int, chunk: int) -> list[tuple[slice, slice]]:
    """Chunks of about equal size, pairs first: their shares of the pairs and of the single rows; no unit is cut."""
    pairs, before = len(teacher), _before(teacher)
    bounds = [*units, pairs] if units else [0]
    left = pairs + int((before < 0).sum()) + singles
    size = max(2, -(-left // max(1, -(-left // chunk))))
    found: list[tuple[slice, slice]] = []
    pair = single = 0
    while pair < pairs or single < singles:
        rows = torch.cumsum(1 + (before[pair : pair + size] < pair).long(), 0)  # of the next pairs and their teachers
        fits = bisect_right(bounds, pair + int((rows <= size).sum())) - 1
        end = max(bounds[fits], bounds[min(bisect_right(bounds, pair), len(bounds) - 1)])
        taken = int(rows[end - pair - 1]) if end > pair and end - pair <= len(rows) else 2 * (end - pair)
        more = max(0, min(size - taken, singles - single))
        found.append((slice(pair, end), slice(single, single + more)))
        pair, single = end, single + more
    return found
