"""Answers to numbers, and two models beside each other."""

from __future__ import annotations

from typing import Any

import pytest

from flarec.evaluation.summary import Attempt, compare, rates, summarise


def attempt(
    index: int, sample: int = 0, correct: bool | None = True, tokens: Any = (1, 2), forwards: int = 1
) -> Attempt:
    return Attempt(index, sample, sample, "text", tuple(tokens), forwards, "eos", 1.0, correct)


LOOP = list(range(8)) * 3


def test_rates_and_pass_at_k() -> None:
    answers = [attempt(0, 0), attempt(0, 1, False), attempt(2, 0), attempt(2, 1), attempt(1, correct=None)]
    assert rates(answers) == {0: 0.5, 2: 1.0}
    found = summarise(answers, 2)
    assert (found["answers"], found["correct"], found["accuracy"]) == (4, 3, 0.75)
    assert found["pass_at"] == {"1": 0.75, "2": 1.0}
    low, high = found["accuracy_interval"]
    assert low < 0.75 < high


def test_nothing_is_graded_and_nothing_generated() -> None:
    found = summarise([attempt(0, correct=None)], 1)
    assert (found["answers"], found["accuracy"], found["pass_at"]) == (0, None, {})
    empty = summarise([], 1)
    assert (empty["generated"], empty["tokens_per_forward"]) == (0, None)
    assert empty["loop_free"]["tokens_per_forward"] is None


def test_loops_are_left_out() -> None:
    found = summarise([attempt(0, tokens=LOOP, forwards=3), attempt(1, tokens=range(10), forwards=5)], 1)
    assert found["tokens_per_forward"] == 34 / 8
    assert found["loop_free"] == {"generated": 1, "new_tokens": 10, "forwards": 5, "tokens_per_forward": 2.0}


def test_beside_another_model() -> None:
    """The other's loops choose the subset; answers that one of the two lacks are left out."""
    own = [attempt(0), attempt(1, correct=False, tokens=range(9), forwards=3), attempt(3)]
    others = [attempt(0, tokens=LOOP, forwards=24), attempt(1, tokens=range(9), forwards=9), attempt(7)]
    found = compare(own, others)
    assert (found["answers"], found["equal_texts"], found["other_tokens_per_forward"]) == (2, 1, 1.0)
    assert found["loop_free"]["tokens_per_forward"] == 3.0
    assert (found["paired"]["better"], found["paired"]["worse"]) == (0, 1)
    assert found["other_accuracy"] == 1.0 and found["paired"]["difference"] == pytest.approx(-0.5)
    ungraded = compare([attempt(0, correct=None)], [attempt(0)])
    assert ungraded["paired"] is None and ungraded["other_accuracy"] is None
