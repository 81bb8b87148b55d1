"""The objective against a float64 oracle, its gradient, and what must not change it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec.recipe import load_recipe
from flarec.recipe.diffusion import Diffusion
from flarec.recipe.sections import Objective
from flarec.train.data.document import PackedRow
from flarec.train.objective.batch import Batch, build_batch, build_batches
from flarec.train.objective.kinds import LOSSES
from flarec.train.objective.loss import Metrics, Scales, loss
from flarec.train.objective.noise import step_generator
from tests.train.documents import MASK, make_document, packed_rows

V = 64
ROWS = [
    PackedRow((make_document([(3, 9), (2, 5)]), make_document([(1, 7)], first=9))),
    PackedRow((make_document([(4, 12)], first=21),)),
]


def logits_for(batch: Batch, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.randn(len(batch.head_rows), V, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def probabilities(row: list[float], suppress: int | None) -> list[float]:
    weights = [0.0 if token == suppress else math.exp(value) for token, value in enumerate(row)]
    return [weight / sum(weights) for weight in weights]


def oracle(logits: Tensor, batch: Batch, suppress: int | None) -> tuple[float, float]:
    """The two sums, by loops in double precision."""
    table = [probabilities(row, suppress) for row in logits.tolist()]
    ar = sum(-math.log(table[i][t]) for i, t in zip(batch.ar_index.tolist(), batch.ar_target.tolist(), strict=True))
    diffusion = 0.0
    for n, weight in enumerate(batch.noisy_weight.tolist()):
        q = table[int(batch.noisy_index[n])]
        p = table[int(batch.teacher_index[n])]
        name = LOSSES[int(batch.noisy_loss[n])]
        if name == "kl":
            value = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        elif name == "tv":
            value = 1 - sum(map(min, p, q))
        elif name == "el":
            value = -math.prod([*before(n, table, batch), sum(map(min, p, q))])
        else:
            value = -math.log(q[int(batch.noisy_target[n])])
        slot = max(0.1, math.prod(before(n, table, batch))) if batch.until_fail[n] else 1.0
        diffusion += weight * slot * value
    return ar, diffusion


def before(n: int, table: list[list[float]], batch: Batch) -> list[float]:
    """1 - TV of the slots before that of signal `n` in its block; a block's signals follow each other."""
    earlier = range(n - int(batch.slot[n]), n)
    assert [int(batch.slot[i]) for i in earlier] == list(range(int(batch.slot[n])))
    pairs = ((table[int(batch.noisy_index[i])], table[int(batch.teacher_index[i])]) for i in earlier)
    return [sum(map(min, q, p)) for q, p in pairs]


CHOICES = {
    "flare": ("flare", []), "draft": ("draft", []), "dual": ("dual", []),
    "tv": ("draft", ["diffusion.loss=tv"]), "el": ("draft", ["diffusion.loss=el"]),
    "kl until fail": ("draft", ["diffusion.slot_weights=accept-until-fail"]),
    "ce until fail": ("draft", ["diffusion.loss=ce", "diffusion.slot_weights=accept-until-fail"]),
    "tv until fail": ("draft", ["diffusion.loss=tv", "diffusion.slot_weights=accept-until-fail"]),
    "dual, el": ("dual", ["diffusion.loss=tv", "diffusion.second.loss=el"]),
    "dual, tv until fail": ("dual", ["diffusion.second.loss=tv", "diffusion.second.slot_weights=accept-until-fail"]),
}


def diffusion_of(choice: str, *more: str) -> Diffusion:
    name, overrides = CHOICES[choice]
    return load_recipe(name).override([*overrides, *more]).diffusion


