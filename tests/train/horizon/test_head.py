"""The horizon head: what is measured, by a slow reading of the definition, and what is learned from it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flarec.recipe.diffusion import Diffusion
from flarec.train.data.document import PackedRow
from flarec.train.horizon.head import divergence, named, new_head, scores, soft_targets, train
from flarec.train.horizon.measure import Places, judged
from flarec.train.objective.batch import build_batch
from flarec.train.objective.noise import step_generator
from tests.train.documents import MASK, VOCABULARY, packed_rows


@given(packed_rows(), st.integers(1, 4), st.integers(0, 1000), st.floats(0.3, 1.0))
def test_places_are_judged_as_decoding_would_find_them(
    rows: list[PackedRow], size: int, seed: int, agreement: float
) -> None:
    """What a row chooses is random, often the text's token; the oracle asks for each place by document positions."""
    diffusion = Diffusion(block_size=size, mask="all", views=1, readout="causal", loss="ce", grids=size)
    batch = build_batch(rows, diffusion, MASK, step_generator(0, 0))
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(VOCABULARY, (len(batch.head_rows),), generator=generator)
    for index, target in ((batch.ar_index, batch.ar_target), (batch.noisy_index, batch.noisy_target)):
        agrees = torch.rand(len(index), generator=generator) < agreement
        choice[index] = torch.where(agrees, target, choice[index])
    layout, total = batch.layout, batch.layout.length
    chosen = {int(flat): int(token) for flat, token in zip(batch.head_rows, choice, strict=True)}
    at, count, known = judged(batch, choice)
    found = {
        int(batch.head_rows[row]): (int(n), bool(k)) for row, n, k in zip(at, count, known, strict=True)
    }
    expected = {}
    for row, packed in enumerate(rows):
        offset = 0
        slots = layout.noisy_block[row].tolist()
        for number, document in enumerate(packed.documents):
            for start, end in document.responses:
                for anchor in range(start, end - 1):
                    here = (layout.block_document[row] == number) & (layout.block_anchor[row] == anchor)
                    begin = slots.index(int(here.nonzero()[0]))
                    front = row * total + offset + anchor - 1
                    right, told = 0, chosen[front] == document.ids[anchor]
                    while right < size and anchor + right + 1 < end:
                        clean = chosen[front + 1 + right]
                        if chosen[row * total + layout.clean_length + begin + right] != clean:
                            break
                        told = told and clean == document.ids[anchor + right + 1]
                        right += 1
                    else:
                        right = size
                    expected[front] = (right, told)
            offset += len(document)
    assert {place: k for place, (_, k) in found.items()} == {place: k for place, (_, k) in expected.items()}
    assert {p: v for p, v in found.items() if v[1]} == {p: v for p, v in expected.items() if v[1]}


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_targets_are_gaussians_around_the_measured_number(sigma: float) -> None:
    found = soft_targets(torch.tensor([0, 2, 3]), 3, sigma).double()
    for row, measured in zip(found.tolist(), (0, 2, 3), strict=True):
        weights = [math.exp(-((k - measured) ** 2) / (2 * sigma**2)) for k in range(4)]
        assert row == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-6)


def test_the_divergence_is_that_of_torch_and_zero_at_the_target() -> None:
    target = soft_targets(torch.tensor([0, 1, 3]), 3, 0.7)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(target), torch.distributions.Categorical(logits=logits)
    )
    torch.testing.assert_close(divergence(target, logits), expected)
    assert float(divergence(target, target.log()).abs().max()) < 1e-6
    sharp = soft_targets(torch.tensor([1]), 3, 0.01)
    assert bool(divergence(sharp, logits[:1]).isfinite().all()), "targets that are zero"


def places(count: int, seed: int) -> Places:
    """Places whose hidden row says how many drafts are safe."""
    generator = torch.Generator().manual_seed(seed)
    safe = torch.randint(4, (count,), generator=generator)
    hidden = torch.randn(count, 8, generator=generator)
    hidden[:, 0] = safe.float() - 1.5
    return Places(hidden, safe, count)


def test_a_head_learns_what_there_is_to_learn_bit_for_bit_alike() -> None:
    learned, unseen = places(2000, 0), places(500, 1)
    heads = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # the global generator decides nothing
        head = new_head(8, 32, 3, seed=5)
        train(head, learned, sigma=0.5, steps=300, batch=128, lr=3e-3, seed=5, device=torch.device("cpu"))
        heads.append(named(head))
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    found = scores(head, unseen, 0.5)
    assert found["kl"] < 0.2 * found["constant_kl"]
    assert found["too_many"] < 0.05 and found["lost"] < 0.05
    assert found["drafts"] == pytest.approx(found["safe_drafts"], abs=0.1)
    other = new_head(8, 32, 3, seed=6)
    train(other, learned, sigma=0.5, steps=3, batch=128, lr=3e-3, seed=6, device=torch.device("cpu"))
    assert not torch.equal(named(other)["horizon.0.weight"], heads[0]["horizon.0.weight"])
