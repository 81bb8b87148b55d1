"""The choice of a token in PyTorch operations: sorts the vocabulary where a row truncates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import arithmetic


def kept_tokens(scores: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Tokens that top-k, then top-p, keep: [N, V] bool. scores [N, V] float32, weights [N, V] int64 of all tokens.

    Top-p works on the distribution that top-k left: a token stays while the weights before it are less than p times
    their sum. The most probable token always stays; among equal scores the lower id comes first.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[1], device=scores.device)
    keep = rank < top_k[:, None]
    ordered = torch.where(keep, weights.gather(1, order), 0)
    reached = ordered.cumsum(dim=1)
    limit = (top_p.double() * reached[:, -1].double()).ceil().to(torch.int64).clamp_min(1)
    keep &= (reached - ordered < limit[:, None]) | (top_p[:, None] >= 1)
    return torch.zeros_like(keep).scatter_(1, order, keep)


@torch.no_grad()
def choose_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor,
    out: Tensor | None, truncated: bool, sampled: bool, confidence: bool = True, per: int = 1,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(id, probability, whether there is a choice), each [N]; `choose` of this package says what the operands are."""
    if source is not None:
        logits = logits.index_select(0, source)
        out = out.index_select(0, source) if out is not None and out.ndim > 1 else out
    if per > 1:
        temperature, top_k, top_p, seed, position = (
            x[:, None].expand(-1, per).reshape(-1) for x in (temperature, top_k, top_p, seed, position)
        )
        position = position + torch.arange(per, device=logits.device).repeat(len(position) // per)
    scores = logits.to(torch.float32)
    if out is not None:
        scores = scores.masked_fill(out, -math.inf)
    largest, token = scores.max(dim=1, keepdim=True)  # NaN is the largest of all
    valid = largest.isfinite()
    scores, largest = torch.where(valid, scores, 0.0), torch.where(valid, largest, 0.0)
    weights = None
    if truncated or confidence:
        weights = arithmetic.weights((largest - scores).mul_(arithmetic.inverse(temperature)[:, None]))
    if truncated and weights is not None:
        dropped = ~kept_tokens(scores, weights, top_k, top_p)
        scores, weights = scores.masked_fill(dropped, -math.inf), weights.masked_fill(dropped, 0)
    if sampled:
        ids = torch.arange(logits.shape[1], device=logits.device)
        # both terms are finite, but for the -inf of what must not be chosen
        noise = arithmetic.gumbel(seed, position, ids).mul_(temperature[:, None])
        token = noise.add_(scores).argmax(dim=1, keepdim=True)
    probability = torch.zeros_like(temperature)
    if confidence and weights is not None:
        share = weights.gather(1, token).squeeze(1).double() / weights.sum(dim=1).double()
        probability = share.to(torch.float32)
    valid = valid.squeeze(1)
    return torch.where(valid, token.squeeze(1), arithmetic.UNCHOSEN), torch.where(valid, probability, 0.0), valid
