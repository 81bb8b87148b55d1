"""Whether a token is nearly as good a choice as the one that was made (docs/semantics.md section 4, "Recheck")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import arithmetic
from .torch_choice import kept_tokens


@torch.no_grad()
def near(
    logits: Tensor, token: Tensor, choice: Tensor, share: float, temperature: Tensor, top_k: Tensor, top_p: Tensor,
    seed: Tensor, position: Tensor, suppress: Tensor | None = None, *, truncated: bool = True, sampled: bool = True,
    per: int = 1,
) -> Tensor:
    """[N] bool: token is the choice, or exp((its score - the choice's) / T) > share and top-k and top-p keep it.

    logits [N, V] of any float dtype; token and choice [N] int64, choice as `choose` made it of the other operands,
    which are those of `choose`; share in (0, 1]. False where there is no choice. Scores are those of `choose`, bit for
    bit, so that they tell apart what it tells apart. It waits for no device. Truncated rows are sorted, unless share
    is 1: then nothing but the choice is good enough, and no row is looked at.
    """
    if share == 1:
        return (token == choice) & (choice >= 0)
    if per > 1:
        temperature, top_k, top_p, seed, position = (
            x[:, None].expand(-1, per).reshape(-1) for x in (temperature, top_k, top_p, seed, position)
        )
        position = position + torch.arange(per, device=logits.device).repeat(len(position) // per)
    pair = torch.stack([token, choice], dim=1).clamp_min(0)
    scores = logits.gather(1, pair).to(torch.float32)
    if sampled:
        noise = arithmetic.gumbel(seed, position, pair).mul_(temperature[:, None])
        scores = noise.add_(scores)
    scale = torch.where(temperature > 0, temperature, 1.0)
    good = scores[:, 1] - scores[:, 0] < scale * -math.log(share)
    if suppress is not None:
        good &= ~(suppress[pair[:, 0]] if suppress.ndim == 1 else suppress.gather(1, pair[:, :1])[:, 0])
    if truncated:
        good &= _kept(logits, pair[:, :1], temperature, top_k, top_p, suppress)
    return ((token == choice) | good) & (choice >= 0)


def _kept(
    logits: Tensor, token: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, suppress: Tensor | None
) -> Tensor:
    """[N] bool: tokens [N, 1] that top-k and top-p keep."""
    scores = logits.to(torch.float32)
    if suppress is not None:
        scores = scores.masked_fill(suppress, -math.inf)
    below = (scores.amax(dim=1, keepdim=True) - scores).nan_to_num_(math.inf, math.inf)
    weights = arithmetic.weights(below.mul_(arithmetic.inverse(temperature)[:, None]))
    return kept_tokens(scores, weights, top_k, top_p).gather(1, token)[:, 0]
