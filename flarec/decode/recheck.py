"""Recheck: clean rows that commit tokens of noisy rows say how far those are from the clean stream's own choice.

The first token that is too far is taken back, with those behind it. Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .request import Origin, Request
from .rows import Rows


class Checked(NamedTuple):
    """choice and confidence [rows, n] of the clean rows, kept [rows] of them and again [rows] bool, whether some were
    taken back; told [rows, 2 n], for `Recheck.emit`; notes [rows, n, k] of what may be emitted, if they are wanted."""

    choice: Tensor
    confidence: Tensor
    kept: Tensor
    again: Tensor
    told: Tensor
    notes: Tensor | None

    def last(self, values: Tensor) -> Tensor:
        """Of values [rows, n, ...] those of the last row that is kept [rows, 1, ...]; of the first where none is."""
        place = (self.kept - 1).clamp_min(0).view(-1, *[1] * (values.ndim - 1))
        return values.gather(1, place.expand(-1, 1, *values.shape[2:]))


class Recheck:
    """share = what is left of the weight of the clean stream's choice in a token that is kept, more than that; > 0."""

    def __init__(self, share: float) -> None:
        self.share = share

    def look(
        self, rows: Rows, logits: Tensor, tokens: Tensor, count: Tensor, notes: Tensor | None, *,
        confidence: bool = False,
    ) -> Checked:
        """Of a step's clean rows, before any is accepted. logits [rows, n, V], tokens [rows, n] int64 that they read
        (any id in the place of a negative one, which no row chose and none keeps), of which count [rows] belong to the
        request (the first one from a clean row); notes [rows, at least n, k] of
        the tokens, if they are wanted."""
        slot = torch.arange(tokens.shape[1], device=rows.device)
        choice, probability = rows.choose(logits, rows.cache.length + 1, confidence=confidence)
        drafted = slot < (count - 1)[:, None]  # rows with a token of the request behind them: others may be any id
        behind = torch.where(drafted, tokens.roll(-1, 1), choice)
        good = rows.near(logits, behind, choice, self.share, rows.cache.length + 1) & drafted & (behind >= 0)
        kept = good.long().cumprod(dim=1).sum(dim=1) + (count > 0)
        told = torch.cat([kept[:, None], tokens[:, 1:], choice], dim=1)
        if (own := rows.note(logits, choice)) is not None:
            assert notes is not None
            others = (slot < (kept - 1)[:, None]) & (behind != choice)  # kept though this row chose another
            own = torch.where(others[..., None], notes[:, : len(slot)].roll(-1, 1), own)
        return Checked(choice, probability, kept, kept < count, told, own)

    def emit(self, request: Request, told: list[int], count: int) -> None:
        """What no step takes back any more: the tokens of noisy rows that were kept, and the clean stream's choice
        behind them. told: empty for a step without clean rows. count: tokens that the step looked at, with the first
        one."""
        kept, size = told[0] if told else 0, len(told) // 2
        request.count(max(0, kept - 1))
        if not kept:
            return
        tokens, choice = told[1:size], told[size:]
        request.taken_back += max(0, count - kept)
        origins: list[Origin] = [
            "accepted" if token == own else "unverified"
            for token, own in zip(tokens[: kept - 1], choice[: kept - 1], strict=True)
        ]
        last: Origin = "corrected" if kept < count else "clean"
        request.emit([*tokens[: kept - 1], choice[kept - 1]], [*origins, last])
