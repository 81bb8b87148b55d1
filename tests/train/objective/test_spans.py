"""Spans: blocks of variable length over the clean stream, ended by its entropy, and wrong tokens in them.

Contract: docs/semantics.md sections 1 and 3; the oracles below are written from it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flarec.errors import RecipeError
from flarec.layout import Block, build_layout
from flarec.passes import lower
from flarec.recipe import load_recipe
from flarec.recipe.diffusion import Diffusion
from flarec.train.data.document import PackedRow
from flarec.train.objective.batch import build_batch, build_batches
from flarec.train.objective.entropy import next_token_entropies
from flarec.train.objective.grid import spans
from flarec.train.objective.noise import draw_noise, step_generator
from flarec.verify.inputs import all_logits
from flarec.verify.streams import influence
from tests.models import FAMILIES, VOCABULARY, captured, captured_float64, shared_model
from tests.train.documents import MASK, make_document, packed_rows
from tests.train.objective.test_batch import Copy, copies_of

SPANS = Diffusion(
    block_size=4, mask="random", views=1, supervise="masked-target", readout="causal", loss="kl", span_entropy=2.0,
    wrong_tokens=0.4, grid_offset="random", grids=2,
)
SPARE = VOCABULARY - 1


@given(st.lists(st.floats(0, 3), min_size=1, max_size=30), st.integers(1, 8), st.floats(0.01, 6))
def test_spans_follow_each_other_and_are_as_long_as_their_entropy_allows(
    entropy: list[float], longest: int, budget: float
) -> None:
    found = spans(0, len(entropy), longest, entropy, budget)
    assert [p for anchor, length in found for p in range(anchor, anchor + length)] == list(range(len(entropy)))
    for anchor, length in found:
        assert 1 <= length <= longest
        held = sum(entropy[anchor : anchor + length])
        assert length == 1 or held <= budget + 1e-9
        more = anchor + length
        assert length == longest or more == len(entropy) or held + entropy[more] > budget - 1e-9, "it could be longer"


def random_entropies(rows: list[PackedRow], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.rand(row.length, generator=generator, dtype=torch.float64) for row in rows]


@given(packed_rows(), st.integers(0, 1000))
def test_a_batch_of_spans_equals_the_oracle(rows: list[PackedRow], seed: int) -> None:
    entropies = random_entropies(rows, seed)
    batch = build_batches(rows, SPANS, MASK, step_generator(seed, 0), entropies=entropies)[0]
    batch.layout.validate()
    copies = copies_of(batch)
    assert batch.noisy_tokens == sum(len(copy.ids) for copy in copies)
    everything = {int(token) for row in rows for document in row.documents for token in document.ids}
    expected = set()
    for row, packed in enumerate(rows):
        offset = 0
        for number, document in enumerate(packed.documents):
            for start, end in document.responses:
                for grid in range(SPANS.grids):
                    mine = [c for c in copies if (c.row, c.document, c.view // 2) == (row, number, grid)]
                    mine = [c for c in mine if start <= c.anchor < end]
                    check_spans(mine, end, [float(e) for e in entropies[row][offset : offset + len(document)]])
                    assert not mine or mine[0].anchor - start < SPANS.block_size
                    expected |= {
                        (c.row, c.document, c.view, position, int(document.ids[position + 1]))
                        for c in mine for position in c.positions if position + 1 < end
                    }
            for copy in (c for c in copies if (c.row, c.document) == (row, number)):
                own = [int(document.ids[position]) for position in copy.positions]
                assert all(seen in (MASK, right) or seen in everything
                           for seen, right in zip(copy.ids, own, strict=True))
            offset += len(document)
    found, by_place = set(), {(copy.row, copy.block): copy for copy in copies}
    for i, flat in enumerate(batch.head_rows[batch.noisy_index].tolist()):
        row, slot = divmod(flat, batch.layout.length)
        noisy = slot - batch.layout.clean_length
        copy = by_place[row, int(batch.layout.noisy_block[row, noisy])]
        position = int(batch.layout.noisy_position[row, noisy])
        assert position - copy.anchor == int(batch.slot[i])
        found.add((row, copy.document, copy.view, position, int(batch.noisy_target[i])))
    assert found == expected, "no causal row sees what it predicts: every position with a target counts"


def check_spans(copies: list[Copy], end: int, entropy: list[float]) -> None:
    """One grid of one response: entropy[l] is that of the token at l + 1."""
    at = copies[0].anchor if copies else end
    for copy in copies:
        assert copy.positions == tuple(range(at, at + len(copy.ids)))
        held = [entropy[position - 1] for position in copy.positions]
        assert len(copy.ids) == 1 or sum(held) <= SPANS.span_entropy + 1e-9
        at += len(copy.ids)
        full = len(copy.ids) == SPANS.block_size or at == end
        assert full or sum(held) + entropy[at - 1] > SPANS.span_entropy
    assert at == end


def test_without_entropies_spans_are_as_long_as_they_may_be() -> None:
    rows = [PackedRow((make_document([(3, 10)]),))]
    diffusion = replace(SPANS, grids=1, grid_offset="first")
    batch = build_batch(rows, diffusion, MASK, step_generator(0, 0))
    assert [len(copy.ids) for copy in copies_of(batch)] == [4, 4, 2], "the last one ends with the response"


def test_wrong_tokens_are_a_share_of_what_is_visible_and_are_learned_from() -> None:
    rows = [PackedRow((make_document([(3, 4000)]),))]
    plain = replace(SPANS, grids=1, grid_offset="first", span_entropy=0.0, supervise="masked-input")
    batch = build_batch(rows, plain, MASK, step_generator(1, 0))
    right = build_batch(rows, replace(plain, wrong_tokens=0.0), MASK, step_generator(1, 0))
    clean = batch.layout.clean_length
    shown, own = batch.input_ids[0, clean:], right.input_ids[0, clean:]
    assert torch.equal(shown == MASK, own == MASK), "what is masked does not depend on it"
    visible = own != MASK
    wrong = visible & (shown != own)
    # of 50 tokens one is the right one by chance
    assert float(wrong.sum() / visible.sum()) == pytest.approx(0.4 * 49 / 50, abs=0.03)
    counted = torch.zeros_like(visible)
    counted[batch.head_rows[batch.noisy_index] - clean] = True
    last = len(counted) - 1  # it has no target
    assert torch.equal(counted[:last], (wrong | ~visible)[:last]), "a wrong token counts as a masked one"


def test_wrong_tokens_depend_on_seed_and_step_alone() -> None:
    texts = [torch.arange(100, 140)]

    def wrong(seed: int, step: int) -> torch.Tensor:
        found = draw_noise(200, SPANS, step_generator(seed, step), texts).wrong
        assert found is not None
        return found

    first = wrong(3, 7)
    assert torch.equal(first, wrong(3, 7))
    assert not torch.equal(first, wrong(3, 8)) and not torch.equal(first, wrong(4, 7))
    assert set(first.unique().tolist()) == {-1, *range(100, 140)}
    assert draw_noise(9, replace(SPANS, wrong_tokens=0.0), step_generator(0, 0), texts).wrong is None


@pytest.mark.parametrize(("keys", "reason"), [
    (["diffusion.span_entropy=2"], "span_entropy = 2.0 needs readout"),
    (["diffusion.mask=all", "diffusion.views=1", "diffusion.wrong_tokens=0.1"], "shows no token that could be wrong"),
    (["diffusion.wrong_tokens=1.5"], "wrong_tokens = 1.5 is not allowed"),
    (["diffusion.span_entropy=-1"], "span_entropy = -1"),
])
def test_recipes_that_mean_nothing_are_refused(keys: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe("flare").override(keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_entropies_are_those_of_the_source(family: str) -> None:
    first, second = make_document([(3, 9), (2, 4)]), make_document([(2, 7)], first=9)
    rows = [PackedRow((first, second)), PackedRow((second,))]
    program = lower(captured(family), "train")
    found = next_token_entropies(program, rows, SPANS, SPARE, micro_rows=1)
    assert [len(row) for row in found] == [row.length for row in rows]
    for packed, row in zip(rows, found, strict=True):
        offset = 0
        for document in packed.documents:
            with torch.no_grad():
                logits = shared_model(family)(torch.from_numpy(document.ids)[None]).logits[0].double()
            logits[:, SPARE] = -torch.inf
            expected = torch.distributions.Categorical(logits=logits).entropy()
            predicts = {p - 1 for start, end in document.responses for p in range(start, end)}
            for position in range(len(document)):
                value = float(row[offset + position])
                right = float(expected[position]) if position in predicts else 0.0
                assert value == pytest.approx(right, abs=1e-4)
            offset += len(document)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_noisy_token_reads_the_clean_tokens_before_its_span_and_its_span_up_to_itself(family: str) -> None:
    """Invariant 2 of section 5, for spans of variable length: who influences whom, by the definition alone."""
    lengths = [(2, 3), (5, 1), (6, 2)]  # (anchor, length)
    layout = build_layout([[8]], [[Block(0, anchor, length, 0, "causal") for anchor, length in lengths]]).validate()
    program = lower(captured_float64(family), "train")
    ids = torch.randint(0, 300, (1, layout.length), generator=torch.Generator().manual_seed(3))
    gradients = influence(program, ids, layout)
    noisy = [(number, anchor + j) for number, (anchor, length) in enumerate(lengths) for j in range(length)]
    for i, (span, position) in enumerate(noisy):
        for clean in range(8):
            assert bool(gradients[8 + i, clean] > 0) == (clean < lengths[span][0]), (span, position, clean)
        for j, (other, place) in enumerate(noisy):
            assert bool(gradients[8 + i, 8 + j] > 0) == (other == span and place <= position)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_is_a_block_that_is_cut(family: str) -> None:
    """No row of a span depends on its length, so that decoding may lay blocks longer than it uses them."""
    program = lower(captured_float64(family), "train")
    lengths = [(2, 3), (5, 1), (6, 4)]
    cut = [Block(0, anchor, length, 0, "causal") for anchor, length in lengths]
    whole = [Block(0, anchor, 4, 0, "causal") for anchor, _ in lengths]
    text = torch.randint(0, 300, (10,), generator=torch.Generator().manual_seed(5))
    results = []
    for blocks in (cut, whole):
        layout = build_layout([[10]], [blocks])
        ids = torch.cat([text, torch.full((layout.noisy_length,), SPARE)])[None]
        with torch.no_grad():
            results.append(all_logits(program, ids, layout)[0])
    torch.testing.assert_close(results[0][:10], results[1][:10], rtol=0, atol=1e-12)
    slot = 10
    for number, (_, length) in enumerate(lengths):
        ours, theirs = results[0][slot : slot + length], results[1][10 + 4 * number :][:length]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        slot += length
