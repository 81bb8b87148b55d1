"""Between the choices of an AR-Trust step, in PyTorch operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .results import NextDrafts, Verified


def verify(
    choice: Tensor, drafts: Tensor, have: Tensor, length: Tensor, active: Tensor | None, blocks: int, heads: int,
    right: Tensor | None,
) -> Verified:
    count, device = choice.shape[1] - 1, choice.device
    if right is None:
        right = drafts[:, :count] == choice[:, :-1]
    right = right & (torch.arange(count, device=device) < have[:, None])
    accepted = right.long().cumprod(dim=1).sum(dim=1)
    commit = accepted + 1
    if active is not None:
        commit = commit * active
    source = None
    if blocks > 1:
        row = torch.arange(len(choice), device=device) * blocks + accepted
        source = (row[:, None] * heads + torch.arange(heads, device=device)).reshape(-1)
    token = choice.gather(1, accepted[:, None])[:, 0]
    return Verified(accepted, commit, length + commit, token, source)


def keep(
    verified: Verified, choice: Tensor, draft: Tensor, have: Tensor, size: int, branches: bool
) -> NextDrafts:
    count = choice.shape[1] - 1
    drafts = pad(draft.clamp_min(0), (0, size - draft.shape[1]))
    now = torch.full_like(have, draft.shape[1])
    if not branches:
        now = now * (verified.accepted == have.clamp_max(count))
    report = torch.cat([verified.accepted[:, None], now[:, None], choice], dim=1)
    return NextDrafts(verified.token.clamp_min(0), drafts, now, report)
