"""The choice of a setting, against a search that does not sort, and the halves of the prompts."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from flarec.evaluation.choice import HALVES, Setting, best, grid, half_of

SHARES = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
ROW = st.tuples(st.integers(0, 20), st.integers(10, 40))
"""Right answers of 20, and tenths of a token per forward."""


@settings(max_examples=100)
@given(st.dictionaries(st.tuples(SHARES, SHARES), ROW, min_size=1), st.integers(1, 20), st.integers(0, 100))
def test_most_tokens_per_forward_of_those_that_keep_enough(
    seen: dict[tuple[float, float], tuple[int, int]], right: int, percent: int
) -> None:
    rows = {
        Setting(*pair): {"accuracy": correct / 20, "tokens_per_forward": tenths / 10}
        for pair, (correct, tenths) in seen.items()
    }
    found = best(rows, right / 20, percent / 100)
    enough = {pair for pair, (correct, _) in seen.items() if correct >= Fraction(percent, 100) * right}
    assert (found is None) == (not enough)
    if found is not None:
        assert found in enough
        correct, tenths = seen[found]
        for pair in enough:
            assert seen[pair][1] <= tenths
            if seen[pair][1] == tenths:
                assert (seen[pair][0], pair[1], pair[0]) <= (correct, found.recheck, found.threshold)
    assert found == best(dict(reversed(rows.items())), right / 20, percent / 100), "whatever the order is"


def test_the_grid_has_every_pair_once() -> None:
    pairs = grid([0.9, 0.0, 0.9], [1.0, 0.0])
    assert sorted(pairs) == [(0.0, 0.0), (0.0, 1.0), (0.9, 0.0), (0.9, 1.0)] and len(set(pairs)) == 4


def test_a_prompt_stays_in_its_half() -> None:
    prompts = [[number, 7, number % 5] for number in range(400)]
    halves = [half_of(prompt) for prompt in prompts]
    assert [half_of(tuple(prompt)) for prompt in prompts] == halves
    assert 160 < halves.count(HALVES[0]) < 240, "five standard deviations are 50"
    assert half_of([1, 23]) != half_of([1, 2, 3]) or half_of([12, 3]) != half_of([1, 2, 3]), "ids are told apart"
    assert "".join(half_of([number])[0] for number in range(12)) == "rrccrrrrcrcr", "in every version"
