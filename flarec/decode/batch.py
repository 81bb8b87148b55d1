"""A batch of running requests: their cache, their sampling parameters, and the one way to run a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Cache
from .plan import DecodeProgram, StepPlan, StepShape
from .request import Request
from .sampling import SamplingParams, SamplingRows, choose

MAX_PLANS = 256  # which requests of a batch commit together varies; the plans kept for reuse must not grow forever


@dataclass(frozen=True)
class BlockSpec:
    """The noisy blocks that a mode drafts or denoises with.

    size = noisy rows per block, heads = how many of its first rows need logits, readout = "causal" or "block_end",
    mask_token_id = input id of a masked position.
    """

    size: int
    heads: int
    readout: str
    mask_token_id: int


class Batch:
    """Requests that decode together. Row b of every tensor belongs to `requests[b]`; finished requests leave."""

    def __init__(
        self,
        program: DecodeProgram,
        requests: Sequence[Request],
        params: Sequence[SamplingParams],
        suppress: Sequence[int],
        blocks: BlockSpec | None = None,
    ) -> None:
        self.program = program
        self.device = program.device
        self.requests = list(requests)
        self.blocks = blocks
        self.sampling = SamplingRows.build(params, self.device)
        self.suppress = torch.tensor(list(suppress), dtype=torch.int64, device=self.device)
        self.cache = Cache.allocate(program.cache_slots, len(self.requests), self._longest() + 1, self.device)
        self._plans: dict[StepShape, StepPlan] = {}

    def _longest(self) -> int:
        return max(request.length for request in self.requests)

    def plan(
        self, counts: Sequence[int], anchors: Sequence[Sequence[int]] | None = None, heads: Sequence[int] | None = None
    ) -> StepPlan:
        """The plan of a step with these clean rows, relative anchors and clean rows with logits (default: all)."""
        blocks = self.blocks or BlockSpec(1, 0, "causal", 0)
        shape = StepShape(
            counts=tuple(counts),
            anchors=tuple(tuple(row) for row in anchors) if anchors is not None else ((),) * len(counts),
            heads=tuple(heads) if heads is not None else tuple(counts),
            block_size=blocks.size,
            block_heads=blocks.heads,
            readout=blocks.readout,
        )
        if shape not in self._plans:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[shape] = StepPlan(shape, self.device)
        return self._plans[shape]

    def masked(self, plan: StepPlan) -> Tensor:
        """Input ids of fully masked blocks, [requests, noisy slots]."""
        mask = self.blocks.mask_token_id if self.blocks is not None else 0
        return torch.full((len(self.requests), plan.noisy_length), mask, dtype=torch.int64, device=self.device)

    def forward(self, plan: StepPlan, clean: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step. clean [requests, clean slots], noisy [requests, noisy slots] int64.

        Returns the logits of the clean rows [clean, V] and of the noisy rows [noisy, V], ordered as in `StepPlan`. The
        caller tells the cache afterwards how many clean rows it accepts.
        """
        self.cache.reserve(self._longest() + plan.clean_length)
        layout = plan.layout(self.cache.length)
        logits = self.program.step(torch.cat([clean, noisy], dim=1), layout, plan.head_rows, self.cache)
        return logits[: plan.clean_rows], logits[plan.clean_rows :]

    def choose(self, logits: Tensor, request: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A token and its probability for each row of `logits` [N, V], of `request` [N], for `positions` [N]."""
        return choose(logits, self.sampling.take(request), positions, self.suppress)

    def retire(self) -> Tensor | None:
        """Drop finished requests. Returns the rows that stay [n] int64 if some are dropped, None if all stay."""
        stay = [row for row, request in enumerate(self.requests) if not request.finished]
        if len(stay) == len(self.requests):
            return None
        rows = torch.tensor(stay, dtype=torch.int64, device=self.device)
        self.requests = [self.requests[row] for row in stay]
        self.cache.select(rows)
        self.sampling = self.sampling.take(rows)
        self._plans.clear()  # made for the old batch size
        return rows


def prefill(batch: Batch, chunk: int) -> tuple[Tensor, Tensor]:
    """Run the prompts, `chunk` clean rows at a time; each prompt's last chunk carries its first noisy block.

    Returns the logits of every request's last prompt row [requests, V] and of its block's rows [requests, heads, V] (0
    rows without blocks). Afterwards the cache holds the prompts, and every request has taken part in one forward.
    """
    lengths = [len(request.prompt) for request in batch.requests]
    order: list[int] = []
    clean_parts, noisy_parts = [], []
    for start in range(0, max(lengths), chunk):
        counts = [min(max(length - start, 0), chunk) for length in lengths]
        ends = [start < length <= start + chunk for length in lengths]
        anchors = [[count] if end and batch.blocks is not None else [] for count, end in zip(counts, ends, strict=True)]
        plan = batch.plan(counts, anchors, [int(end) for end in ends])
        width = plan.clean_length
        pieces = [request.prompt[start : start + count] for request, count in zip(batch.requests, counts, strict=True)]
        rows = [piece + [0] * (width - len(piece)) for piece in pieces]
        clean = torch.tensor(rows, dtype=torch.int64, device=batch.device)
        clean_logits, noisy_logits = batch.forward(plan, clean, batch.masked(plan))
        batch.cache.accept(plan.counts)
        order += [row for row, end in enumerate(ends) if end]
        clean_parts.append(clean_logits)
        noisy_parts.append(noisy_logits)
    for request in batch.requests:
        request.forwards += 1
    place = torch.tensor(order, dtype=torch.int64, device=batch.device).argsort()
    clean_logits, noisy_logits = torch.cat(clean_parts), torch.cat(noisy_parts)
    heads = batch.blocks.heads if batch.blocks is not None else 0
    noisy_logits = noisy_logits.reshape(len(lengths), heads, clean_logits.shape[1])
    return clean_logits[place], noisy_logits[place]
