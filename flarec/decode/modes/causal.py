"""Causal decoding: one token per forward, from the clean stream alone."""

from __future__ import annotations

import torch

from ..batch import RequestBatch, prefill


def decode_causal(batch: RequestBatch, chunk: int) -> None:
    """Run every request of the batch to its end."""
    logits, _ = prefill(batch, chunk)
    while True:
        requests = torch.arange(len(batch.requests), device=batch.device)
        token, _ = batch.choose(logits, requests, batch.cache.length)
        for request, new in zip(batch.requests, token.tolist(), strict=True):
            request.emit([new])
        stay = batch.retire()
        if not batch.requests:
            return
        if stay is not None:
            token = token[stay]
        plan = batch.plan([1] * len(batch.requests))
        logits, _ = batch.forward(plan, token[:, None], batch.masked(plan))
        batch.cache.accept(plan.counts)
        for request in batch.requests:
            request.forwards += 1
