"""Losses of rows of logits with few passes over them, in PyTorch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import MINUS_INFINITY, RowLosses


@torch.no_grad()
def row_losses(
    logits: Tensor, target: Tensor, ce: Tensor, kl: Tensor, *, suppress: int | None, gradient: bool = True
) -> RowLosses:
    """As `reference`. The logits are used up: their memory is overwritten. Never waits for a device."""
    pairs, dtype = len(kl), logits.dtype
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
    student, teacher = slice(0, pairs), slice(pairs, 2 * pairs)
    divergence = overlap = nll.new_empty(0)
    if pairs:
        overlap = torch.minimum(q[student], q[teacher]).sum(1)
        apart = wide[student].neg_().add_(wide[teacher]).mul_(q[teacher])
        divergence = apart.sum(1) + (norm[student] - norm[teacher]).squeeze(1)
    if not gradient:
        return RowLosses(nll, hit, divergence, overlap, None)
    ce = ce.to(q.dtype)[:, None]
    if pairs:
        kl = kl.to(q.dtype)[:, None]
        q[student] *= ce[student] + kl
        q[student].addcmul_(q[teacher], kl, value=-1.0)
        q[pairs:] *= ce[pairs:]
    else:
        q *= ce
    q.scatter_add_(1, aim, -ce)
    return RowLosses(nll, hit, divergence, overlap, q.to(dtype))
