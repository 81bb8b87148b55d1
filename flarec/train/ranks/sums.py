"""What the ranks found in a step, put together in one collective."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from ..objective.loss import Metrics
from ..router import ExpertLoad
from .group import Ranks


def over_ranks(
    ranks: Ranks, losses: Tensor, metrics: Metrics, experts: ExpertLoad | None
) -> tuple[Tensor, Metrics, ExpertLoad | None]:
    """The losses [micro batches] of all ranks, one behind the other, and the sums of the others, on every rank.

    A loss that is not finite stays at its place. Sums are made in float64, in which counts are exact.
    """
    if ranks.size == 1:
        return losses, metrics, experts
    every = losses.new_zeros(ranks.size * len(losses))
    every[ranks.share(len(every))] = losses
    parts = [every, *(getattr(metrics, item.name) for item in fields(metrics)), *(experts.counts if experts else ())]
    total = torch.cat([part.flatten().double() for part in parts])
    ranks.sum(total)
    summed = [
        value.view(part.shape).to(part.dtype)
        for value, part in zip(total.split([part.numel() for part in parts]), parts, strict=True)
    ]
    count = len(fields(metrics))
    load = None if experts is None else ExpertLoad(experts.layers, tuple(summed[1 + count :]))
    return summed[0], Metrics(*summed[1 : 1 + count]), load
