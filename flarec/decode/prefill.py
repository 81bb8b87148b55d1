"""Reading prompts, a chunk per forward; the last chunk carries the first noisy block of every prompt."""

from __future__ import annotations

import torch

from .rows import Rows


class Prefill:
    """The prompts of some rows, all with the same number of chunks."""

    def __init__(self, rows: Rows, chunk: int) -> None:
        self.rows = rows
        self.chunk = chunk
        self._start = 0

    @staticmethod
    def chunks(tokens: int, chunk: int) -> int:
        return -(-tokens // chunk)

    def advance(self) -> bool:
        """One forward. True if it was the last one: the rows have started, and may step."""
        rows = self.rows
        prompts = [request.prompt for request in rows.requests]
        end = self._start + self.chunk
        last = max(map(len, prompts)) <= end
        pieces = [prompt[self._start : end] for prompt in prompts]
        blocks = [[len(piece)] if last and rows.blocks else [] for piece in pieces]
        plan = rows.plan([len(piece) for piece in pieces], blocks, [int(last)] * len(pieces))
        logits = rows.run(plan, torch.cat([rows.clean(pieces), rows.masked(plan)], dim=1))
        rows.cache.accept(plan.counts)
        self._start = end
        if last:
            clean, noisy = logits.split([len(pieces), len(logits) - len(pieces)])
            blocks_of, heads = (1, rows.blocks.heads) if rows.blocks else (0, 0)
            rows.start(clean[:, None], noisy.view(len(pieces), blocks_of, heads, logits.shape[1]))
        return last
