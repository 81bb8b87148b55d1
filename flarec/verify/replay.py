"""Known tokens fed through the decode program in any pieces, with or without drafts that are rejected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flarec.decode import BlockSpec, Cache, Stepper

from .subject import Comparison, Subject


class Replay(Stepper):
    """Requests whose tokens are known; `fed[b]` of them are in the cache or pending."""

    def __init__(self, subject: Subject, tokens: Sequence[Sequence[int]]) -> None:
        self.subject = subject
        self.tokens = [list(row) for row in tokens]
        self.fed = [0] * len(self.tokens)
        program, longest = subject.decode, max(len(row) for row in self.tokens)
        cache = Cache.allocate(program.cache_slots, len(self.tokens), longest + 16, program.device)
        super().__init__(program, cache, BlockSpec(subject.block_size, 0, subject.readouts[0], subject.mask_token_id))

    def left(self) -> list[int]:
        return [len(row) - fed for row, fed in zip(self.tokens, self.fed, strict=True)]

    def feed(self, counts: Sequence[int], rejected: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """One step with the next `counts[b]` tokens of each request; returns their logits [counts[b], V].

        `rejected[b]` are drafts behind them that are not accepted; with them the step carries a masked block behind
        every clean row, as AR-Trust's steps do.
        """
        drafts = rejected if rejected is not None else [[] for _ in counts]
        pieces = [
            [*row[fed : fed + count], *draft]
            for row, fed, count, draft in zip(self.tokens, self.fed, counts, drafts, strict=True)
        ]
        anchors = [range(1, len(piece) + 1) if rejected is not None else [] for piece in pieces]
        logits = self._step(pieces, anchors)
        self.cache.accept(torch.tensor(counts, device=self.device))
        self.fed = [fed + count for fed, count in zip(self.fed, counts, strict=True)]
        return [rows[:count] for rows, count in zip(logits, counts, strict=True)]

    def flush(self) -> None:
        """A denoise step without clean rows: what is pending gets committed."""
        self._step([[] for _ in self.fed], [[0] for _ in self.fed])
        self.cache.accept(torch.zeros(len(self.fed), dtype=torch.int64, device=self.device))

    def _step(self, pieces: Sequence[list[int]], anchors: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The logits of each request's piece, [length, V]."""
        plan = self.plan([len(piece) for piece in pieces], anchors)
        self.layouts.of(plan.shape, self.cache.length).validate()
        self.cache.reserve(max(self.fed) + plan.clean_length)
        logits = self.run(plan, torch.cat([self.clean(pieces), self.masked(plan)], dim=1), cached=self.fed)
        return torch.split(logits, [len(piece) for piece in pieces])


def compare_caches(comparison: Comparison, a: Replay, b: Replay) -> int:
    """Compare all flushed caches; keys and values up to each request's length. Returns how many tensors."""
    assert a.fed == b.fed and a.tokens == b.tokens
    slacks = [a.subject.slack(tokens) for tokens in a.tokens]
    for slot in a.program.cache_slots:
        for row, length in enumerate(a.fed):
            pair = [replay.cache.tensors[slot.name][row] for replay in (a, b)]
            if slot.in_place:
                pair = [tensor[:, :length] for tensor in pair]
            comparison.add(*pair, slack=slacks[row])
    return len(a.program.cache_slots)
