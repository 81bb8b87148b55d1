"""Reading prompts, a chunk per forward; the last chunk carries the first noisy block of every prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import DecodeProgram
from .prefix import Prefix, PrefixCache, restore
from .rows import Rows


class Prefill:
    """The prompts of some rows, of each of which the same number of chunks is left.

    A forward is queued, and nothing waits for it but the first tokens, behind the last one.

    chunk     clean rows per prompt and forward, or a multiple of it; with a prefix cache the length of its pages
    prefixes  where prompts are kept, and known: what is known of each prompt
    program   runs the forwards (default: that of the rows); prefixes are those that it read
    forwards  that were run
    """

    def __init__(
        self, rows: Rows, chunk: int, prefixes: PrefixCache | None = None, known: Sequence[Prefix] = (),
        program: DecodeProgram | None = None,
    ) -> None:
        self.rows = rows
        self.program = rows.program if program is None else program
        self.chunk = chunk
        self.prefixes = prefixes
        self.known = list(known) or [Prefix()] * len(rows.requests)
        self.forwards = 0
        self._at = [prefix.length for prefix in self.known]
        if any(self._at):
            restore(rows.cache, self.known)

    @staticmethod
    def chunks(tokens: int, chunk: int, known: int = 0) -> int:
        """Forwards that read a prompt of which the first `known` tokens are known; chunks end at multiples of their
        length."""
        return -(-tokens // chunk) - known // chunk if known < tokens else 0

    def advance(self, most: int = 0) -> bool:
        """One forward, if one is left, of as many chunks as `most` clean rows hold, at least one. True if it was the
        last one: the rows have started, and may step."""
        rows, at = self.rows, self._at
        prompts = [request.prompt for request in rows.requests]
        if at == list(map(len, prompts)):
            self._start_from_logits()
            return True
        # where pages are kept each is a forward: states are there behind one alone
        chunks = 1 if self.prefixes is not None else max(1, most // (self.chunk * len(prompts)))
        ends = [
            min(len(prompt), (start // self.chunk + chunks) * self.chunk)
            for prompt, start in zip(prompts, at, strict=True)
        ]
        last = ends == list(map(len, prompts))
        pieces = [prompt[start:end] for prompt, start, end in zip(prompts, at, ends, strict=True)]
        blocks = [[len(piece)] if last and rows.blocks else [] for piece in pieces]
        plan = rows.plan([len(piece) for piece in pieces], blocks, [int(last)] * len(pieces))
        ids = torch.cat([rows.clean(pieces), rows.masked(plan)], dim=1)
        logits = rows.run(plan, ids, program=self.program, cached=at)
        self.forwards += 1
        rows.cache.accept(plan.counts)
        self._keep_pages()
        self._at = ends
        if last:
            clean, noisy = logits.split([len(pieces), len(logits) - len(pieces)])
            blocks_of, heads = (1, rows.blocks.heads) if rows.blocks else (0, 0)
            clean, noisy = clean[:, None], noisy.view(len(pieces), blocks_of, heads, logits.shape[1])
            self._keep_ends([len(piece) for piece in pieces], clean, noisy)
            rows.start(clean, noisy)
        return last

    def _start_from_logits(self) -> None:
        """Every prompt is known to its end."""
        pairs = [prefix.logits for prefix in self.known if prefix.logits is not None]
        assert len(pairs) == len(self.known)
        self.rows.start(torch.cat([clean for clean, _ in pairs]), torch.cat([noisy for _, noisy in pairs]))

    def _keep_pages(self) -> None:
        """The forward that just ran committed what was read before it: pages that end there can be kept."""
        if self.prefixes is None:
            return
        for row, (request, at) in enumerate(zip(self.rows.requests, self._at, strict=True)):
            if at and at % self.chunk == 0:
                self.prefixes.add_page(self.program, request.prompt, at, self.rows.cache, row)

    def _keep_ends(self, pending: Sequence[int], clean: Tensor, noisy: Tensor) -> None:
        if self.prefixes is None or (self.rows.blocks is not None and self.rows.blocks.noise is not None):
            return  # what a block of random ids gives belongs to the request's seed
        for row, (request, count) in enumerate(zip(self.rows.requests, pending, strict=True)):
            logits = clean[row : row + 1], noisy[row : row + 1]
            self.prefixes.add_end(
                self.program, request.prompt, self.rows.cache, row, count, self.rows.blocks, logits
            )
