"""The simulation of `benchmarks/trees`: closed forms of drafts that are right independently, and walks done by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from benchmarks.trees.judge import Curve, Measured
from benchmarks.trees.shapes import shapes
from benchmarks.trees.walk import MASKED, MIXED, SEEN, Alternative, Key, Missing, Shape, Slot, Table, complete, walk

RIGHT, SECOND, THIRD = 1, 2, 3
LENGTH = 20_000


def answer(count: int = LENGTH) -> list[int]:
    return [RIGHT] * count


def slot(rank: int) -> Slot:
    """A draft whose token of that rank is right; 3: none."""
    tokens = [SECOND, THIRD, 4]
    tokens.insert(rank, RIGHT)
    return Slot(tuple(tokens[:3]), (1.0, 1.0))


def independent(shares: Sequence[Sequence[float]], seed: int) -> Table:
    """Every slot of every masked block right by its first, second or third token with probabilities of its own."""
    draw = random.Random(seed)
    ranks = [draw.choices(range(4), [*row, 1 - sum(row)], k=LENGTH) for row in shares]
    blocks = {Key(MASKED, place): [slot(row[place]) for row in ranks] for place in range(LENGTH)}
    return Table(answer(), blocks)


def per_step(table: Table, shape: Shape, judge: Measured | None = None) -> float:
    found = walk(table, shape, judge)
    return (found.tokens - 1) / (found.forwards - 1)


SHARES = ((0.7, 0.15, 0.05), (0.6, 0.2, 0.1), (0.5, 0.3, 0.0))


def expected(first: Sequence[float]) -> float:
    """Of one block per outcome: 1 + p1 + p1 p2 + ..."""
    return 1 + sum(math.prod(first[: count + 1]) for count in range(len(first)))


def near(value: float, closed: float) -> bool:
    return abs(value - closed) < 4 * 2 / math.sqrt(LENGTH / 2)  # four standard errors; a step gives 1 to 5 tokens


def test_one_block_per_outcome() -> None:
    first = [row[0] for row in SHARES]
    for seed in (0, 1):
        assert near(per_step(independent(SHARES, seed), Shape("", 3, 3)), expected(first))


def test_one_block_is_a_chain_of_two_states() -> None:
    """With drafts a step is followed by one with drafts if all were right; one without gives a token, and drafts."""
    first = [row[0] for row in SHARES]
    whole = math.prod(first)
    drafted = 1 / (2 - whole)  # share of steps: those without follow each failure
    closed = drafted * expected(first) + (1 - drafted)
    assert near(per_step(independent(SHARES, 2), Shape("", 3, 3, branches=False)), closed)


@pytest.mark.parametrize(("branches", "more"), [
    ([(0, 1)], 0.15),
    ([(0, 1), (0, 2)], 0.2),
    ([(0, 1), (1, 1)], 0.15 + 0.7 * 0.2),
    ([(0, 1, 1)], 0.15 * (1 + 0.6)),
    ([(2, 1, 5)], 0.7 * 0.6 * 0.3),
])
def test_a_branch_gives_a_token_more_where_it_is_needed(branches: list[tuple[int, ...]], more: float) -> None:
    shape = Shape("", 3, 3, alternatives=tuple(Alternative(*branch) for branch in branches))
    assert near(per_step(independent(SHARES, 3), shape), expected([row[0] for row in SHARES]) + more)


def test_nothing_behind_a_branch_costs_the_next_drafts() -> None:
    """A renewal: a step with drafts, and one without behind each that a branch ended."""
    shape = Shape("", 3, 3, alternatives=(Alternative(0, 1),), behind="")
    drafted = expected([row[0] for row in SHARES]) + 0.15
    assert near(per_step(independent(SHARES, 4), shape), (drafted + 0.15) / 1.15)


def test_a_draft_that_is_not_verified_is_a_branch() -> None:
    """Two of three drafts verified and the third as a branch behind them: what three verified ones give, but for the
    token behind the last."""
    table, first = independent(SHARES, 5), [row[0] for row in SHARES]
    shape = Shape("", 2, 3, alternatives=(Alternative(2, 0),))
    assert near(per_step(table, shape), expected(first[:2]) + math.prod(first))
    assert per_step(table, replace(shape, alternatives=())) == per_step(table, Shape("", 2, 2))


def test_branches_that_are_chosen_are_at_most_the_oracle_and_at_least_the_fixed() -> None:
    table = independent(SHARES, 6)
    judge = Measured([independent(SHARES, 7)], 3, 3)
    one, two, oracle, fixed = (
        per_step(table, shape, judge) for shape in (
            Shape("", 3, 3, chosen=1), Shape("", 3, 3, chosen=2), Shape("", 3, 3, chosen=1, oracle=1),
            Shape("", 3, 3, alternatives=(Alternative(0, 1), Alternative(1, 1))),
        )
    )
    assert one < two <= oracle + 1e-9
    assert two == fixed  # the likeliest two: 0.15, and 0.7 * 0.2
    assert near(oracle, expected([row[0] for row in SHARES]) + 0.15 + 0.7 * 0.2 + 0.42 * 0.3)


def test_what_a_block_shows() -> None:
    """Ranks of the right token by hand: the drafts of the answer's end are never looked at."""
    blocks = {Key(MASKED, place): [slot(rank) for rank in ranks]
              for place, ranks in {0: (0, 1), 2: (1, 0), 4: (2, 0), 5: (3, 3)}.items()}
    table = Table(answer(8), blocks)
    seen = Shape("", 2, 2, show=SEEN)
    with pytest.raises(Missing) as missing:  # one draft right, the second token for the next place shown, rightly
        walk(table, seen)
    assert missing.value.key == Key(SEEN, 2, RIGHT)
    blocks[Key(SEEN, 2, RIGHT)] = [slot(0), slot(2), slot(0)]
    with pytest.raises(Missing) as missing:  # then a wrong one: the third is right
        walk(table, seen)
    assert missing.value.key == Key(SEEN, 4, THIRD)
    blocks[Key(SEEN, 4, THIRD)] = [slot(0), slot(0)]
    assert walk(table, seen)[:2] == (8, 4)  # 1, 2, 2, 3 tokens
    with pytest.raises(Missing) as missing:  # two of four second tokens are right: not enough to be shown
        walk(table, replace(seen, believed=0.9), Measured([table], 2, 3))
    assert missing.value.key == Key(MASKED, 3)
    with pytest.raises(Missing) as missing:  # verified: it gives a token more, and the drafts are those behind it
        walk(table, replace(seen, show=MIXED))
    assert missing.value.key == Key(MASKED, 3)


