"""Batches against a brute-force oracle written from docs/semantics.md sections 1 and 3: loops over positions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flarec.errors import DataError
from flarec.layout import READOUTS
from flarec.recipe import load_recipe
from flarec.recipe.diffusion import BlockKind, Diffusion, SecondKind
from flarec.train.data.document import PackedRow
from flarec.train.objective.batch import Batch, build_batch, build_batches
from flarec.train.objective.kinds import LOSSES
from flarec.train.objective.noise import step_generator
from tests.train.documents import MASK, make_document, packed_rows


class Copy(NamedTuple):
    """A noisy block as found in a batch."""

    row: int
    block: int
    document: int
    anchor: int
    view: int
    readout: int
    ids: tuple[int, ...]
    positions: tuple[int, ...]


class Signal(NamedTuple):
    row: int
    document: int
    anchor: int
    view: int
    slot: int
    target: int
    weight: float
    loss: str


def diffusions() -> st.SearchStrategy[Diffusion]:
    mask_and_views = st.sampled_from([("random", 1), ("random", 2), ("all", 1)])
    supervise = st.sampled_from(["masked-input", "masked-target", "masked-both"])
    rest = st.tuples(supervise, st.sampled_from(["block_end", "causal"]), st.sampled_from(["ce", "kl", "tv"]))

    def build(size: int, first: tuple, second: tuple, probability: float) -> Diffusion:
        (mask, views), (supervise, readout, loss) = first
        one = {"mask": mask, "views": views, "supervise": supervise, "readout": readout, "loss": loss}
        (mask, views), (supervise, _, loss) = second
        # The other readout, so that the oracle can tell the kinds apart in the layout.
        readout = "causal" if one["readout"] == "block_end" else "block_end"
        two = {"mask": mask, "views": views, "supervise": supervise, "readout": readout, "loss": loss}
        return Diffusion(block_size=size, **one, second=SecondKind(**two, probability=probability))

    def gridded(diffusion: Diffusion, grids: int, offset: Any) -> Diffusion:
        return replace(diffusion, grids=min(grids, diffusion.block_size), grid_offset=offset)

    kind = st.tuples(mask_and_views, rest)
    plain = st.builds(build, st.integers(1, 6), kind, kind, st.sampled_from([0.0, 0.5, 1.0]))
    return st.builds(gridded, plain, st.integers(1, 3), st.sampled_from(["first", "random"]))


def copies_of(batch: Batch) -> list[Copy]:
    """The noisy blocks of a batch, read back from ids and layout."""
    layout, found = batch.layout, []
    for row in range(layout.rows):
        blocks = layout.noisy_block[row].tolist()
        for index in sorted(set(blocks) - {-1}):
            slots = [slot for slot, block in enumerate(blocks) if block == index]
            ids = batch.input_ids[row, layout.clean_length :][slots].tolist()
            columns = (layout.block_document, layout.block_anchor, layout.block_view, layout.block_readout)
            document, anchor, view, readout = (int(column[row, index]) for column in columns)
            positions = tuple(layout.noisy_position[row, slots].tolist())
            found.append(Copy(row, index, document, anchor, view, readout, tuple(ids), positions))
    return found


def response_of(rows: list[PackedRow], copy: Copy) -> tuple[int, int]:
    spans = rows[copy.row].documents[copy.document].responses
    return next((start, end) for start, end in spans if start <= copy.anchor < end)


def kind_of(diffusion: Diffusion, copy: Copy) -> BlockKind:
    return next(kind for _, kind in diffusion.kinds if READOUTS[kind.readout] == copy.readout)


def oracle_signals(rows: list[PackedRow], diffusion: Diffusion, copies: list[Copy]) -> set[Signal]:
    """Section 3, word by word."""
    raw = []
    for copy in copies:
        kind, (_, end) = kind_of(diffusion, copy), response_of(rows, copy)
        ids = rows[copy.row].documents[copy.document].ids.tolist()
        for slot, position in enumerate(copy.positions):
            if position + 1 >= end:
                continue  # predicts nothing of its own response
            # Everything this noisy token reads, with the tokens it sees there.
            read = {p: ids[p] for p in range(copy.anchor)}
            for other, p in enumerate(copy.positions):
                if kind.readout == "block_end" or other <= slot:
                    read[p] = copy.ids[other]
            input_masked = copy.ids[slot] == MASK
            target_hidden = read.get(position + 1, MASK) == MASK
            counts = {
                "masked-input": input_masked,
                "masked-target": target_hidden,
                "masked-both": input_masked and target_hidden,
            }[kind.supervise]
            if counts:
                raw.append((copy, slot, position, ids[position + 1], kind.loss))
    number = Counter((copy.row, copy.document, copy.view // 2, position) for copy, _, position, _, _ in raw)
    return {
        Signal(*c[:1], *c[2:5], slot, target, 1 / number[c.row, c.document, c.view // 2, position], loss)
        for c, slot, position, target, loss in raw
    }


def batch_signals(batch: Batch) -> list[Signal]:
    layout, by_place = batch.layout, {(copy.row, copy.block): copy for copy in copies_of(batch)}
    found = []
    for i, flat in enumerate(batch.head_rows[batch.noisy_index].tolist()):
        row, slot = divmod(flat, layout.length)
        noisy = slot - layout.clean_length
        assert noisy >= 0
        copy = by_place[row, int(layout.noisy_block[row, noisy])]
        offset = int(layout.noisy_position[row, noisy]) - copy.anchor
        assert offset == int(batch.slot[i])
        weight, loss = float(batch.noisy_weight[i]), LOSSES[int(batch.noisy_loss[i])]
        target = int(batch.noisy_target[i])
        found.append(Signal(row, copy.document, copy.anchor, copy.view, offset, target, weight, loss))
    return found


@given(packed_rows(), diffusions(), st.integers(0, 1000))
def test_signals_equal_the_oracle(rows: list[PackedRow], diffusion: Diffusion, seed: int) -> None:
    batch = build_batch(rows, diffusion, MASK, step_generator(seed, 0))
    batch.layout.validate()
    found, copies = batch_signals(batch), copies_of(batch)
    assert len(set(found)) == len(found)
    assert set(found) == oracle_signals(rows, diffusion, copies)
    assert set(batch.losses) == {signal.loss for signal in found}
    targets = {(s.row, s.document, s.view // 2, s.anchor + s.slot) for s in found}
    assert batch.diffusion_count == len(targets)
    assert float(batch.noisy_weight.sum()) == pytest.approx(len(targets))
    probes = set(batch.all_masked_index.tolist())
    whole = {(c.row, c.document, c.anchor, c.view): set(c.ids) == {MASK} for c in copies}
    assert probes == {i for i, s in enumerate(found) if whole[s.row, s.document, s.anchor, s.view]}
    blocks = [[i for i in block if i >= 0] for block in batch.blocks.tolist()]
    assert all([found[i].slot for i in block] == list(range(len(block))) and block for block in blocks)
    assert sorted(i for block in blocks for i in block) == sorted(probes)
    assert all(len({found[i][:4] for i in block}) == 1 for block in blocks), "of one row, document, anchor and view"
    assert len({found[block[0]][:4] for block in blocks}) == len(blocks)


def grids_of(diffusion: Diffusion, span: tuple[int, int], shift: int) -> set[tuple[int, int]]:
    """(grid, anchor) of every block of a response, by section 1."""
    size, found = diffusion.block_size, set()
    for grid in range(diffusion.grids):
        begin = (math.floor(grid * size / diffusion.grids) + shift) % size
        found |= {(grid, anchor) for anchor in range(*span) if (anchor - span[0]) % size == begin}
    return found


@given(packed_rows(), diffusions(), st.integers(0, 1000))
def test_grid_and_views(rows: list[PackedRow], diffusion: Diffusion, seed: int) -> None:
    batch = build_batch(rows, diffusion, MASK, step_generator(seed, 0))
    size, copies = diffusion.block_size, copies_of(batch)
    assert all(len(copy.ids) == size for copy in copies)
    assert batch.noisy_tokens == size * len(copies) == int((batch.layout.noisy_block >= 0).sum())
    found = {(c.row, c.document, c.anchor, c.view): c for c in copies}
    assert len(found) == len(copies)
    for row, packed in enumerate(rows):
        for number, document in enumerate(packed.documents):
            for span in document.responses:
                mine = [c for c in copies if (c.row, c.document) == (row, number) and span[0] <= c.anchor < span[1]]
                laid = {(c.view // 2, c.anchor) for c in mine}
                shifts = range(size if diffusion.grid_offset == "random" else 1)
                assert any(laid == grids_of(diffusion, span, shift) for shift in shifts)
    for copy in copies:
        kind, (_, end) = kind_of(diffusion, copy), response_of(rows, copy)
        ids = rows[copy.row].documents[copy.document].ids.tolist()
        twin = found.get((copy.row, copy.document, copy.anchor, copy.view ^ 1))
        assert (twin is not None) == (kind.views == 2)
        for slot, position in enumerate(copy.positions):
            seen = copy.ids[slot]
            assert seen == MASK or (position < end and seen == ids[position])
            if kind.mask == "all" or position >= end:
                assert seen == MASK
            elif twin is not None:  # the two views partition the response
                assert (seen == MASK) != (twin.ids[slot] == MASK)


@given(packed_rows(), st.integers(0, 1000), st.integers(0, 5))
def test_clean_stream_and_autoregressive_targets(rows: list[PackedRow], seed: int, spare: int) -> None:
    width = max(row.length for row in rows) + spare
    batch = build_batch(rows, load_recipe("dual").diffusion, MASK, step_generator(seed, 0), clean_length=width)
    assert batch.layout.clean_length == width and batch.clean_tokens == sum(row.length for row in rows)
    expected, total = {}, batch.layout.length
    for row, packed in enumerate(rows):
        offset = 0
        for document in packed.documents:
            assert batch.input_ids[row, offset : offset + len(document)].tolist() == document.ids.tolist()
            for start, end in document.responses:
                for position in range(start - 1, end - 1):
                    expected[row * total + offset + position] = int(document.ids[position + 1])
            offset += len(document)
        assert not batch.input_ids[row, offset:width].any()
    rows_used = batch.head_rows[batch.ar_index].tolist()
    assert dict(zip(rows_used, batch.ar_target.tolist(), strict=True)) == expected
    assert batch.ar_count == len(expected) == sum(d.targets for row in rows for d in row.documents)
    assert batch.head_rows.tolist() == sorted(set(batch.head_rows.tolist()))
    assert sorted([*batch.ar_index.tolist(), *batch.noisy_index.tolist()]) == list(range(len(batch.head_rows)))


@given(packed_rows(), diffusions(), st.integers(0, 1000))
def test_teacher_is_the_clean_row_of_the_same_position(rows: list[PackedRow], diffusion: Diffusion, seed: int) -> None:
    batch = build_batch(rows, diffusion, MASK, step_generator(seed, 0))
    layout, total = batch.layout, batch.layout.length
    documents, positions = layout.token_document(), layout.position_ids()
    targets = dict(zip(batch.ar_index.tolist(), batch.ar_target.tolist(), strict=True))
    for index, teacher, target in zip(batch.noisy_index, batch.teacher_index, batch.noisy_target, strict=True):
        (row, slot), (teacher_row, clean) = (divmod(int(batch.head_rows[i]), total) for i in (index, teacher))
        assert teacher_row == row and clean < layout.clean_length
        assert (documents[row, slot], positions[row, slot]) == (documents[row, clean], positions[row, clean])
        assert targets[int(teacher)] == int(target)


@given(packed_rows(), st.integers(1, 6), st.integers(0, 1000))
def test_number_of_signals_per_target(rows: list[PackedRow], size: int, seed: int) -> None:
    """The counts that section 3 states: R - 1 targets; one signal, or two where it says two, with weights 1/2."""
    expected = sum(end - start - 1 for row in rows for d in row.documents for start, end in d.responses)
    for rule in ("masked-input", "masked-target", "masked-both"):
        all_masked = Diffusion(block_size=size, mask="all", views=1, readout="causal", loss="kl", supervise=rule)
        batch = build_batch(rows, all_masked, MASK, step_generator(seed, 0))
        assert len(batch.slot) == expected and bool((batch.noisy_weight == 1).all())
    published = build_batch(rows, Diffusion(block_size=size), MASK, step_generator(seed, 0))
    assert len(published.slot) == expected and bool((published.noisy_weight == 1).all())
    for readout in ("block_end", "causal"):
        diffusion = Diffusion(block_size=size, supervise="masked-target", readout=readout)
        batch = build_batch(rows, diffusion, MASK, step_generator(seed, 0))
        assert batch.diffusion_count == expected
        starts_block = batch.slot == size - 1  # the predicted token is the first of the next block
        twice = starts_block if readout == "block_end" else torch.ones_like(starts_block)
        assert torch.equal(batch.noisy_weight, torch.where(twice, 0.5, 1.0))


@given(packed_rows(), diffusions(), st.integers(1, 3), st.integers(0, 100))
def test_micro_batches_only_split(rows: list[PackedRow], diffusion: Diffusion, micro: int, seed: int) -> None:
    whole = build_batch(rows, diffusion, MASK, step_generator(seed, 0))
    parts = build_batches(rows, diffusion, MASK, step_generator(seed, 0), micro_rows=micro)
    assert [part.layout.rows for part in parts] == [len(rows[i : i + micro]) for i in range(0, len(rows), micro)]
    found = [s._replace(row=s.row + n * micro) for n, part in enumerate(parts) for s in batch_signals(part)]
    assert sorted(found) == sorted(batch_signals(whole))
    noisy = [c._replace(row=c.row + n * micro) for n, part in enumerate(parts) for c in copies_of(part)]
    assert noisy == copies_of(whole)
    for name in ("ar_count", "diffusion_count", "clean_tokens", "noisy_tokens"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
    again = build_batch(rows, diffusion, MASK, step_generator(seed, 0))
    assert torch.equal(again.input_ids, whole.input_ids)


def test_the_worked_case() -> None:
    """Prompt of 3, response of 6 (positions 3..8), blocks of 4: anchors 3 and 7, the last block padded with masks."""
    rows = [PackedRow((make_document([(3, 6)]),))]
    batch = build_batch(rows, load_recipe("draft").diffusion, MASK, step_generator(0, 0))
    assert batch.layout.block_anchor.tolist() == [[3, 7]]
    assert batch.layout.noisy_position.tolist() == [[3, 4, 5, 6, 7, 8, 9, 10]]
    assert batch.input_ids[0, 9:].tolist() == [MASK] * 8
    assert (batch.head_rows[batch.ar_index]).tolist() == [2, 3, 4, 5, 6, 7]
    assert (batch.head_rows[batch.noisy_index]).tolist() == [9, 10, 11, 12, 13]
    assert (batch.head_rows[batch.teacher_index]).tolist() == [3, 4, 5, 6, 7]
    assert batch.noisy_target.tolist() == rows[0].documents[0].ids[4:9].tolist()


def test_random_offsets_start_everywhere_and_depend_on_the_step_alone() -> None:
    rows = [PackedRow((make_document([(3, 20)] * 8),))]
    diffusion = load_recipe("draft").override(["diffusion.grid_offset=random", "diffusion.grids=2"]).diffusion

    def anchors(step: int) -> list[int]:
        return build_batch(rows, diffusion, MASK, step_generator(0, step)).layout.block_anchor[0].tolist()

    assert anchors(0) == anchors(0) != anchors(1)
    starts = {min(a for a in anchors(step) if a >= 3) for step in range(20)}
    assert starts == {3, 4}, "two grids, two apart: the first block starts at one of two places"


def test_data_with_the_mask_token_is_refused() -> None:
    rows = [PackedRow((make_document([(3, 6)]),))]
    with pytest.raises(DataError, match="mask token"):
        build_batch(rows, Diffusion(), int(rows[0].documents[0].ids[4]), step_generator(0, 0))


def test_moving_keeps_everything() -> None:
    rows = [PackedRow((make_document([(3, 6)]),))]
    batch = build_batch(rows, Diffusion(), MASK, step_generator(0, 0))
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 13 and all(tensor.is_meta for tensor in [*tensors, *moved.layout.tensors()])
    assert moved.ar_count == batch.ar_count
