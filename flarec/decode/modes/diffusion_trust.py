"""Diffusion-Trust: a block of masked positions is filled in a few denoising steps, several positions at a time.

Position l of the block is filled from noisy row l - 1, the first one from the clean row before the block, which runs
only in the block's first step: its choice is kept for the others. A finished block becomes clean rows of the next
block's first step (its commit). Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import RequestBatch, prefill
from ..sampling import UNCHOSEN


def decode_diffusion_trust(batch: RequestBatch, chunk: int, threshold: float, steps: int) -> None:
    """Run every request of the batch to its end.

    threshold = confidence at which a position is committed, steps = denoising steps per block (the last commits all).
    Requests may be at different stages of their blocks; one forward serves all.
    """
    assert batch.blocks is not None
    size, mask = batch.blocks.size, batch.blocks.mask_token_id
    rows = len(batch.requests)
    clean_logits, noisy_logits = prefill(batch, chunk)
    block = torch.full((rows, size), mask, dtype=torch.int64, device=batch.device)
    masked = torch.ones(rows, size, dtype=torch.bool, device=batch.device)
    step = torch.zeros(rows, dtype=torch.int64, device=batch.device)
    first, first_confidence = batch.choose(clean_logits, torch.arange(rows, device=batch.device), batch.cache.length)
    while True:
        token, confidence = _candidates(batch, noisy_logits, first, first_confidence)
        commit = _commit(masked, confidence, threshold) | (masked & (step + 1 >= steps)[:, None])
        block = torch.where(commit, token, block)
        masked = masked & ~commit
        step = step + 1
        full = _report(batch, block.masked_fill(masked, -1), commit)

        stay = batch.retire()
        if not batch.requests:
            return
        if stay is not None:
            block, masked, step = block[stay], masked[stay], step[stay]
            first, first_confidence = first[stay], first_confidence[stay]
            full = [full[row] for row in stay.tolist()]
        counts = [size if done else 0 for done in full]
        plan = batch.plan(counts, [[count] for count in counts], [int(done) for done in full])
        clean = block[:, : plan.clean_length]
        done = plan.counts > 0
        block = torch.where(done[:, None], mask, block)
        masked = masked | done[:, None]
        step = torch.where(done, 0, step)
        clean_logits, noisy_logits = batch.forward(plan, clean, block)
        batch.cache.accept(plan.counts)
        noisy_logits = noisy_logits.reshape(len(batch.requests), size - 1, noisy_logits.shape[-1])
        if any(full):
            anchor = batch.cache.length[plan.clean_request]
            token, confidence = batch.choose(clean_logits, plan.clean_request, anchor)
            first = first.index_copy(0, plan.clean_request, token)
            first_confidence = first_confidence.index_copy(0, plan.clean_request, confidence)
        for request in batch.requests:
            request.forwards += 1


def _candidates(batch: RequestBatch, logits: Tensor, first: Tensor, first_confidence: Tensor) -> tuple[Tensor, Tensor]:
    """Token and confidence for every position of the block. logits [requests, size - 1, V] -> [requests, size] each."""
    rows, others, vocab = logits.shape
    requests = torch.arange(rows, device=batch.device).repeat_interleave(others)
    positions = batch.cache.length[:, None] + torch.arange(1, others + 1, device=batch.device)
    token, confidence = batch.choose(logits.reshape(rows * others, vocab), requests, positions.reshape(-1))
    token, confidence = token.reshape(rows, others), confidence.reshape(rows, others)
    return torch.cat([first[:, None], token], dim=1), torch.cat([first_confidence[:, None], confidence], dim=1)


def _commit(masked: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Masked positions that reach the threshold, and the most confident one (ties: the lowest): [requests, size]."""
    best = confidence.masked_fill(~masked, -1.0).argmax(dim=1, keepdim=True)
    chosen = (confidence >= threshold).scatter(1, best, True)
    return masked & chosen


def _report(batch: RequestBatch, block: Tensor, commit: Tensor) -> list[bool]:
    """Emit what became final, the tokens before the first masked position (-1). Returns whose block is full."""
    full = []
    values = torch.cat([commit.sum(dim=1, keepdim=True), block], dim=1).tolist()
    for request, (count, *tokens) in zip(batch.requests, values, strict=True):
        size = len(tokens)
        if UNCHOSEN in tokens:  # also behind a masked position: it would be the input of the next step
            request.check(UNCHOSEN)
        final = tokens.index(-1) if -1 in tokens else size
        request.count(count)
        # earlier blocks are emitted in full, so the rest of the new tokens belong to this block
        request.emit(tokens[len(request.tokens) % size : final])
        full.append(final == size)
    return full