@settings(max_examples=25)
@given(
    packed_rows(),
    st.sampled_from(sorted(CHOICES)),
    st.sampled_from(["masked-input", "masked-target"]),
    st.sampled_from([None, MASK]),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_values_equal_the_oracle(
    rows: list[PackedRow], name: str, rule: str, suppress: int | None, chunk: int, seed: int
) -> None:
    diffusion = diffusion_of(name, f"diffusion.supervise={rule}")
    batch = build_batch(rows, diffusion, MASK, step_generator(seed, 0))
    logits = logits_for(batch, seed)
    ar, noisy = oracle(logits, batch, suppress)
    found = loss(logits, batch, suppress=suppress, chunk=chunk, scales=Scales(0.5 / 10, 2.0 / 7))
    assert float(found.metrics.ar_loss) == pytest.approx(ar)
    assert float(found.metrics.diffusion_loss) == pytest.approx(noisy, abs=1e-12)
    assert float(found.total.detach()) == pytest.approx(0.5 * ar / 10 + 2 * noisy / 7)
    assert found.total.requires_grad and not found.metrics.ar_loss.requires_grad


@pytest.mark.parametrize("name", ["flare", "draft", "dual"])
def test_gradient(name: str) -> None:
    """d/dlogits = (softmax - target distribution) * weight / total, nothing more for the teacher's rows."""
    batch = build_batch(ROWS, load_recipe(name).diffusion, MASK, step_generator(0, 0))
    logits = logits_for(batch)
    loss(logits, batch, suppress=MASK, scales=Scales(0.7 / 11, 1.3 / 5)).total.backward()
    with torch.no_grad():
        q = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).softmax(1)
        expected = torch.zeros_like(logits)
        for i, target in zip(batch.ar_index, batch.ar_target, strict=True):
            expected[i] = 0.7 / 11 * q[i]
            expected[i, target] -= 0.7 / 11
        for n, i in enumerate(batch.noisy_index):
            scale = 1.3 / 5 * batch.noisy_weight[n].double()
            hard = torch.zeros(V, dtype=torch.float64)
            hard[batch.noisy_target[n]] = 1
            expected[i] = scale * (q[i] - (q[batch.teacher_index[n]] if LOSSES[batch.noisy_loss[n]] == "kl" else hard))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)
    assert not logits.grad[:, MASK].any()


def test_kl_of_identical_distributions_is_zero_and_does_not_train_the_teacher() -> None:
    batch = build_batch(ROWS, load_recipe("draft").diffusion, MASK, step_generator(0, 0))
    values = logits_for(batch).detach()
    values[batch.noisy_index] = values[batch.teacher_index]
    same = values.clone().requires_grad_()
    found = loss(same, batch, suppress=MASK, scales=Scales(0.0, 1.0))
    found.total.backward()
    assert float(found.metrics.diffusion_loss) == 0.0 and same.grad is not None and float(same.grad.abs().max()) < 1e-12
    other = logits_for(batch)
    loss(other, batch, suppress=MASK, scales=Scales(0.0, 1.0)).total.backward()
    assert other.grad is not None
    assert not other.grad[batch.ar_index].any() and bool(other.grad[batch.noisy_index].any(1).all())
    overlap = found.metrics.slot_overlap / found.metrics.slot_count
    torch.testing.assert_close(overlap, torch.ones_like(overlap))


@pytest.mark.parametrize("name", ["flare", "draft", "dual", "dual, el"])
@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_add_up(name: str, micro: int) -> None:
    diffusion = diffusion_of(name, "diffusion.supervise=masked-target")
    rows = [*ROWS, PackedRow((make_document([(2, 1)]),)), ROWS[0]]
    whole = build_batch(rows, diffusion, MASK, step_generator(5, 1))
    parts = build_batches(rows, diffusion, MASK, step_generator(5, 1), micro_rows=micro)
    logits, scales = logits_for(whole), Scales.of(parts, Objective())
    expected = loss(logits, whole, suppress=MASK, scales=scales)
    at, total, metrics = 0, 0.0, None
    for part in parts:  # head rows are sorted by row, so the parts' logits are consecutive slices
        mine = logits[at : at + len(part.head_rows)]
        at += len(mine)
        found = loss(mine, part, suppress=MASK, scales=scales)
        total += float(found.total.detach())
        metrics = found.metrics if metrics is None else metrics + found.metrics
    assert at == len(logits) and isinstance(metrics, Metrics)
    assert total == pytest.approx(float(expected.total.detach()))
    for key, value in metrics.summary().items():
        assert value == pytest.approx(expected.metrics.summary()[key]), key


