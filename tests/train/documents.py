"""Hypothesis strategies and builders for packed rows, shared by the tests of this folder."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from flarec.train.data.document import Document, PackedRow

VOCABULARY = 50
MASK = 60


def make_document(turns: list[tuple[int, int]], tail: int = 0, first: int = 0) -> Document:
    """Turns of (prompt tokens, response tokens), then `tail` prompt tokens; neighbouring ids differ."""
    spans, at = [], 0
    for prompt, response in turns:
        spans.append((at + prompt, at + prompt + response))
        at += prompt + response
    ids = (np.arange(first, first + at + tail) * 7 + 3) % VOCABULARY
    return Document(ids.astype(np.int64), tuple(spans))


def turns() -> st.SearchStrategy[list[tuple[int, int]]]:
    first = st.tuples(st.integers(1, 5), st.integers(1, 12))
    later = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=2)
    return st.builds(lambda a, b: [a, *b], first, later)


def documents() -> st.SearchStrategy[Document]:
    return st.builds(make_document, turns(), st.integers(0, 3), st.integers(0, 49))


def packed_rows() -> st.SearchStrategy[list[PackedRow]]:
    row = st.lists(documents(), min_size=1, max_size=3).map(lambda d: PackedRow(tuple(d)))
    return st.lists(row, min_size=1, max_size=3)
