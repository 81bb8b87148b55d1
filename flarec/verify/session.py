"""Known tokens fed through the decode program in any pieces, with or without drafts that are rejected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flarec.decode import Cache
from flarec.layout import Block, build_layout

from .subject import Comparison, Subject


class Session:
    """A batch of requests whose tokens are known; `fed[b]` of them are in the cache or pending."""

    def __init__(self, subject: Subject, tokens: Sequence[Sequence[int]]) -> None:
        self.subject, self.tokens = subject, [list(row) for row in tokens]
        self.fed = [0] * len(self.tokens)
        longest = max(len(row) for row in self.tokens)
        self.cache = Cache.allocate(subject.decode.cache_slots, len(self.tokens), longest + 16, subject.decode.device)

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
        size, readout = self.subject.block_size, self.subject.readouts[0]
        blocks = [
            [Block(0, fed + i + 1, size, 0, readout) for i in range(len(piece))] if rejected is not None else []
            for fed, piece in zip(self.fed, pieces, strict=True)
        ]
        logits = self._step(pieces, blocks)
        self.cache.accept(torch.tensor(counts))
        self.fed = [fed + count for fed, count in zip(self.fed, counts, strict=True)]
        return [rows[:count] for rows, count in zip(logits, counts, strict=True)]

    def flush(self) -> None:
        """A denoise step without clean rows: what is pending gets committed."""
        block = [[Block(0, fed, self.subject.block_size)] for fed in self.fed]
        self._step([[] for _ in self.fed], block)
        self.cache.accept(torch.zeros(len(self.fed), dtype=torch.int64))

    def _step(self, pieces: Sequence[list[int]], blocks: Sequence[list[Block]]) -> Tensor:
        """[rows, T, V] logits of one step."""
        layout = build_layout([[len(piece)] for piece in pieces], blocks, cached=self.fed).validate()
        ids = torch.full((layout.rows, layout.length), self.subject.mask_token_id)
        for row, piece in enumerate(pieces):
            ids[row, : layout.clean_length] = 0
            ids[row, : len(piece)] = torch.tensor(piece, dtype=torch.int64)
        self.cache.reserve(max(self.fed) + layout.clean_length)
        head = torch.arange(layout.rows * layout.length)
        logits = self.subject.decode.step(ids, layout, head, self.cache)
        return logits.reshape(layout.rows, layout.length, -1)


def compare_caches(comparison: Comparison, a: Session, b: Session) -> int:
    """Compare all flushed caches; keys and values up to each request's length. Returns how many tensors."""
    assert a.fed == b.fed
    for slot in a.subject.decode.cache_slots:
        for row, length in enumerate(a.fed):
            pair = [session.cache.tensors[slot.name][row] for session in (a, b)]
            if slot.in_place:
                pair = [tensor[:, :length] for tensor in pair]
            comparison.add(*pair)
    return len(a.subject.decode.cache_slots)
