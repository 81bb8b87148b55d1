"""Losses of rows of logits with few passes over them, in PyTorch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import MINUS_INFINITY, RowLosses, RowWeights


@torch.no_grad()
def row_losses(
    logits: Tensor, target: Tensor, weights: RowWeights, *, suppress: int | None, gradient: bool = True
) -> RowLosses:
    """As `reference`. The logits are used up: their memory is overwritten. Never waits for a device."""
    pairs, dtype = weights.pairs, logits.dtype
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    if suppress is not None:
        wide[:, suppress] = MINUS_INFINITY
    largest, place = wide.max(1, keepdim=True)
    q = torch.softmax(wide, 1)
    # The largest probability is at least 1/V, so that its logarithm is exact to rounding.
    norm = largest - q.gather(1, place).log()
    aim = target[:, None]
    nll = (norm - wide.gather(1, aim)).squeeze(1)
    hit = (place == aim).squeeze(1).to(nll.dtype)
    student, teacher = slice(0, pairs), weights.teachers
    own, p = q[student], q[teacher]
    overlap = torch.minimum(own, p).sum(1) if pairs else nll.new_zeros(0)
    divergence = torch.zeros_like(overlap)
    if weights.kl is not None and pairs:
        apart = wide[student].neg_().add_(wide[teacher]).mul_(p)
        divergence = apart.sum(1) + (norm[student] - norm[teacher]).squeeze(1)
    if not gradient:
        return RowLosses(nll, hit, divergence, overlap, None)
    ce = weights.ce.to(q.dtype)[:, None]
    if pairs:
        first, kl, tv = (weight[:, None] for weight in weights.settled(overlap))
        ce = torch.cat([first, ce[pairs:]])
        if weights.bends:  # TV by a logit: q (sign(q - p) - sum of q sign(q - p)) / 2
            side = torch.sub(own, p, out=wide[student]).sign_()
            lean = (own * side).sum(1, keepdim=True)
            own.mul_(side.sub_(lean).mul_(0.5 * tv).add_(first + kl))
        else:
            own.mul_(first + kl)
        if weights.kl is not None:
            own.addcmul_(p, kl, value=-1.0)
    rows = weights.rows
    q[pairs:rows] *= ce[pairs:rows]
    found = q[:rows].scatter_add_(1, aim[:rows], -ce[:rows])
    return RowLosses(nll, hit, divergence, overlap, found.to(dtype))