def test_what_is_missing_is_asked_for_until_nothing_is() -> None:
    table, judge = independent(SHARES, 8), Measured([], 3, 3)
    table = Table(answer(60), {key: block for key, block in table.blocks.items() if key.place < 60})
    draw, rounds = random.Random(0), 0
    for (wanted,) in complete([table], [Shape("", 3, 3, show=SEEN), Shape("", 2, 3, show=MIXED)], [judge]):
        rounds += 1
        table.blocks |= {key: [slot(draw.randrange(4)) for _ in range(4)] for key in wanted}
    assert rounds and walk(table, Shape("", 3, 3, show=SEEN)).tokens == 60


def test_rows() -> None:
    """By hand: pending token, drafts and a block behind each; a branch, a block behind it, and a row fed again."""
    assert [Shape("", size, size).rows for size in (2, 3, 4, 5)] == [9, 16, 25, 36]
    assert Shape("", 3, 3, branches=False).rows == 7
    branch = (Alternative(0, 1),)
    assert Shape("", 3, 3, alternatives=branch).rows == 16 + 1 + 4
    assert Shape("", 3, 3, alternatives=branch, behind=SEEN).rows == 16 + 1 + 1 + 4
    assert Shape("", 3, 3, alternatives=branch, behind="").rows == 16 + 1 + 1
    assert Shape("", 3, 3, alternatives=(Alternative(0, 1, 1),)).rows == 16 + 2 + 4 + 5
    assert Shape("", 3, 3, chosen=2).rows == 16 + 1 + 8
    assert Shape("", 3, 3, show=SEEN).rows == 16 and Shape("", 3, 3, show=MIXED).rows == 17


def every() -> Iterator[Shape]:
    for found in shapes(5).values():
        yield from found


def test_shapes_are_different_and_small() -> None:
    found = list(every())
    assert len({replace(shape, name="") for shape in found}) == len(found)
    assert max(shape.rows for shape in found) <= 40


def test_leads_that_say_something() -> None:
    curve = Curve.of([(lead / 100, lead >= 50) for lead in range(100)])
    assert (curve.at(-1), curve.at(0.2), curve.at(0.8), curve.at(9)) == (0, 0, 1, 1)
    assert Curve.of([]).at(0.0) == 0
    assert Curve.of([(1.0, number % 4 == 0) for number in range(100)]).at(1.0) == 0.25
