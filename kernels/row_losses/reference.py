"""Losses of rows of logits: the specification. Contract of the objective: docs/semantics.md section 3.

Rows come as pairs and singles: of `P + S + T` rows the first P are students, the last T their teachers, those between
stand alone. Row `P + S + i` is the teacher of row `i`, unless students share teachers and say which is theirs. Every
row has a target and a weight for its cross entropy, every student also weights for its divergences from the teacher.
The loss is

    sum over rows of ce * -log q[target]  +  sum over pairs of kl * KL(p || q) + tv * TV(p, q)

with q a row's softmax, p the teacher's, which a divergence does not train, and TV = 1/2 sum |p - q|. Pairs that are
slots of blocks (`Chain`) may have weights that depend on the earlier slots, and add minus their expected accepted
length:

    - sum over slots s of a block of length_s * product over r <= s of (1 - TV_r)

The suppressed token has probability 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chain import Chain, accepted

MINUS_INFINITY = -1e30
"""Finite, so that 0 * (log p - log q) of a suppressed token is 0 and not NaN; exp() of it is exactly 0."""


@dataclass(frozen=True)
class RowWeights:
    """What the `M` rows of a chunk weigh in the loss; `P` of them are students.

    ce        [M]   of cross entropy
    kl, tv    [P]   of the divergences; None if no pair has one. `kl` is then not computed
    chain     of the pairs, None if nothing depends on blocks
    learning  the rows before this one get a gradient; those behind it must have no weight and be no students. None: all
    teacher   [P] int64   row of each student's teacher; None: each has its own, the last P rows in order
    """

    ce: Tensor
    pairs: int
    kl: Tensor | None = None
    tv: Tensor | None = None
    chain: Chain | None = None
    learning: int | None = None
    teacher: Tensor | None = None

    @property
    def teachers(self) -> Tensor | slice:
        """The teachers' rows, by pair."""
        return slice(len(self.ce) - self.pairs, len(self.ce)) if self.teacher is None else self.teacher

    @property
    def rows(self) -> int:
        """Rows with a gradient."""
        return len(self.ce) if self.learning is None else self.learning

    @property
    def bends(self) -> bool:
        """Whether a gradient depends on the distance of a whole pair, and not on each column alone."""
        return self.tv is not None or self.chain is not None

    def settled(self, overlap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What students weigh once their 1 - TV is known, [P] each: cross entropy, KL, and TV with what the expected
        accepted length adds to it."""
        zero = torch.zeros_like(overlap)
        ce = self.ce[: self.pairs].to(overlap.dtype)
        kl, tv = (zero if weight is None else weight.to(overlap.dtype) for weight in (self.kl, self.tv))
        if self.chain is None:
            return ce, kl, tv
        slots = self.chain.weights(overlap)
        return ce * slots, kl * slots, tv * slots + self.chain.slope(overlap)


@dataclass(frozen=True)
class RowLosses:
    """What the rows of one chunk give, float32 (float64 for float64 logits), all detached.

    nll       [M]     -log q[target]
    hit       [M]     1 where the largest logit is the target's, else 0
    kl        [P]     KL(p || q); 0 if no pair has a weight for it
    overlap   [P]     1 - TV = sum of min(p, q)
    gradient  [L, V]  of the loss by the logits of the learning rows, in their dtype; None if it was not asked for
    """

    nll: Tensor
    hit: Tensor
    kl: Tensor
    overlap: Tensor
    gradient: Tensor | None


def reference(
    logits: Tensor, target: Tensor, weights: RowWeights, *, suppress: int | None, gradient: bool = True
) -> RowLosses:
    """By the formulas, with autograd's gradient.

    logits [M, V] of any float dtype; target [M] int64; suppress: a token id, or None.
    """
    pairs, chain = weights.pairs, weights.chain
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        if suppress is not None:
            wide = wide.index_fill(1, torch.tensor([suppress], device=leaf.device), MINUS_INFINITY)
        log_q = wide.log_softmax(1)
        log_p = log_q[weights.teachers].detach()
        nll = -log_q.gather(1, target[:, None]).squeeze(1)
        divergence = (log_p.exp() * (log_p - log_q[:pairs])).sum(1)
        distance = 0.5 * (log_p.exp() - log_q[:pairs].exp()).abs().sum(1)
        slots = torch.ones_like(distance) if chain is None else chain.weights(1 - distance)
        ce = weights.ce.to(nll.dtype)
        total = (ce[:pairs] * slots * nll[:pairs]).sum() + (ce[pairs:] * nll[pairs:]).sum()
        for weight, value in ((weights.kl, divergence), (weights.tv, distance)):
            if weight is not None:
                total = total + (weight * slots * value).sum()
        if chain is not None:
            total = total - (chain.length * accepted(1 - distance, chain.blocks)).sum()
        found = torch.autograd.grad(total, leaf)[0][: weights.rows] if gradient else None
    hit = (log_q.argmax(1) == target).to(nll.dtype)
    if weights.kl is None:
        divergence = torch.zeros_like(divergence)
    return RowLosses(nll.detach(), hit, divergence.detach(), (1 - distance).detach(), found)
