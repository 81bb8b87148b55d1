"""Mixing and packing: nothing lost, shares as asked, exact resume."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarec.errors import CheckpointError
from flarec.train.data.document import PackedRow
from flarec.train.data.packing import RowStream
from flarec.train.data.sources import DataStats, TokenSource, hold_out
from flarec.train.data.stream import Mixture


def make_source(lengths: list[int], weight: float = 1.0, first: int = 0) -> TokenSource:
    """Documents of these lengths, each with its own token id (first, first + 1, ...) and all but one token response."""
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    tokens = np.repeat(np.arange(first, first + len(lengths)), lengths).astype(np.int32)
    spans = np.array([(1, length) for length in lengths], dtype=np.int64).reshape(-1, 2)
    numbers = np.arange(len(lengths) + 1, dtype=np.int64)
    return TokenSource(DataStats("test"), weight, tokens, starts, spans, numbers, numbers[:-1])


def names(rows: list[PackedRow]) -> list[list[int]]:
    return [[int(document.ids[0]) for document in row.documents] for row in rows]


lengths = st.lists(st.integers(2, 20), min_size=1, max_size=30)


@given(lengths, lengths, st.integers(1, 8), st.integers(1, 60), st.integers(0, 99))
def test_packing_loses_nothing(one: list[int], two: list[int], lookahead: int, count: int, seed: int) -> None:
    sources = [make_source(one), make_source(two, 0.5, first=100)]
    stream = RowStream(sources, max_length=20, seed=seed, lookahead=lookahead)
    rows = stream.rows(count)
    assert all(row.documents and row.length <= 20 for row in rows)
    assert all(len(set(document.ids.tolist())) == 1 for row in rows for document in row.documents)  # never cut or mixed
    packed = Counter(name for row in names(rows) for name in row)
    waiting = Counter(100 * source + index for source, index in stream.state_dict()["waiting"])
    mixture = Mixture(sources, seed)
    drawn = [mixture.draw() for _ in range(packed.total() + waiting.total())]
    assert packed + waiting == Counter(100 * source + index for source, index in drawn)
    assert stream.mixture.state_dict() == mixture.state_dict()


@given(lengths, st.integers(0, 99))
def test_every_epoch_draws_every_document_once(sizes: list[int], seed: int) -> None:
    mixture = Mixture([make_source(sizes)], seed)
    epochs = [[mixture.draw().document for _ in sizes] for _ in range(3)]
    assert all(sorted(epoch) == list(range(len(sizes))) for epoch in epochs)
    if len(sizes) > 12:
        assert epochs[0] != epochs[1] != epochs[2]


@given(lengths, lengths, st.integers(0, 30), st.integers(1, 30), st.integers(0, 99))
def test_resume_equals_an_uninterrupted_run(one: list[int], two: list[int], before: int, after: int, seed: int) -> None:
    def start() -> RowStream:
        return RowStream([make_source(one), make_source(two, 2.5, first=100)], max_length=20, seed=seed, lookahead=5)

    whole = names(start().rows(before + after))
    first = start()
    first.rows(before)
    state = json.loads(json.dumps(first.state_dict()))
    second = start()
    second.load_state_dict(state)
    assert names(second.rows(after)) == whole[before:]
    assert names(first.rows(after)) == whole[before:]  # saving does not disturb the run
    assert second.state_dict() == first.state_dict() and second.epochs == first.epochs


def test_seeds_differ() -> None:
    def run(seed: int) -> list[list[int]]:
        return names(RowStream([make_source([3] * 50)], max_length=20, seed=seed).rows(5))

    assert run(0) == run(0) != run(1)


def test_weights_are_shares_of_the_tokens() -> None:
    rng = np.random.default_rng(0)
    sources = [
        make_source(rng.integers(2, 10, 300).tolist(), 3.0),
        make_source(rng.integers(50, 100, 20).tolist(), 1.0, first=1000),
    ]
    rows = RowStream(sources, max_length=100, seed=0).rows(400)
    tokens = [0, 0]
    for row in rows:
        for document in row.documents:
            tokens[int(document.ids[0]) >= 1000] += len(document)
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)


def test_rows_are_well_filled_and_no_document_waits_forever() -> None:
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(4, 0.8, 500), 2, 512).astype(int).tolist()
    stream = RowStream([make_source(sizes)], max_length=512, seed=0)
    rows = stream.rows(200)
    assert sum(row.length for row in rows) / (200 * 512) > 0.97
    mixture = Mixture(stream.mixture.sources, 0)
    waiting = [mixture.draw().document for _ in range(2000)]
    for row in names(rows):  # a row starts with the document that has waited longest
        assert row[0] == waiting[0]
        for document in row:
            waiting.remove(document)


@pytest.mark.parametrize(
    "other",
    [
        RowStream([make_source([3, 4, 5])], max_length=20, seed=1),
        RowStream([make_source([3, 4, 6])], max_length=20, seed=0),
        RowStream([make_source([3, 4, 5], weight=2.0)], max_length=20, seed=0),
        RowStream([make_source([3, 4, 5], first=1)], max_length=20, seed=0),
    ],
)
def test_resume_with_other_data_is_refused(other: RowStream) -> None:
    state = RowStream([make_source([3, 4, 5])], max_length=20, seed=0).state_dict()
    with pytest.raises(CheckpointError, match="changed since"):
        other.load_state_dict(state)


@given(lengths, lengths, st.integers(0, 40), st.integers(0, 99))
def test_hold_out_takes_documents_away(one: list[int], two: list[int], count: int, seed: int) -> None:
    sources = [make_source(one), make_source(two, first=100)]
    rest, held = hold_out(sources, count, seed)
    assert len(held) == min(count, len(one) // 2 + len(two) // 2)
    kept = [int(source.document(i).ids[0]) for source in rest for i in range(len(source))]
    everything = [*range(len(one)), *range(100, 100 + len(two))]
    assert sorted([*kept, *(int(document.ids[0]) for document in held)]) == everything
    assert all(len(source) for source in rest)
    assert [d.ids.tolist() for d in hold_out(sources, count, seed)[1]] == [d.ids.tolist() for d in held]
