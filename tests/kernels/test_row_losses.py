"""Losses of rows of logits: the fast forms against the specification, and the specification against loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flarec.kernels.row_losses import (
    FLOOR,
    Chain,
    RowLosses,
    RowWeights,
    accepted,
    implementation,
    reference,
    slot_weights,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMS = ("torch", "triton")
SHAPES = [(0, 3, 17), (3, 2, 2500), (5, 0, 64)]  # pairs, singles, vocabulary: below, at and above a tile
KINDS = ("kl", "tv", "length", "all")


def inputs(
    pairs: int, singles: int, vocab: int, dtype: torch.dtype, kind: str = "kl", seed: int = 0, learning: bool = False,
    shared: bool = False,
) -> tuple[Tensor, Tensor, RowWeights]:
    """Logits, targets and weights. kind: what the pairs have beside cross entropy; learning: only students and the
    first single row get a gradient; shared: there are half as many teachers as students."""
    generator = torch.Generator().manual_seed(seed)
    teachers = -(-pairs // 2) if shared else pairs
    rows = pairs + singles + teachers
    logits = (3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=generator)

    def some(n: int) -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64).to(DEVICE)

    kl = some(pairs) if kind in ("kl", "both", "all") else None
    tv = some(pairs) if kind in ("tv", "both", "all") else None
    chain = None
    if kind in ("length", "all"):
        table = torch.full((2, 3), -1)  # a whole block, one that ends early, and a pair in no block
        table.flatten()[: max(0, pairs - 1)] = torch.arange(max(0, pairs - 1))
        chain = Chain(table.to(DEVICE), some(pairs), (torch.arange(pairs) % 2 == (kind == "all")).to(DEVICE))
    ce = some(rows)
    keep = pairs + min(1, singles)
    if learning:
        ce[keep:] = 0
    teacher = (pairs + singles + torch.arange(pairs).flip(0) // 2).to(DEVICE) if shared else None
    weights = RowWeights(ce, pairs, kl, tv, chain, keep if learning else None, teacher)
    return logits.to(DEVICE), target.to(DEVICE), weights


def compare(got: RowLosses, wanted: RowLosses, check: Callable[[Tensor, Tensor], None]) -> None:
    for name in ("nll", "kl", "overlap", "gradient"):
        check(getattr(got, name), getattr(wanted, name))
    assert torch.equal(got.hit, wanted.hit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suppress", [None, 5])
@pytest.mark.parametrize(("pairs", "singles", "vocab"), SHAPES)
def test_float64_is_exact(form: str, kind: str, suppress: int | None, pairs: int, singles: int, vocab: int) -> None:
    for learning, shared in ((False, False), (True, False), (False, True)):
        logits, target, weights = inputs(
            pairs, singles, vocab, torch.float64, kind, learning=learning, shared=shared
        )
        target[target == 5] = 6  # a suppressed target has no loss
        wanted = reference(logits, target, weights, suppress=suppress)
        got = implementation(form)(logits.clone(), target, weights, suppress=suppress)
        compare(got, wanted, lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13))
        assert got.gradient is not None and len(got.gradient) == weights.rows
        assert suppress is None or not got.gradient[:, suppress].any()
    quiet = implementation(form)(logits.clone(), target, weights, suppress=suppress, gradient=False)
    assert quiet.gradient is None and torch.equal(quiet.nll, got.nll) and torch.equal(quiet.overlap, got.overlap)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["kl", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(form: str, kind: str, dtype: torch.dtype) -> None:
    """Against float64 on the same logits. Sums over 2500 columns: a few rounding steps of float32; the gradient is
    rounded once, to the dtype of the logits."""
    logits, target, weights = inputs(3, 2, 2500, dtype, kind)
    wanted = reference(logits.double(), target, weights, suppress=7)
    got = implementation(form)(logits.clone(), target, weights, suppress=7)
    assert got.nll.dtype == torch.float32 and got.gradient is not None and got.gradient.dtype == dtype

    def check(ours: Tensor, theirs: Tensor) -> None:
        unit = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=max(unit, 1e-5), atol=1e-5 if ours.dim() == 1 else 1e-7)

    compare(got, wanted, check)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_of_equal_logits_counts_as_the_largest(form: str) -> None:
    logits = torch.zeros(2, 40, dtype=torch.float64, device=DEVICE)
    logits[:, [7, 30]] = 2.0
    target = torch.tensor([7, 30], device=DEVICE)
    weights = torch.ones(2, device=DEVICE, dtype=torch.float64)
    got = implementation(form)(logits, target, RowWeights(weights, 0), suppress=None)
    assert got.hit.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_logits_that_are_not_finite_show(form: str) -> None:
    logits, *rest = inputs(0, 2, 64, torch.float32)
    logits[0, 3] = float("nan")
    got = implementation(form)(logits, *rest, suppress=None)
    assert got.nll.isfinite().tolist() == [False, True]


def test_the_specification_is_the_formula() -> None:
    logits, _, given = inputs(1, 1, 6, torch.float64, "both")
    logits, target = logits.cpu(), torch.tensor([0, 4, 5])
    assert given.kl is not None and given.tv is not None
    ce, kl, tv = given.ce.cpu(), given.kl.cpu(), given.tv.cpu()
    found = reference(logits, target, RowWeights(ce, 1, kl, tv), suppress=2)
    table = [[0.0 if n == 2 else math.exp(x) for n, x in enumerate(row)] for row in logits.tolist()]
    q, single, p = ([x / sum(row) for x in row] for row in table)
    for row, values, at in zip((q, single, p), found.nll.tolist(), target.tolist(), strict=True):
        assert values == pytest.approx(-math.log(row[at]))
    assert found.kl.item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a))
    assert found.overlap.item() == pytest.approx(sum(map(min, p, q)))
    assert found.gradient is not None
    side = [(b > a) - (b < a) for a, b in zip(p, q, strict=True)]
    lean = sum(b * s for b, s in zip(q, side, strict=True))
    expected = [
        ce[0].item() * (b - (n == 0)) + kl[0].item() * (b - a) + tv[0].item() * b * (s - lean) / 2
        for n, (a, b, s) in enumerate(zip(p, q, side, strict=True))
    ]
    assert found.gradient[0].tolist() == pytest.approx(expected)


def test_the_specification_has_the_gradient_of_its_loss() -> None:
    """By differences in float64. Blocks of three and of one pair; the weights of slots are held, the teacher too."""
    logits, target, weights = inputs(5, 1, 7, torch.float64, "all")
    target[target == 3] = 4
    chain = weights.chain
    assert chain is not None and weights.kl is not None and weights.tv is not None
    held = reference(logits, target, weights, suppress=3, gradient=False)
    slots = torch.where(chain.until_fail, slot_weights(held.overlap, chain.blocks), 1.0)

    def total(students: Tensor) -> Tensor:
        moved = torch.cat([students, logits[5:]])
        log = moved.index_fill(1, torch.tensor([3], device=DEVICE), -1e30).log_softmax(1)
        nll, q, p = -log.gather(1, target[:, None]).squeeze(1), log[:5], log[6:].detach()
        kl, tv = (p.exp() * (p - q)).sum(1), 0.5 * (p.exp() - q.exp()).abs().sum(1)
        assert weights.kl is not None and weights.tv is not None and chain is not None
        pairs = weights.ce[:5] * nll[:5] + weights.kl * kl + weights.tv * tv
        length = torch.stack([
            chain.length[pair] * torch.stack([1 - tv[other] for other in block[: slot + 1]]).prod()
            for block in ([0, 1, 2], [3]) for slot, pair in enumerate(block)
        ]).sum()
        return (slots * pairs).sum() - length

    students = logits[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(total, (students,), atol=1e-7)
    (expected,) = torch.autograd.grad(total(students), students)
    found = reference(logits, target, weights, suppress=3).gradient
    assert found is not None
    torch.testing.assert_close(found[:5], expected, rtol=1e-10, atol=1e-13)


def test_chains() -> None:
    overlap = torch.tensor([0.5, 0.25, 0.0, 0.8, 0.9], dtype=torch.float64)
    blocks = torch.tensor([[3, 0, 1], [2, 4, -1]])
    torch.testing.assert_close(accepted(overlap, blocks), torch.tensor([0.4, 0.1, 0.0, 0.8, 0.0]).double())
    torch.testing.assert_close(slot_weights(overlap, blocks), torch.tensor([0.8, 0.4, 1.0, 1.0, FLOOR]).double())
    none = torch.full((0, 3), -1)
    assert not accepted(overlap, none).any() and bool((slot_weights(overlap, none) == 1).all())
    leaf = overlap.clone().requires_grad_()
    chain = Chain(blocks, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double(), torch.zeros(5, dtype=torch.bool))
    (expected,) = torch.autograd.grad((chain.length * accepted(leaf, blocks)).sum(), leaf)
    torch.testing.assert_close(chain.slope(overlap), expected)  # of -length by TV = 1 - overlap
    assert chain.slope(overlap)[4] == 0 and chain.slope(overlap)[2] > 0, "an overlap of 0 stops what follows it"
