"""How much to draft: never slower than causal decoding, and what is fastest where drafting pays."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flarec.decode import retrial
from flarec.decode.policy import CAUSAL, PURSE, SLACK, SWITCH, Drafting, DraftPolicy, choices_of
from flarec.decode.retrial import AGES, SAVED, SHARE, TRIES, Retrials
from flarec.decode.timings import RECENT
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine
from tests.decode.test_graphs import with_graphs

WHOLE = {1: 1.12, 8: 1.2, 32: 2.2, 64: 3.0}
"""Cost of a step with 4 clean rows and 4 blocks of 3, to a causal one, by requests."""


def cost(rows: int, drafting: Drafting) -> float:
    """Linear in the rows of a request, 1 for a causal step."""
    clean = 1 + drafting.size
    blocks = clean if drafting.branches else 1
    return 1 + (WHOLE[rows] - 1) * (clean + blocks * drafting.size - 1) / 15


def share_for(tokens: float) -> float:
    """The acceptance per draft at which blocks of 3 yield this many tokens a step."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 + middle + middle**2 + middle**3 < tokens else (low, middle)
    return low


def run(policy: DraftPolicy, rows: int, share: float, steps: int, rng: random.Random) -> tuple[float, list[Drafting]]:
    """(tokens per time to those of causal decoding, what was drafted) of a simulated decoder."""
    held, tokens, time, used = [0] * rows, 0, 0.0, []
    for _ in range(steps):
        drafting = policy.next(rows)
        used.append(drafting)
        seconds, before = cost(rows, drafting), tokens
        for row in range(rows):
            had, right = min(held[row], drafting.size), 0
            while right < had and rng.random() < share:
                right += 1
            tokens += 1 + right
            policy.accepted(had, right)
            held[row] = drafting.size if drafting.branches or right == had else 0
        policy.timed(rows, drafting, seconds * rng.uniform(0.97, 1.03), (tokens - before) / rows)
        time += seconds
    return tokens / rows / time, used


def share_of_steps(used: Sequence[Drafting], size: int) -> float:
    return sum(drafting.size == size for drafting in used[-400:]) / 400


@pytest.mark.parametrize("rows", sorted(WHOLE))
@pytest.mark.parametrize("tokens", [1.0, 1.3, 1.7, 2.2, 2.65, 3.0, 3.5])
def test_never_slower_than_causal(rows: int, tokens: float) -> None:
    rate, _ = run(DraftPolicy(choices_of(3, "causal")), rows, share_for(tokens), 4000, random.Random(rows))
    whole = tokens / WHOLE[rows]
    assert rate > 0.98 and rate > 0.95 * whole


@pytest.mark.parametrize("tokens", [1.3, 1.7])
def test_it_does_not_waver(tokens: float) -> None:
    """Every other kind of step costs a GPU a graph: it stays with what it uses, besides the first steps and three in
    256."""
    _, used = run(DraftPolicy(choices_of(3, "causal")), 1, share_for(tokens), 4000, random.Random(1))
    assert sum(drafting == CAUSAL for drafting in used) < 60
    drafted = [drafting for drafting in used if drafting != CAUSAL]
    assert sum(before != after for before, after in itertools.pairwise(drafted)) < 40


