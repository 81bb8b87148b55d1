"""Losses of rows of logits: the specification. Contract of the objective: docs/semantics.md section 3.

Rows come as pairs and singles: of `2 P + S` rows the first P are students, the next P their teachers (row `P + i` is
the teacher of row `i`), the rest stand alone. Every row has a target and a weight for its cross entropy, every student
also a weight for its divergence from the teacher. The loss is

    sum over rows of ce * -log q[target]  +  sum over pairs of kl * KL(p || q)

with q a row's softmax and p the teacher's, which the divergence does not train. The suppressed token has probability 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MINUS_INFINITY = -1e30
"""Finite, so that 0 * (log p - log q) of a suppressed token is 0 and not NaN; exp() of it is exactly 0."""


@dataclass(frozen=True)
class RowLosses:
    """What the rows of one chunk give, float32 (float64 for float64 logits), all detached.

    nll       [M]     -log q[target]
    hit       [M]     1 where the largest logit is the target's, else 0
    kl        [P]     KL(p || q)
    overlap   [P]     1 - TV = sum of min(p, q)
    gradient  [M, V]  of the loss by the logits, in their dtype; None if it was not asked for
    """

    nll: Tensor
    hit: Tensor
    kl: Tensor
    overlap: Tensor
    gradient: Tensor | None


def reference(
    logits: Tensor, target: Tensor, ce: Tensor, kl: Tensor, *, suppress: int | None, gradient: bool = True
) -> RowLosses:
    """By the formulas, with autograd's gradient.

    logits [M, V] of any float dtype; target [M] int64; ce [M], kl [P] weights; suppress: a token id, or None.
    """
    pairs = len(kl)
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        if suppress is not None:
            wide = wide.index_fill(1, torch.tensor([suppress], device=leaf.device), MINUS_INFINITY)
        log_q = wide.log_softmax(1)
        log_p = log_q[pairs : 2 * pairs].detach()
        nll = -log_q.gather(1, target[:, None]).squeeze(1)
        divergence = (log_p.exp() * (log_p - log_q[:pairs])).sum(1)
        total = (ce * nll).sum() + (kl * divergence).sum()
        found = torch.autograd.grad(total, leaf)[0] if gradient else None
    overlap = torch.minimum(log_p.exp(), log_q[:pairs].detach().exp()).sum(1)
    hit = (log_q.argmax(1) == target).to(nll.dtype)
    return RowLosses(nll.detach(), hit, divergence.detach(), overlap, found)
