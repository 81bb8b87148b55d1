"""Intervals, pass@k and paired tests against counting and against published values."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from flarec.evaluation.loops import loops
from flarec.evaluation.statistics import interval, paired, pass_at, sign_test


def test_pass_at_k_is_the_share_of_choices_with_a_right_one() -> None:
    for samples in range(1, 7):
        for correct in range(samples + 1):
            answers = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                choices = list(itertools.combinations(answers, k))
                assert pass_at(k, samples, correct) == pytest.approx(sum(map(any, choices)) / len(choices))
    for k, samples, correct in ((0, 3, 1), (4, 3, 1), (1, 3, 4), (1, 3, -1)):
        with pytest.raises(ValueError):
            pass_at(k, samples, correct)


def test_wilsons_interval() -> None:
    """The two places where the score test of a share p rejects: (x/n - p)^2 = z^2 p (1 - p) / n."""
    for right, number in ((0, 10), (3, 10), (81, 263), (10, 10)):
        low, high = interval([1.0] * right + [0.0] * (number - right))
        share = right / number
        for bound in (low, high):
            assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / number, abs=1e-7)
        assert 0 <= low <= share <= high <= 1
    with pytest.raises(ValueError):
        interval([])


def test_samples_of_one_prompt_are_no_more_evidence_than_they_are() -> None:
    """Prompts that are all right or all wrong say what one answer each says; independent samples say more."""
    rates = [1.0] * 6 + [0.0] * 4
    assert interval(rates, samples=8) == pytest.approx(interval(rates), abs=0.02)
    draw = random.Random(0)
    rates = [sum(draw.random() < 0.6 for _ in range(8)) / 8 for _ in range(40)]
    low, high = interval(rates, samples=8)
    assert high - low < 0.6 * (interval(rates)[1] - interval(rates)[0])


def test_coverage_of_the_interval() -> None:
    """Of experiments with correlated samples, about 95 % of the intervals hold the truth."""
    draw = random.Random(2)
    held = 0
    for _ in range(1000):
        rates = []
        for _ in range(60):
            chance = draw.choice((0.1, 0.9, 0.5))
            rates.append(sum(draw.random() < chance for _ in range(4)) / 4)
        low, high = interval(rates, samples=4)
        held += low <= 0.5 <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_sign_test_counts_the_splits() -> None:
    for better, worse in ((0, 0), (1, 0), (5, 5), (9, 2), (0, 12)):
        number = better + worse
        splits = [sum(bits) for bits in itertools.product((0, 1), repeat=number)]
        extreme = sum(abs(2 * split - number) >= abs(better - worse) for split in splits)
        assert sign_test(better, worse) == pytest.approx(extreme / len(splits))


def test_paired_models() -> None:
    first, second = [1.0, 1.0, 0.0, 1.0, 0.5], [1.0, 0.0, 0.0, 0.0, 1.0]
    found = paired(first, second)
    assert (found.better, found.worse) == (2, 1) and found.p_value == sign_test(2, 1)
    assert found.difference == pytest.approx(0.3) and found.low < 0.3 < found.high
    swapped = paired(second, first)
    assert (swapped.better, swapped.worse) == (1, 2)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    same = paired(first, first)
    assert same.difference == 0 and same.p_value == 1 and same.low < 0 < same.high
    with pytest.raises(ValueError):
        paired(first, second[1:])


def test_agresti_and_min_on_discordant_pairs() -> None:
    """Their formula in counts: b and c discordant pairs of n, half a pair added to each of the four cells."""
    better, worse, number = 14, 5, 60
    found = paired([1.0] * better + [0.0] * worse + [1.0] * 41, [0.0] * better + [1.0] * worse + [1.0] * 41)
    b, c, n = better + 0.5, worse + 0.5, number + 2
    half = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert (found.low, found.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half), abs=1e-6)


def test_loops() -> None:
    assert not loops([]) and not loops(range(100)) and not loops([*range(20), *range(8)])
    assert loops([*range(20), *list(range(8)) * 2])
