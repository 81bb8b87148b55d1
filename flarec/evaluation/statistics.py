"""What numbers of answers say: intervals, pass@k, and comparisons of two models on the same prompts.

Every prompt counts once however many samples it has: samples of one prompt are no independent evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

QUANTILE = NormalDist().inv_cdf(0.975)
"""Of the standard normal distribution, for intervals of 95 %."""


def pass_at(k: int, samples: int, correct: int) -> float:
    """Probability that one of k answers is right, unbiased, from `samples` >= k answers to one prompt of which
    `correct` are right (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"no pass@{k} from {correct} of {samples} answers")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def interval(rates: Sequence[float], samples: int = 1) -> tuple[float, float]:
    """95 % interval of the mean of prompts' rates of right answers, each in [0, 1] and over `samples` answers.

    Wilson's interval (1927). With several samples its number of answers is the effective one, the variance of a
    single answer over that of the mean between prompts (Korn and Graubard 1998); at least the number of prompts.
    """
    prompts = len(rates)
    if not prompts:
        raise ValueError("no interval without prompts")
    mean = sum(rates) / prompts
    number = float(prompts)
    spread = sum((rate - mean) ** 2 for rate in rates)
    if samples > 1 and prompts > 1 and spread > 0:
        number = mean * (1 - mean) * prompts * (prompts - 1) / spread
        number = min(max(number, prompts), prompts * samples)
    square = QUANTILE**2 / number
    centre = (mean + square / 2) / (1 + square)
    half = QUANTILE / (1 + square) * math.sqrt(mean * (1 - mean) / number + square / (4 * number))
    return (max(0.0, centre - half) if mean > 0 else 0.0), (min(1.0, centre + half) if mean < 1 else 1.0)


@dataclass(frozen=True)
class Paired:
    """Two models on the same prompts.

    better, worse  prompts of which the first has more, or fewer, right answers than the second
    difference     of the mean rates, first minus second
    low, high      its 95 % interval
    p_value        two-sided exact sign test of better against worse: McNemar's (1947) where every prompt has one answer
    """

    better: int
    worse: int
    difference: float
    low: float
    high: float
    p_value: float


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Rates of right answers per prompt of two models, in the same order, at least one.

    The interval is Wald's with two prompts added, half of each kind (Agresti and Min 2005): it has a width also where
    no prompt differs.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} prompts are no pairs")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    better, worse = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    number, total = len(differences) + 2, sum(differences)
    half = QUANTILE * math.sqrt(sum(value**2 for value in differences) + 1 - total**2 / number) / number
    return Paired(
        better, worse, total / len(differences), max(-1.0, total / number - half), min(1.0, total / number + half),
        sign_test(better, worse),
    )


def sign_test(better: int, worse: int) -> float:
    """Probability, if neither is likelier, of a split that is at least as uneven."""
    number = better + worse
    tail = sum(math.comb(number, index) for index in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**number))
