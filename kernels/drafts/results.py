"""What the two functions between the choices of an AR-Trust step return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Verified(NamedTuple):
    """accepted [B] drafts; commit [B] clean rows to keep, 0 where nobody is; length [B] and token [B] behind them;
    source [B * heads]: rows of the noisy logits that draft behind them, None where there is one block. int64."""

    accepted: Tensor
    commit: Tensor
    length: Tensor
    token: Tensor
    source: Tensor | None


class NextDrafts(NamedTuple):
    """pending [B], drafts [B, size] and have [B] of the next step; report [B, 2 + n + 1]: accepted, have, choice."""

    pending: Tensor
    drafts: Tensor
    have: Tensor
    report: Tensor
