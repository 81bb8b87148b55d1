"""The two functions of an AR-Trust step that are no choice of tokens; of tensors, without waiting for a device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .results import NextDrafts, Verified


def verify(
    choice: Tensor, drafts: Tensor, have: Tensor, length: Tensor, active: Tensor | None, *, blocks: int, heads: int,
    right: Tensor | None = None, implementation: str | None = None,
) -> Verified:
    """Accept drafts up to the first that the clean stream did not choose.

    choice [B, n + 1] int64 of n drafts' rows and the one behind them; drafts [B, at least n] int64, of which have [B]
    are drafts; length [B] cached tokens; active [B] bool, None: all are; blocks: of each request, `heads` rows with
    logits each: one behind every clean row, or one. right [B, n] bool: which drafts are right; None: those that equal
    the choice.

    "triton", "torch" or None for Triton where the choice is on a GPU: the same integers.
    """
    given = (choice, drafts, have, length, active, blocks, heads, right)
    verified: Verified = _implementation(implementation, choice).verify(*given)
    return verified


def keep(
    verified: Verified, choice: Tensor, draft: Tensor, have: Tensor, size: int, *, branches: bool,
    implementation: str | None = None,
) -> NextDrafts:
    """What the next step starts from. draft [B, b] int64, chosen from a block of b <= size rows.

    branches: there is a block behind every clean row, so the drafts stand behind what was accepted; else behind the
    last draft, and are of no use unless all of the `have` [B] drafts were accepted. What could not be chosen is kept as
    0, a draft like any other.
    """
    kept: NextDrafts = _implementation(implementation, choice).keep(verified, choice, draft, have, size, branches)
    return kept


def _implementation(name: str | None, like: Tensor) -> Any:
    if (name or ("triton" if like.is_cuda else "torch")) == "triton":
        from . import triton_drafts

        return triton_drafts
    from . import torch_drafts

    return torch_drafts
