"""Losses of rows of logits: the fast forms against the specification, and the specification against loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flarec.kernels.row_losses import RowLosses, implementation, reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMS = ("torch", "triton")
SHAPES = [(0, 3, 17), (2, 0, 64), (3, 2, 2500)]  # pairs, singles, vocabulary: below, at and above a tile's width


def inputs(pairs: int, singles: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * pairs + singles
    logits = (3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    ce, kl = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (rows, pairs))
    return [x.to(DEVICE) for x in (logits, target, ce, kl)]


def compare(got: RowLosses, wanted: RowLosses, check: Callable[[Tensor, Tensor], None]) -> None:
    for name in ("nll", "kl", "overlap", "gradient"):
        check(getattr(got, name), getattr(wanted, name))
    assert torch.equal(got.hit, wanted.hit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suppress", [None, 5])
@pytest.mark.parametrize(("pairs", "singles", "vocab"), SHAPES)
def test_float64_is_exact(form: str, suppress: int | None, pairs: int, singles: int, vocab: int) -> None:
    given = inputs(pairs, singles, vocab, torch.float64)
    given[1][given[1] == 5] = 6  # a suppressed target has no loss
    wanted = reference(*given, suppress=suppress)
    got = implementation(form)(given[0].clone(), *given[1:], suppress=suppress)
    compare(got, wanted, lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13))
    assert got.gradient is not None and (suppress is None or not got.gradient[:, suppress].any())
    quiet = implementation(form)(given[0].clone(), *given[1:], suppress=suppress, gradient=False)
    assert quiet.gradient is None and torch.equal(quiet.nll, got.nll) and torch.equal(quiet.overlap, got.overlap)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(form: str, dtype: torch.dtype) -> None:
    """Against float64 on the same logits. Sums over 2500 columns: a few rounding steps of float32; the gradient is
    rounded once, to the dtype of the logits."""
    given = inputs(3, 2, 2500, dtype)
    wanted = reference(given[0].double(), *given[1:], suppress=7)
    got = implementation(form)(given[0].clone(), *given[1:], suppress=7)
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
    got = implementation(form)(logits, target, weights, weights[:0], suppress=None)
    assert got.hit.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_logits_that_are_not_finite_show(form: str) -> None:
    given = inputs(0, 2, 64, torch.float32)
    given[0][0, 3] = float("nan")
    got = implementation(form)(*given, suppress=None)
    assert got.nll.isfinite().tolist() == [False, True]


def test_the_specification_is_the_formula() -> None:
    logits, _, ce, kl = (x.cpu() for x in inputs(1, 1, 6, torch.float64))
    target = torch.tensor([0, 4, 5])
    found = reference(logits, target, ce, kl, suppress=2)
    table = [[0.0 if n == 2 else math.exp(x) for n, x in enumerate(row)] for row in logits.tolist()]
    q, p, single = ([x / sum(row) for x in row] for row in table)
    for row, values, at in zip((q, p, single), found.nll.tolist(), target.tolist(), strict=True):
        assert values == pytest.approx(-math.log(row[at]))
    assert found.kl.item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a))
    assert found.overlap.item() == pytest.approx(sum(map(min, p, q)))
    assert found.gradient is not None
    hard = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    weights = ce[0].item(), kl[0].item()
    expected = [weights[0] * (b - t) + weights[1] * (b - a) for a, b, t in zip(p, q, hard, strict=True)]
    assert found.gradient[0].tolist() == pytest.approx(expected)
