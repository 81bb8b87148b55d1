"""A tokenised document and a packed row: what the data side hands to the batch builder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids [length] int64 and the spans [start, end) of its responses: ascending, disjoint, not empty, start >= 1.

    The first token of a document is never a response token: nothing could predict it.
    """

    ids: npt.NDArray[np.int64]
    responses: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        last = 1
        for start, end in self.responses:
            assert last <= start < end <= len(self.ids), f"bad response span {start}:{end}"
            last = end

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Autoregressive targets = response tokens."""
        return sum(end - start for start, end in self.responses)


@dataclass(frozen=True, eq=False)
class PackedRow:
    """Documents that share one row, in slot order."""

    documents: tuple[Document, ...]

    @property
    def length(self) -> int:
        """Clean tokens of the row."""
        return sum(len(document) for document in self.documents)
