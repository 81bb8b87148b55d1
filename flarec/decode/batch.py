"""A batch of running requests: their cache, their sampling parameters, and the one way to run a forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flarec.base.generation import GenerationOptions

from .cache import Cache
from .plan import DecodeProgram, StepPlan
from .request import Request
from .sampling import SamplingRows, choose
from .stepper import BlockSpec, Stepper


class RequestBatch(Stepper):
    """Requests that decode together. Row b of every tensor belongs to `requests[b]`; finished requests leave.

    suppress [n] int64 = ids that are never chosen.
    """

    def __init__(
        self,
        program: DecodeProgram,
        requests: Sequence[Request],
        options: Sequence[GenerationOptions],
        suppress: Sequence[int],
        blocks: BlockSpec | None = None,
    ) -> None:
        self.requests = list(requests)
        capacity = self._longest() + 1
        super().__init__(
            program, Cache.allocate(program.cache_slots, len(requests), capacity, program.device), blocks
        )
        self.sampling = SamplingRows.build(options, self.device)
        self.suppress = torch.tensor(list(suppress), dtype=torch.int64, device=self.device)

    def _longest(self) -> int:
        return max(request.length for request in self.requests)

    def forward(self, plan: StepPlan, clean: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step. clean [requests, clean slots], noisy [requests, noisy slots] int64.

        Returns the logits of the clean rows [clean, V] and of the noisy rows [noisy, V], ordered as in `StepPlan`. The
        caller tells the cache afterwards how many clean rows it accepts.
        """
        self.cache.reserve(self._longest() + plan.clean_length)
        logits = self.run(plan, torch.cat([clean, noisy], dim=1))
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
        self.select(rows)
        self.sampling = self.sampling.take(rows)
        return rows


def prefill(batch: RequestBatch, chunk: int) -> tuple[Tensor, Tensor]:
    """Run the prompts, `chunk` clean rows at a time; each prompt's last chunk carries its first noisy block.

    Returns the logits of every request's last prompt row [requests, V] and of its block's rows [requests, heads, V] (0
    rows without blocks). Afterwards the cache holds the prompts, and every request has taken part in one forward.
    """
    lengths = [len(request.prompt) for request in batch.requests]
    order: list[int] = []
    clean_parts, noisy_parts = [], []
    for start in range(0, max(lengths), chunk):
        pieces = [request.prompt[start : start + chunk] for request in batch.requests]
        ends = [start < length <= start + chunk for length in lengths]
        blocks = [[len(piece)] if end and batch.blocks else [] for piece, end in zip(pieces, ends, strict=True)]
        plan = batch.plan([len(piece) for piece in pieces], blocks, [int(end) for end in ends])
        clean_logits, noisy_logits = batch.forward(plan, batch.clean(pieces), batch.masked(plan))
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
