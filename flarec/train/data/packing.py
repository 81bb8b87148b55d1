"""Packing documents into rows: first fit over a small look-ahead buffer, deterministic, nothing lost or cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .document import Document, PackedRow
from .sources import DataStats, TokenSource
from .stream import Mixture, Reference


class RowStream:
    """An endless, resumable stream of packed rows of at most `max_length` clean tokens.

    A row starts with the document that has waited longest, so none waits forever, and then takes the first document of
    the buffer that still fits, until none does. Documents longer than `max_length` must have been truncated before.
    """

    def __init__(self, sources: Sequence[TokenSource], *, max_length: int, seed: int, lookahead: int = 64) -> None:
        self.mixture = Mixture(sources, seed)
        self.max_length = max_length
        self.lookahead = lookahead
        self._waiting: list[Reference] = []

    def rows(self, count: int) -> list[PackedRow]:
        """The next `count` rows."""
        return [self._row() for _ in range(count)]

    def _row(self) -> PackedRow:
        sources, free = self.mixture.sources, self.max_length
        documents: list[Document] = []
        while True:
            while len(self._waiting) < self.lookahead:
                self._waiting.append(self.mixture.draw())
            lengths = (sources[ref.source].length(ref.document) for ref in self._waiting)
            place = next((at for at, length in enumerate(lengths) if length <= free), None)
            if place is None:
                assert documents, "a document is longer than a row"
                return PackedRow(tuple(documents))
            ref = self._waiting.pop(place)
            documents.append(sources[ref.source].document(ref.document))
            free -= len(documents[-1])

    @property
    def epochs(self) -> list[float]:
        """How often each source has been passed, fractions included."""
        state = zip(self.mixture.epoch, self.mixture.position, self.mixture.sources, strict=True)
        return [epoch + position / len(source) for epoch, position, source in state]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; a stream that loads them continues exactly."""
        return {"mixture": self.mixture.state_dict(), "waiting": [list(ref) for ref in self._waiting]}

    def load_state_dict(self, state: Any) -> None:
        """Continue from a saved position. Raises `CheckpointError` if the data or the seed changed, and for a position
        that these data do not have."""
        table = state if isinstance(state, dict) else {}
        self.mixture.load_state_dict(table.get("mixture"))
        refs = table.get("waiting")
        pairs = isinstance(refs, list) and all(isinstance(ref, list) and len(ref) == 2 for ref in refs)
        waiting = [Reference(*ref) for ref in refs] if isinstance(refs, list) and pairs else None
        if waiting is None or not all(ref.lies_in(self.mixture.sources) for ref in waiting):
            raise CheckpointError("the training state names documents that are not in the data")
        self._waiting = waiting


def full_rows(length: int, batch: int) -> RowStream:
    """Rows of one document of `length` tokens, all but the first of them the response: the most that a row can ask for.
    """
    spans = np.array([[1, length]] * batch)
    tokens = np.zeros(batch * length, dtype=np.int32)
    starts = np.arange(batch + 1) * length
    source = TokenSource(
        DataStats("full rows"), 1.0, tokens, starts, spans, np.arange(batch + 1), np.arange(batch)
    )
    return RowStream([source], max_length=length, seed=0, lookahead=batch)
