"""AR-Trust: noisy blocks draft, the clean stream decides. Returns what causal decoding returns, in fewer forwards.

One forward verifies the drafts and drafts the next block. Its clean rows are the pending token (emitted, not yet in the
cache) and the drafts; clean row i chooses the token at its position plus one. A draft is accepted while it equals that
choice; the first choice that differs (or the one after the last draft) is the next pending token. Noisy row l drafts
the token for l + 1, with that position's noise. Worked example: docs/semantics.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.base.generation import DRAFTS

from ..batch import RequestBatch, prefill


def decode_ar_trust(batch: RequestBatch, chunk: int, drafts: str) -> None:
    """Run every request of the batch to its end.

    drafts = "branches": one block after every clean row, so whatever is accepted, the next block is there;
    "single": one block after the last draft, so a rejection costs a forward with one clean row.
    """
    assert batch.blocks is not None and drafts in DRAFTS
    size = batch.blocks.size
    logits, noisy_logits = prefill(batch, chunk)
    requests = torch.arange(len(batch.requests), device=batch.device)
    pending, _ = batch.choose(logits, requests, batch.cache.length)
    draft = _draft(batch, noisy_logits, batch.cache.length)
    for request, token in zip(batch.requests, pending.tolist(), strict=True):
        request.emit([token])
    drafted = [True] * len(batch.requests)  # which requests have drafts for the next step
    while True:
        stay = batch.retire()
        if not batch.requests:
            return
        if stay is not None:
            pending, draft = pending[stay], draft[stay]
            drafted = [drafted[row] for row in stay.tolist()]
        counts = [1 + size if has else 1 for has in drafted]
        anchors = [range(1, count + 1) if drafts == "branches" else [count] for count in counts]
        plan = batch.plan(counts, anchors)
        clean = torch.cat([pending[:, None], draft], dim=1)[:, : plan.clean_length]
        clean_logits, noisy_logits = batch.forward(plan, clean, batch.masked(plan))

        cached = batch.cache.length
        choice, _ = batch.choose(clean_logits, plan.clean_request, cached[plan.clean_request] + plan.clean_slot + 1)
        target = torch.full_like(clean, -1)  # -1 equals no draft: rows without a draft end the acceptance
        target[plan.clean_request, plan.clean_slot] = choice
        accepted = (clean[:, 1:] == target[:, :-1]).logical_and(target[:, 1:] != -1).cumprod(dim=1).sum(dim=1)
        pending = target.gather(1, accepted[:, None]).squeeze(1)
        batch.cache.accept(accepted + 1)

        # the block anchored right after the accepted rows; "single" has but one, useless unless all were accepted
        block = plan.first_block + accepted if drafts == "branches" else plan.first_block
        noisy_logits = noisy_logits.reshape(-1, size, noisy_logits.shape[-1])
        draft = _draft(batch, noisy_logits[block], batch.cache.length)
        for row, (count, *tokens) in enumerate(torch.cat([accepted[:, None], target], dim=1).tolist()):
            request = batch.requests[row]
            request.forwards += 1
            request.count(count)
            request.emit(tokens[: count + 1])
            drafted[row] = drafts == "branches" or count + 1 == counts[row]


def _draft(batch: RequestBatch, logits: Tensor, anchor: Tensor) -> Tensor:
    """Choose the drafts of one block per request. logits [requests, size, V], anchor [requests] -> [requests, size]."""
    rows, size, vocab = logits.shape
    requests = torch.arange(rows, device=batch.device).repeat_interleave(size)
    positions = anchor[:, None] + torch.arange(1, size + 1, device=batch.device)
    token, _ = batch.choose(logits.reshape(rows * size, vocab), requests, positions.reshape(-1))
    return token.reshape(rows, size).clamp_min(0)  # what cannot be chosen is a draft like any other: to be rejected