KINDS = choices_of(3, "causal")


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.floats(0.9, 6.0), min_size=len(KINDS) - 1, max_size=len(KINDS) - 1),
    texts=st.lists(st.tuples(st.integers(1, 200), st.lists(st.integers(0, 3), min_size=1, max_size=5)), min_size=1,
                   max_size=5),
    rows=st.sampled_from([1, 2, 64]), unit=st.sampled_from([1.0, 1e-3]), recorded=st.sampled_from([0, 3]),
    ages=st.sampled_from([None, (16, 64)]),
)
def test_what_drafting_loses_is_bounded(
    costs: list[float], texts: list[tuple[int, list[int]]], rows: int, unit: float, recorded: int,
    ages: tuple[int, int] | None,
) -> None:
    """Whatever steps cost, and whatever is accepted: over any steps in a row drafting loses to causal decoding at most
    a purse, a few thousandths of the steps, and one step that was dearer than any before. Where kinds are so old that
    they are tried again (ages), their savings on top, or one such step.

    Steps are counted as they are timed: the first `recorded` ones of a kind are not, and so are those of the text.
    """
    dearest = max(costs) - 1
    bound = PURSE + dearest + (0.0 if ages is None else max(SAVED, dearest + SWITCH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrial, "AGES", ages or AGES)
        assert most_lost(costs, texts, rows, unit, recorded) <= bound + 1e-6


def most_lost(
    costs: list[float], texts: list[tuple[int, list[int]]], rows: int, unit: float, recorded: int
) -> float:
    """Over any steps in a row, in causal ones."""
    policy, known = DraftPolicy(KINDS), dict(zip(KINDS, [1.0, *costs], strict=True))
    uses, held, lost, least, worst = dict.fromkeys(KINDS, 0), 0, 0.0, 0.0, 0.0
    for length, pattern in texts:
        policy.begun()
        for step in range(length):
            drafting = policy.next(rows)
            uses[drafting] += 1
            right = min(held, drafting.size, pattern[step % len(pattern)])
            for _ in range(rows):
                policy.accepted(min(held, drafting.size), right)
            held = drafting.size
            if uses[drafting] <= recorded:
                continue
            policy.timed(rows, drafting, unit * known[drafting], 1.0 + right)
            lost += known[drafting] - (1 + right) - SLACK
            least = min(least, lost)
            worst = max(worst, lost - least)
    return worst


@pytest.mark.parametrize("rows", sorted(WHOLE))
def test_drafts_that_are_never_right_cost_less_than_a_hundredth(rows: int) -> None:
    policy, rng = DraftPolicy(KINDS), random.Random(0)
    run(policy, rows, 0.0, 300, rng)
    rate, used = run(policy, rows, 0.0, 3000, rng)
    assert rate > 0.99 and any(drafting != CAUSAL for drafting in used)


def test_a_new_request_is_tried_soon() -> None:
    """Its text may be another one, however long drafts have not paid."""
    policy, rng = DraftPolicy(KINDS), random.Random(0)
    run(policy, 1, 0.0, 5000, rng)
    policy.begun()
    _, used = run(policy, 1, 0.9, 60, rng)
    assert sum(drafting != CAUSAL for drafting in used) > 20


def more_right(steps: int, new: int) -> list[Drafting]:
    """What eight requests draft whose first drafts alone are right, and all of them from step 1500 on, with which so
    many requests are new."""
    policy, held, used = DraftPolicy(KINDS), 0, list[Drafting]()
    for step in range(steps):
        for _ in range(new if step == 1500 else 0):
            policy.begun()
        drafting = policy.next(8)
        used.append(drafting)
        had = min(held, drafting.size)
        right = min(had, 1 if step < 1500 else 3)
        policy.accepted(had, right)
        policy.timed(8, drafting, cost(8, drafting), 1 + right)
        held = drafting.size if drafting.branches or right == had else 0
    return used


def test_larger_blocks_are_tried_again() -> None:
    """Where only first drafts were right blocks are short; when the others are right as well they get longer."""
    used = more_right(3000, new=0)
    assert sum(drafting.size == 1 for drafting in used[1100:1500]) > 350
    assert sum(drafting.size == 3 for drafting in used[2000:]) > 900


def test_a_delayed_step_tells_nothing() -> None:
    policy = DraftPolicy(KINDS)
    for seconds in (1.0, 1.0, 1.0, 1.0, 50.0):
        policy.timed(1, CAUSAL, seconds, 1.0)
    assert policy.cost(1, CAUSAL) == 1.0


def test_it_follows_the_text() -> None:
    policy, rng = DraftPolicy(choices_of(3, "causal")), random.Random(0)
    _, used = run(policy, 8, 0.0, 3000, rng)
    assert share_of_steps(used, 0) > 0.95
    _, used = run(policy, 8, 0.95, 3000, rng)
    assert share_of_steps(used, 3) > 0.95
    _, used = run(policy, 8, 0.0, 1500, rng)
    assert share_of_steps(used, 0) > 0.95


def test_short_blocks_where_depth_does_not_pay() -> None:
    """Only the first draft is ever right: blocks of one are the best."""
    policy = DraftPolicy(choices_of(3, "causal"))
    held, used = 0, []
    for _ in range(2000):
        drafting = policy.next(8)
        used.append(drafting)
        had = min(held, drafting.size)
        policy.accepted(had, min(had, 1))
        policy.timed(8, drafting, cost(8, drafting), 1 + min(had, 1))
        held = drafting.size if drafting.branches or had <= 1 else 0
    assert share_of_steps(used, 1) > 0.9


@pytest.mark.parametrize(("share", "dear", "branches"), [(0.97, 3.0, False), (0.6, 1.3, True)])
def test_one_block_where_branches_are_dear(share: float, dear: float, branches: bool) -> None:
    """Whole branches cost `dear` causal steps, one block 1.2."""
    policy, rng, held, used = DraftPolicy(choices_of(3, "causal")), random.Random(1), 0, []
    for _ in range(3000):
        drafting = policy.next(1)
        used.append(drafting)
        had = min(held, drafting.size)
        right = next((depth for depth in range(had) if rng.random() >= share), had)
        policy.accepted(had, right)
        held = drafting.size if drafting.branches or right == had else 0
        extra = (dear - 1 if drafting.branches else 0.2) * drafting.size / 3
        policy.timed(1, drafting, 1 + extra, 1 + right)
    drafted = [drafting for drafting in used[-400:] if drafting != CAUSAL]
    assert len(drafted) > 380 and sum(drafting.branches == branches for drafting in drafted) > 0.9 * len(drafted)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("drafting", choices_of(3, "causal"))
def test_expected_tokens_are_those_of_a_simulation(share: float, drafting: Drafting) -> None:
    policy, rng = DraftPolicy(choices_of(3, "causal")), random.Random(0)
    policy._right, policy._tried = [share] * 3, [1.0] * 3
    held = tokens = 0
    for _ in range(20_000):
        right = next((depth for depth in range(held) if rng.random() >= share), held)
        tokens += 1 + right
        held = drafting.size if drafting.branches or right == held else 0
    assert policy.tokens(drafting) == pytest.approx(tokens / 20_000, rel=0.02)


def test_what_decodes_alike() -> None:
    assert choices_of(4, "block_end") == (CAUSAL, Drafting(4, False), Drafting(4))
    assert {drafting.size for drafting in choices_of(2, "causal")} == {0, 1, 2}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("agreement", [0.0, 1.0])
def test_an_engine_that_chooses(monkeypatch: pytest.MonkeyPatch, agreement: float, graphs: bool) -> None:
    """With a clock that counts rows drafts never pay, with one that counts steps they always do; same text."""
    model = FakeModel(agreement=agreement)
    engine, program = make_engine(model, 3)
    expected = engine.generate([[1, 2, 3], [4]], max_new_tokens=120)
    if graphs:
        with_graphs(engine)

    def clock() -> float:
        rows = sum(len(row) + sum(len(ids) for _, ids in blocks) for call in program.calls
                   for row, blocks in zip(call.clean, call.blocks, strict=True))
        return rows if agreement == 0.0 else len(program.calls)

    monkeypatch.setattr("flarec.decode.rows.clock", clock)
    monkeypatch.setattr("flarec.decode.graphs.clock", clock)
    program.calls.clear()
    options: dict[str, Any] = {"mode": "ar-trust", "drafts": "auto", "max_new_tokens": 120}
    results = engine.generate([[1, 2, 3], [4]], **options)
    assert [item.token_ids for item in results] == [item.token_ids for item in expected]
    with_blocks = sum(any(call.blocks) for call in program.calls)
    if agreement == 0.0:
        assert with_blocks < 30 and results[0].forwards > 100
    else:
        assert results[0].forwards < 60


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dear", ["blocks", "causal"])
def test_first_timings_that_were_off_do_not_decide_for_long(rows: int, dear: str) -> None:
    """Those of one kind take half as long again when it is used first: what is used later is what is fastest, and
    drafts that are never right stay cheap."""
    rng = random.Random(rows)
    for tokens, wanted in ((2.65, 0.9 * 2.65 / WHOLE[rows]), (1.0, 0.97)):
        policy, held, made, time = DraftPolicy(KINDS), [0] * rows, 0, 0.0
        uses: Counter[Drafting] = Counter()
        for step in range(700):
            drafting = policy.next(rows)
            uses[drafting] += 1
            slow = uses[drafting] <= 8 and (drafting == CAUSAL) == (dear == "causal")
            before = made
            for row in range(rows):
                had = min(held[row], drafting.size)
                right = next((depth for depth in range(had) if rng.random() >= share_for(tokens)), had)
                policy.accepted(had, right)
                made += 1 + right
                held[row] = drafting.size if drafting.branches or right == had else 0
            seconds = cost(rows, drafting)
            policy.timed(rows, drafting, seconds * (1.5 if slow else 1.0), (made - before) / rows)
            if step < 200:
                made = 0
            else:
                time += seconds
        assert made / rows / time > wanted


def test_what_may_be_better_is_measured_again() -> None:
    """Once blocks were measured often enough to be believed, no more."""
    costs = {CAUSAL: 1.0, Drafting(3, False): 2.2, (dear := Drafting(3)): 2.3}
    policy, used = DraftPolicy(list(costs)), list[Drafting]()
    for _ in range(6000):
        drafting = policy.next(1)
        used.append(drafting)
        policy.accepted(drafting.size, drafting.size)
        policy.timed(1, drafting, costs[drafting], 1.0 + drafting.size)
    begun = next(step for step in range(6000) if used[step : step + 8] == 8 * [Drafting(3, False)])
    first, later = Counter(used[begun:2500]), Counter(used[2500:])
    assert 3 <= first[dear] < 40 and first[CAUSAL] > 6
    assert not later[dear] and 0 < later[CAUSAL] < 40 and later[Drafting(3, False)] > 3450


def test_new_requests_may_have_deeper_drafts() -> None:
    """Blocks that were too long for the text before are used soon after its requests have ended."""
    used = more_right(1600, new=8)
    assert all(drafting.size <= 1 for drafting in used[1480:1500])
    assert sum(drafting.size == 3 for drafting in used[1500:]) > 60


def test_what_is_forgotten_again_and_again_stays_a_number() -> None:
    policy = DraftPolicy(KINDS)
    policy.drafting = Drafting(1)
    for _ in range(3000):
        policy.begun()
    policy.drafting = CAUSAL
    for _ in range(200):
        policy.timed(1, policy.next(1), 1.0, 1.0)
    assert all(0 <= policy.acceptance(depth) <= 1 for depth in (1, 2, 3))


def took(policy: DraftPolicy, rows: int, seconds: float) -> Drafting:
    """A step in which all drafts are right."""
    drafting = policy.next(rows)
    policy.accepted(drafting.size, drafting.size)
    policy.timed(rows, drafting, seconds, 1.0 + drafting.size)
    return drafting


def test_looks_are_without_end() -> None:
    """However often costs were looked at: a server runs for months."""
    policy = DraftPolicy(KINDS)
    policy._looks[1] = policy._looks[2] = 1 << 70
    for rows in (1, 2):
        used = [drafting for _ in range(400) if (drafting := took(policy, rows, 1.0)) != CAUSAL]
        assert len(used) > 300


def test_no_step_empties_the_purse_for_ever() -> None:
    """Blocks that had a bad time, once: what else there is to draft is tried again within some two purses."""
    policy = DraftPolicy([CAUSAL, Drafting(1, False), Drafting(3, False)])
    for _ in range(500):
        took(policy, 1, 1.0)
    used, smaller = policy.drafting, Drafting(1, False)
    assert used.size == 3
    for drafting, seconds, tokens in ((smaller, 1.0, 2.0), (used, 1e4, 1.0)):
        for _ in range(RECENT):
            policy.timed(1, drafting, seconds, tokens)
    assert policy.purse == -PURSE
    tried = [took(policy, 1, 1e4 if policy.drafting == used else 1.0) for _ in range(int(2.5 * PURSE / SLACK))]
    assert tried.count(smaller) > 100


@pytest.mark.parametrize(
    ("kinds", "until", "times"), [({Drafting(3)}, 1, 1e9), (set(KINDS[1:]), 1, 1e3), ({Drafting(3)}, 9, 20.0)]
)
def test_no_measure_counts_for_ever(kinds: set[Drafting], until: int, times: float) -> None:
    """A host that was paused while kinds of steps were measured, for so many of their first steps in the first 500 of
    all: in the end what is fastest is used."""
    policy, rng, held = DraftPolicy(KINDS), random.Random(0), 0
    uses, used = Counter[Drafting](), list[Drafting]()
    for step in range(6000):
        drafting = policy.next(1)
        used.append(drafting)
        uses[drafting] += 1
        had = min(held, drafting.size)
        right = next((depth for depth in range(had) if rng.random() >= 0.9), had)
        policy.accepted(had, right)
        paused = drafting in kinds and uses[drafting] <= until and step < 500
        policy.timed(1, drafting, cost(1, drafting) * (times if paused else 1.0), 1 + right)
        held = drafting.size if drafting.branches or right == had else 0
    assert used[-500:].count(Drafting(3)) > 450


@pytest.mark.parametrize("dear", [3.0, 8.0])
def test_what_is_dear_is_tried_again_at_a_bounded_price(monkeypatch: pytest.MonkeyPatch, dear: float) -> None:
    """Every kind costs more than it gives, and not even savings bound that less than the bar; until costs fall."""
    monkeypatch.setattr(retrial, "AGES", (16, 64))
    policy, lost, tried = DraftPolicy([CAUSAL, Drafting(1, False), Drafting(1)]), 0.0, 0
    for step in range(12_000):
        drafting = policy.next(1)
        policy.timed(1, drafting, dear if drafting.size else 1.0, 1.0)
        if step >= 3000 and drafting.size:
            tried, lost = tried + 1, lost + dear - 1
    assert tried > 0 and 9000 / (9000 + lost) > 0.98
    assert any(took(policy, 1, 1.0).size for _ in range(int((dear + SAVED) / (SLACK * SHARE))))


@pytest.mark.parametrize("pays", [True, False])
def test_steps_that_are_no_measure_try_nothing(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    """A long prompt is read while a dear kind is tried again: the steps beside it, of which there may be any number,
    draft what is in use otherwise, and the trial is still one step of those that are timed."""
    monkeypatch.setattr(retrial, "AGES", (16, 64))
    good, dear = Drafting(1, False), Drafting(3)
    policy, rng, before, beside = DraftPolicy([CAUSAL, good, dear]), random.Random(0), CAUSAL, Counter[Drafting]()
    costs = {CAUSAL: 1.0, good: 1.0 if pays else 3.0, dear: 3.0}
    for _ in range(4000):
        drafting = policy.next(1)
        tried = policy.retrials.trying
        unmeasured = {policy.unmeasured() for _ in range(50)}
        assert unmeasured == {before if tried else drafting}
        beside.update(unmeasured if tried else ())
        right = drafting.size if pays and rng.random() < 0.8 else 0
        policy.accepted(drafting.size, right)
        policy.timed(1, drafting, costs[drafting], 1.0 + right)
        assert not policy.retrials.trying
        before = drafting
    assert beside[good if pays else CAUSAL] > 2 and not beside[dear]


def test_what_a_trial_took_is_not_owed_for_ever() -> None:
    """It fell into a pause of the host as well, which lasted for days."""
    retrials = Retrials()
    retrials.begin(0.5)
    retrials.end(1e12)
    assert not retrials.affords(1.0)
    for _ in range(1100):
        assert retrials.fill(1.0 / SHARE) == pytest.approx(1.0 / SHARE - 1.0) or retrials.saved == SAVED
    assert retrials.affords(1e12)


def test_a_trial_that_is_no_measure_is_given_up() -> None:
    """The steps of a kind are recorded anew each time: they are never timed."""
    policy, dear = DraftPolicy([CAUSAL, Drafting(3)]), 0
    for step in range(5000):
        drafting = policy.next(1)
        if step < 50 or drafting == CAUSAL:
            policy.timed(1, drafting, 1000.0 if drafting.size else 1.0, 1.0)
        else:
            dear += 1
    assert 0 < dear <= TRIES * (5000 // AGES[0])