def test_metrics() -> None:
    batch = build_batch(ROWS, load_recipe("dual").diffusion, MASK, step_generator(2, 0))
    logits = logits_for(batch)
    found = loss(logits, batch, suppress=MASK, scales=Scales.of([batch], Objective(diffusion_weight=0.0)))
    summary: dict[str, Any] = found.metrics.summary()
    ar, noisy = oracle(logits, batch, MASK)
    assert summary["ar_loss"] == pytest.approx(ar / batch.ar_count) == pytest.approx(float(found.total.detach()))
    assert summary["diffusion_loss"] == pytest.approx(noisy / batch.diffusion_count)
    table = [probabilities(row, MASK) for row in logits.tolist()]
    pairs = zip(batch.noisy_index.tolist(), batch.noisy_target.tolist(), strict=True)
    hits = [max(range(V), key=table[i].__getitem__) == target for i, target in pairs]
    accuracy = sum(h * w for h, w in zip(hits, batch.noisy_weight.tolist(), strict=True)) / batch.diffusion_count
    assert summary["diffusion_accuracy"] == pytest.approx(accuracy)
    for slot in range(batch.block_size):
        probes = [n for n in batch.all_masked_index.tolist() if int(batch.slot[n]) == slot]
        mean = sum(hits[n] for n in probes) / len(probes)
        assert summary["all_masked_accuracy"][slot] == pytest.approx(mean)
        distances = [
            sum(abs(a - b) for a, b in zip(table[batch.noisy_index[n]], table[batch.teacher_index[n]], strict=True)) / 2
            for n in probes
        ]
        assert summary["one_minus_tv"][slot] == pytest.approx(1 - sum(distances) / len(probes))
    lengths = []
    for n in batch.all_masked_index.tolist():
        if int(batch.slot[n]) == batch.block_size - 1:  # a block whose every slot has a target
            overlap = sum(map(min, *(table[int(index[n])] for index in (batch.noisy_index, batch.teacher_index))))
            chain = [*before(n, table, batch), overlap]
            lengths.append(sum(math.prod(chain[: slot + 1]) for slot in range(len(chain))))
    assert len(lengths) > 1 and summary["expected_accepted"] == pytest.approx(sum(lengths) / len(lengths))


def test_slots_without_a_fully_masked_block_are_none() -> None:
    rows = [PackedRow((make_document([(2, 1)]),))]
    batch = build_batch(rows, load_recipe("draft").diffusion, MASK, step_generator(0, 0))
    assert (batch.ar_count, batch.diffusion_count) == (1, 0)
    found = loss(logits_for(batch), batch, suppress=None, scales=Scales.of([batch], Objective()))
    assert found.metrics.summary()["one_minus_tv"] == [None] * 4
    assert found.metrics.summary()["expected_accepted"] is None
    assert float(found.metrics.diffusion_loss) == 0.0 and bool(torch.isfinite(found.total))


def test_low_precision_logits_are_computed_in_float32() -> None:
    batch = build_batch(ROWS, Diffusion(), MASK, step_generator(0, 0))
    logits = logits_for(batch, dtype=torch.bfloat16)
    scales = Scales.of([batch], Objective())
    found = loss(logits, batch, suppress=MASK, scales=scales)
    exact = loss(logits.detach().double(), batch, suppress=MASK, scales=scales)
    assert found.total.dtype == torch.float32
    assert float(found.total.detach()) == pytest.approx(float(exact.total), rel=1e-5)
    found.total.backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16 and bool(torch.isfinite(logits.grad).all())
