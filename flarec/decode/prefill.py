"""Reading prompts, a piece per forward; the last piece carries the first noisy block of every prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import DecodeProgram
from .prefix import Prefix, PrefixCache, restore
from .request import Request
from .rows import Rows


class Prefill:
    """The prompts of some rows, of each of which the same number of chunks is left.

    A forward is queued, and nothing waits for it but the first tokens, behind the last one.

    chunk     clean rows per prompt and forward, or a multiple of it; with a prefix cache some pages (`whole_pages`)
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
        page = prefixes.page if prefixes is not None else 1
        self._left = [
            chunk_ends(len(request.prompt), chunk, prefix, page)
            for request, prefix in zip(rows.requests, self.known, strict=True)
        ]
        self._uncommitted: dict[Request, tuple[Tensor, Tensor]] = {}  # with the logits of their ends
        if any(self._at):
            restore(rows.cache, self.known)

    def advance(self, most: int = 0) -> bool:
        """One forward, if one is left, of as many chunks as `most` clean rows hold, at least one, and no further than a
        branch. True if it was the last one: the rows have started, and may step."""
        rows, at = self.rows, self._at
        prompts = [request.prompt for request in rows.requests]
        if not any(self._left):
            self._start_from_logits()
            return True
        chunks = max(1, most // (self.chunk * len(prompts)))
        for left, prefix in zip(self._left, self.known, strict=True):
            chunks = min(chunks, 1 + left.index(prefix.branch) if prefix.branch in left else len(left))
        ends = [left[chunks - 1] for left in self._left]
        self._left = [left[chunks:] for left in self._left]
        last = not any(self._left)
        pieces = [prompt[start:end] for prompt, start, end in zip(prompts, at, ends, strict=True)]
        blocks = [[len(piece)] if last and rows.blocks else [] for piece in pieces]
        plan = rows.plan([len(piece) for piece in pieces], blocks, [int(last)] * len(pieces))
        ids = torch.cat([rows.clean(pieces), rows.masked(plan)], dim=1)
        logits = rows.run(plan, ids, program=self.program, cached=at)
        self.forwards += 1
        rows.cache.accept(plan.counts)
        self._at = ends
        if last:
            clean, noisy = logits.split([len(pieces), len(logits) - len(pieces)])
            blocks_of, heads = (1, rows.blocks.heads) if rows.blocks else (0, 0)
            clean, noisy = clean[:, None], noisy.view(len(pieces), blocks_of, heads, logits.shape[1])
            rows.start(clean, noisy)  # first of all: somebody waits for these tokens
        self._keep_pages(at, ends)
        if last:
            self._keep_ends([len(piece) for piece in pieces], clean, noisy)
        return last

    def _start_from_logits(self) -> None:
        """Every prompt is known to its end."""
        pairs = [prefix.logits for prefix in self.known if prefix.logits is not None]
        assert len(pairs) == len(self.known)
        self.rows.start(torch.cat([clean for clean, _ in pairs]), torch.cat([noisy for _, noisy in pairs]))

    def _keep_pages(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        """The forward that just ran read the pages between these, and committed what was read before it."""
        if self.prefixes is None:
            return
        page, cache = self.prefixes.page, self.rows.cache
        for row, (request, start, end) in enumerate(zip(self.rows.requests, starts, ends, strict=True)):
            prompt = request.prompt
            node = None
            if start and start % page == 0:
                node = self.prefixes.add_page(self.program, prompt, start, cache, row)
            # the last page of a prompt, also a full one, is its end
            for place in range(start // page * page + page, min(end, len(prompt) - 1) + 1, page):
                node = self.prefixes.add_page(self.program, prompt, place, cache, row, states=False, behind=node)
                if node is None:
                    break  # nothing leads to those behind it

    def _keep_ends(self, pending: Sequence[int], clean: Tensor, noisy: Tensor) -> None:
        """The last forward has run. Pending rows of more than a page are no states to keep: those ends are kept once
        they are committed (`keep_committed`)."""
        if self.prefixes is None or (self.rows.blocks is not None and self.rows.blocks.noise is not None):
            return  # what a block of random ids gives belongs to the request's seed
        for row, (request, count) in enumerate(zip(self.rows.requests, pending, strict=True)):
            logits = clean[row : row + 1], noisy[row : row + 1]
            if count > self.prefixes.page and self.rows.cache.has_states:
                self._uncommitted[request] = logits
            else:
                self._keep_end(request, row, count, logits)

    def keep_committed(self) -> None:
        """Keep the ends that are left: the rows, of the prompts that go on, have just taken their first step."""
        for row, request in enumerate(self.rows.requests):
            if request in self._uncommitted:
                self._keep_end(request, row, 0, self._uncommitted[request])
        self._uncommitted.clear()

    def _keep_end(self, request: Request, row: int, pending: int, logits: tuple[Tensor, Tensor]) -> None:
        assert self.prefixes is not None
        cache = self.rows.cache
        self.prefixes.add_end(self.program, request.prompt, cache, row, pending, self.rows.blocks, logits)


def chunk_ends(tokens: int, chunk: int, known: Prefix, page: int = 1) -> list[int]:
    """Where the chunks of a prompt end, behind what is known of it. Those before a branch end there; all but the last
    one end at pages, of which a chunk is some."""
    ends: list[int] = []
    at = known.length
    for until in (known.branch, tokens):
        while at < until:
            at = min(until, (at + chunk) // page * page)
            ends.append(at)
    return ends


def whole_pages(chunk: int, page: int) -> int:
    """The most pages within a chunk, at least one, in tokens."""
    return max(1, chunk // page) * page
