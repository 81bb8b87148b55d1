"""The training objective: autoregressive cross entropy plus the diffusion loss. Contract: docs/semantics.md section 3.

`loss` takes the logits of all rows, for programs whose head stays in the graph; `head_loss` does without them. Float32
copies of logits exist for `chunk` rows at a time only and are recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.row_losses import accepted, slot_weights
from ...kernels.row_losses.reference import MINUS_INFINITY
from ...recipe.sections import Objective
from .batch import Batch
from .kinds import LOSSES


@dataclass(frozen=True)
class Metrics:
    """Detached sums of one forward pass, on the device. They add up over micro batches; `summary` reads them once.

    ar_loss, diffusion_loss                float32 scalars, sums over (weighted) targets
    diffusion_correct                      float32 scalar, weighted argmax hits over all diffusion signals
    ar_count, diffusion_count              float32 scalars
    slot_count, slot_correct, slot_overlap [B] float32 over the signals of fully masked blocks, by offset in the block:
                                           how many, argmax hits, and sum of 1 - TV against the clean distribution
    block_count, block_length              float32 scalars over the fully masked blocks whose every slot has a target:
                                           how many, and sum of their expected accepted lengths
    """

    ar_loss: Tensor
    ar_count: Tensor
    diffusion_loss: Tensor
    diffusion_correct: Tensor
    diffusion_count: Tensor
    slot_count: Tensor
    slot_correct: Tensor
    slot_overlap: Tensor
    block_count: Tensor
    block_length: Tensor

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def summary(self) -> dict[str, float | list[float | None] | None]:
        """Means as plain numbers (the only host sync); what no fully masked block supervised is None."""

        def ratio(sums: Tensor, counts: Tensor) -> list[float | None]:
            pairs = zip(sums.reshape(-1).tolist(), counts.reshape(-1).tolist(), strict=True)
            return [value / count if count else None for value, count in pairs]

        return {
            "ar_loss": float(self.ar_loss / self.ar_count.clamp_min(1)),
            "diffusion_loss": float(self.diffusion_loss / self.diffusion_count.clamp_min(1)),
            "diffusion_accuracy": float(self.diffusion_correct / self.diffusion_count.clamp_min(1)),
            "all_masked_accuracy": ratio(self.slot_correct, self.slot_count),
            "one_minus_tv": ratio(self.slot_overlap, self.slot_count),
            "expected_accepted": ratio(self.block_length, self.block_count)[0],
        }


@dataclass(frozen=True)
class Scales:
    """What one target weighs in the loss of an optimizer step: the weight of its loss over the targets of that loss in
    the whole step."""

    ar: float
    diffusion: float

    @staticmethod
    def of(batches: Sequence[Batch], weights: Objective) -> Scales:
        """Of the micro batches of one step. The targets are counted on the host."""
        ar, diffusion = sum(batch.ar_count for batch in batches), sum(batch.diffusion_count for batch in batches)
        return Scales(weights.ar_weight / max(1, ar), weights.diffusion_weight / max(1, diffusion))


@dataclass(frozen=True)
class Losses:
    """Contribution of one forward pass to the loss of an optimizer step; `total` carries the gradient."""

    total: Tensor
    metrics: Metrics


def loss(
    logits: Tensor,
    batch: Batch,
    *,
    suppress: int | None,
    scales: Scales,
    chunk: int = 1024,
) -> Losses:
    """The losses of `batch` from `logits` [N, V] of its head rows (any float dtype).

    suppress: token id whose logit counts as minus infinity (the mask token's row), or None.
    """
    rows = len(batch.head_rows)
    assert logits.shape[0] == rows, f"{logits.shape[0]} rows of logits for {rows} head rows"
    target = batch.head_rows.new_zeros(rows)
    target = target.index_copy(0, batch.ar_index, batch.ar_target).index_copy(0, batch.noisy_index, batch.noisy_target)
    teacher = torch.arange(rows, device=target.device).index_copy(0, batch.noisy_index, batch.teacher_index)
    fixed = logits.detach()

    nll, divergence, correct = [], [], []
    for part, ids, teachers in zip(*(torch.split(values, chunk) for values in (logits, target, teacher)), strict=True):
        arguments = (part, ids, fixed, teachers, suppress, "kl" in batch.losses, batch.compares)
        *values, hit = checkpoint(_row_losses, *arguments, use_reentrant=False, preserve_rng_state=False)
        nll.append(values[0])
        divergence.append(torch.stack(values[1:]))
        correct.append(hit)
    cross_entropy = torch.cat(nll)
    by_signal, learned = torch.cat(divergence, 1).index_select(1, batch.noisy_index)
    overlap = learned.detach() if batch.compares else _overlaps(fixed, batch, suppress, chunk)
    ar, diffusion = sums(batch, cross_entropy, by_signal, learned if batch.compares else overlap)
    total = scales.ar * ar + scales.diffusion * diffusion
    return measured(total, batch, cross_entropy.detach(), torch.cat(correct), by_signal.detach(), overlap)


def measured(
    total: Tensor, batch: Batch, cross_entropy: Tensor, hits: Tensor, divergence: Tensor, overlap: Tensor
) -> Losses:
    """A loss with its metrics, from what every row gave, detached.

    cross_entropy, hits  [N] by head row
    divergence, overlap  [Nd] KL and 1 - TV by diffusion signal; read where `sums` does, and at `all_masked_index`
    """
    ar, diffusion = sums(batch, cross_entropy, divergence, overlap)
    correct = hits.index_select(0, batch.noisy_index)
    probe = batch.all_masked_index
    by_slot = F.one_hot(batch.slot[probe], batch.block_size).to(correct.dtype)  # deterministic, unlike index_add
    whole = (batch.blocks >= 0).all(1).to(correct.dtype)
    lengths = accepted(overlap, batch.blocks)[batch.blocks.clamp_min(0)].sum(1)
    metrics = Metrics(
        ar_loss=ar,
        ar_count=torch.full_like(ar, float(batch.ar_count)),
        diffusion_loss=diffusion,
        diffusion_correct=(correct * batch.noisy_weight).sum(),
        diffusion_count=torch.full_like(ar, float(batch.diffusion_count)),
        slot_count=by_slot.sum(0),
        slot_correct=correct[probe] @ by_slot,
        slot_overlap=overlap[probe] @ by_slot,
        block_count=whole.sum(),
        block_length=(lengths * whole).sum(),
    )
    return Losses(total, metrics)


def sums(batch: Batch, cross_entropy: Tensor, divergence: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """The AR sum over targets and the weighted diffusion sum over signals: [N], then [Nd] KL and 1 - TV."""
    signal = cross_entropy.index_select(0, batch.noisy_index)
    values = {"kl": divergence}
    if batch.compares:
        values |= {"tv": 1 - overlap, "el": -accepted(overlap, batch.blocks)}
    for name in batch.losses:
        if name in values:
            signal = torch.where(batch.noisy_loss == LOSSES.index(name), values[name], signal)
    if batch.weighs_slots:
        signal = torch.where(batch.until_fail, signal * slot_weights(overlap, batch.blocks), signal)
    return cross_entropy.index_select(0, batch.ar_index).sum(), (signal * batch.noisy_weight).sum()


def log_probabilities(logits: Tensor, suppress: int | None) -> Tensor:
    """[n, V] log softmax without the suppressed token, in float32 (float64 for float64 logits)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if suppress is not None:
        column = torch.full((1,), suppress, device=logits.device)
        logits = logits.index_fill(1, column, MINUS_INFINITY)
    return F.log_softmax(logits, dim=-1)


def _row_losses(
    logits: Tensor, target: Tensor, fixed: Tensor, teacher: Tensor, suppress: int | None, diverges: bool, compares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row [n]: negative log likelihood, KL(teacher || row), 1 - TV, argmax hit (0 or 1).

    `teacher` [n] are rows of `fixed` [N, V], the detached logits. KL is 0 unless it `diverges`, 1 - TV unless it
    `compares`.
    """
    log_q = log_probabilities(logits, suppress)
    nll = -log_q.gather(1, target[:, None]).squeeze(1)
    correct = (log_q.detach().argmax(1) == target).to(nll.dtype)
    divergence = overlap = torch.zeros_like(nll)
    if diverges or compares:
        log_p = log_probabilities(fixed[teacher], suppress)
        if diverges:
            divergence = (log_p.exp() * (log_p - log_q)).sum(1)
        if compares:
            overlap = 1 - 0.5 * (log_p.exp() - log_q.exp()).abs().sum(1)
    return nll, divergence, overlap, correct


@torch.no_grad()
def _overlaps(logits: Tensor, batch: Batch, suppress: int | None, chunk: int) -> Tensor:
    """[Nd] 1 - TV against the teacher for the signals of fully masked blocks, 0 for the others."""
    probe = batch.all_masked_index
    pairs = zip(*(torch.split(index[probe], chunk) for index in (batch.noisy_index, batch.teacher_index)), strict=True)
    found = [
        torch.minimum(log_probabilities(logits[q], suppress), log_probabilities(logits[p], suppress)).exp().sum(1)
        for q, p in pairs
    ]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    overlap = torch.zeros(len(batch.noisy_index), dtype=dtype, device=logits.device)
    return overlap.index_copy(0, probe, torch.cat(found)) if found else overlap
