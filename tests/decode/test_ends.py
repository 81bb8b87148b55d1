"""Drafts behind the rows at which a step most likely ends: never another text, in the forwards that the places give."""

from __future__ import annotations

import random
from itertools import accumulate
from operator import mul
from typing import Any

import pytest
import torch

from flarec.base.generation import GenerationOptions
from flarec.decode import Engine
from flarec.decode.ends import EndsPrior, blind_share, likely_ends
from flarec.decode.horizon import HorizonProgram
from flarec.decode.modes.ar_trust import ARTrustMode
from flarec.decode.policy import CAUSAL, Drafting, DraftPolicy, choices_of
from flarec.decode.request import Request, Stopping
from flarec.decode.rows import Rows
from flarec.errors import GenerationError
from flarec.passes import lower
from tests.decode.fake_model import FakeModel, prefix_state
from tests.decode.helpers import HeldPolicy, RandomPolicy, hold, make_engine, random_options, random_prompts
from tests.decode.oracles import pick
from tests.decode.test_graphs import with_graphs
from tests.decode.test_pure_steps import META, ValuelessProgram
from tests.decode.test_pure_steps import VOCABULARY as VALUES
from tests.models import VOCABULARY
from tests.passes.test_predict_horizon import SIZE, with_head

CHOICES = choices_of(3, "causal", (1, 2))
OPTIONS: dict[str, Any] = {"mode": "ar-trust", "drafts": "horizon"}


def ends_of(share: list[float], have: int, count: int, blocks: int) -> list[int]:
    """By sorting: the ends that can be, the most likely first."""
    last = min(have, count)
    likely = [*share[:last], sum(share[last:])]
    return sorted(range(last + 1), key=lambda end: -likely[end])[:blocks]


def test_ends_are_the_most_likely_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    horizon = torch.randn(200, 6, generator=generator)
    have = torch.randint(0, 6, (200,), generator=generator)
    for count, blocks in ((1, 1), (3, 1), (3, 2), (5, 4)):
        found = likely_ends(horizon, have, count, blocks)
        assert found.shape == (200, blocks) and int(found.min()) >= 0 and int(found.max()) <= count
        for row, share in enumerate(horizon.softmax(1).tolist()):
            wanted = ends_of(share, int(have[row]), count, blocks)
            assert found[row, : len(wanted)].tolist() == wanted and len(set(found[row].tolist())) == blocks


def test_a_head_is_worth_the_misses_that_it_avoids() -> None:
    runs = [1.0, 0.5, 0.25, 0.125]  # half of the steps end at once, an eighth accepts all three
    assert blind_share(3, 1, runs) == 0.5 and blind_share(3, 2, runs) == 0.75 and blind_share(1, 1, runs) == 0.5
    prior, rng = EndsPrior(), random.Random(0)
    assert prior.left == 1.0 and prior.found(3, 2, runs) == 0.75  # nothing is believed that was not seen
    for _ in range(3000):
        prior.seen(1, int(rng.random() < 0.2), 0.5)
    assert prior.left == pytest.approx(0.4, abs=0.15) and prior.found(3, 1, runs) == 1 - prior.left / 2
    for _ in range(3000):
        prior.seen(1, 1, 0.5)
    assert prior.left == pytest.approx(2.0, abs=0.01) and prior.found(3, 1, runs) == pytest.approx(0.0, abs=0.01)


def test_a_long_time_without_misses_says_nothing_for_ever() -> None:
    """All drafts are right for long, so that there are no misses to avoid; then the head misses once."""
    prior = EndsPrior()
    for _ in range(100_000):
        prior.seen(1, 0, 0.0)
    prior.seen(1, 1, 0.0)
    assert 1.0 < prior.left < 4.0 and prior.found(3, 1, [1.0, 0.9, 0.8, 0.7]) > 0
    policy = DraftPolicy(CHOICES)
    policy.ends = prior
    for _ in range(3000):
        policy.timed(1, policy.next(1), 1.0, 1.0)
    assert prior.left < 1.1


def simulated(policy: DraftPolicy, cost: Any, knows: float, steps: int, share: float) -> tuple[list[Drafting], float]:
    """A request whose head says the right end with a probability, and any other else. (what was drafted, tokens)."""
    rng, held, tokens, used = random.Random(0), 0, 0, []
    for _ in range(steps):
        drafting = policy.next(1)
        had = min(held, drafting.size)
        right = next((depth for depth in range(had) if rng.random() >= share), had)
        others = [end for end in range(had + 1) if end != right]
        rng.shuffle(others)
        said = [right, *others] if rng.random() < knows else [*others, right]
        found = drafting.branches or right in said[: drafting.placed]
        policy.accepted(had, right)
        policy.timed(1, drafting, cost(drafting), 1 + right)
        if drafting.placed and had == drafting.size:
            policy.ended(drafting, 1, int(not found))
        held, tokens = drafting.size if found else 0, tokens + 1 + right
        used.append(drafting)
    return used, tokens / steps


@pytest.mark.parametrize(("knows", "kinds"), [(0.95, {(False, 1)}), (0.0, {(True, 0)})])
def test_placed_blocks_are_used_where_the_head_knows(knows: float, kinds: set[tuple[bool, int]]) -> None:
    """Branches cost more than one block, and pay where the head is wrong."""
    used, _ = simulated(DraftPolicy(CHOICES), lambda item: 1 + 0.04 * item.size * item.blocks, knows, 4000, 0.7)
    late = [item for item in used[-1000:] if item != CAUSAL]
    assert len(late) > 900 and sum(item.kind in kinds for item in late) > 0.9 * len(late)


@pytest.mark.parametrize("drafting", [item for item in CHOICES if item.placed])
@pytest.mark.parametrize("knows", [0.3, 0.9])
def test_expected_tokens_are_those_of_a_simulation(drafting: Drafting, knows: float) -> None:
    policy, share = HeldPolicy(CHOICES, drafting), 0.7
    _, tokens = simulated(policy, lambda item: 1.0, knows, 6000, share)
    policy._right, policy._tried = [share] * 3, [1.0] * 3
    runs = list(accumulate([share] * drafting.size, mul, initial=1.0))
    missed = 1 - blind_share(drafting.size, drafting.placed, runs)
    policy.ends._missed, policy.ends._blind = 1e6 * (1 - knows), 1e6 * missed  # nothing else counts
    assert policy.tokens(drafting) == pytest.approx(tokens, rel=0.06)


def forwards(model: FakeModel, prompt: list[int], options: GenerationOptions, limit: int, drafting: Drafting) -> int:
    """Steps with one kind of placed blocks, the prompt's forward among them: every step reads everything anew."""
    stream = list(prompt)
    while len(stream) < len(prompt) + limit + drafting.size + 1:
        stream.append(pick(model.clean(stream), options, len(stream), [model.mask])[0])
    known, drafted, count = len(prompt) + 1, 3, 1
    while known < len(prompt) + limit:
        anchor, accepted, held = known - 1, 0, min(drafted, drafting.size)
        for offset in range(held):
            logits = model.noisy(stream[:anchor], [model.mask] * 3, offset, "causal")
            if pick(logits, options, anchor + offset + 1, [model.mask])[0] != stream[anchor + offset + 1]:
                break
            accepted += 1
        share = torch.from_numpy(model.horizon_from(prefix_state(stream[:anchor]), 3)).softmax(0)
        found = accepted in ends_of(share.tolist(), held, drafting.size, drafting.placed)
        known, drafted, count = known + accepted + 1, drafting.size if found else 0, count + 1
    return count


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("drafting", [item for item in CHOICES if item.placed])
def test_the_text_of_causal_decoding_in_the_forwards_of_the_places(drafting: Drafting, graphs: bool) -> None:
    rng, model = random.Random(drafting.size), FakeModel(agreement=0.8, key=drafting.placed)
    engine, _ = make_engine(model, 3)
    policy = HeldPolicy(CHOICES, drafting)
    hold(engine, policy)
    policy.drafting = drafting
    if graphs:
        with_graphs(engine)
    prompts = random_prompts(rng, model, 5)
    each = [random_options(rng) for _ in prompts]
    expected = make_engine(model, 3)[0].generate(prompts, each, max_new_tokens=30)
    found = engine.generate(prompts, each, max_new_tokens=30, **OPTIONS)
    assert [item.token_ids for item in found] == [item.token_ids for item in expected]
    counts = [forwards(model, prompt, item, 30, drafting) for prompt, item in zip(prompts, each, strict=True)]
    assert [item.forwards for item in found] == counts


@pytest.mark.parametrize("seed", range(4))
def test_any_blocks_may_follow_one_another(seed: int) -> None:
    """As they come, with requests that join and leave, and recorded."""
    rng, model = random.Random(seed), FakeModel(agreement=0.8, key=seed)
    engine, _ = make_engine(model, 3)
    policy = RandomPolicy(CHOICES, random.Random(seed))
    hold(engine, policy)
    with_graphs(engine)
    prompts = random_prompts(rng, model, 9)
    each = [random_options(rng) for _ in prompts]
    expected = [item.token_ids for item in make_engine(model, 3)[0].generate(prompts, each, max_new_tokens=40)]
    found = engine.generate(prompts, each, batch=rng.choice([3, 4]), max_new_tokens=40, **OPTIONS)
    assert [item.token_ids for item in found] == expected
    assert any(item.placed for item in policy.used) and engine.stats.replays > 10


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "bamba"])
def test_a_real_head_never_changes_the_text(family: str) -> None:
    program, wide, _ = with_head(family)
    engine = Engine(
        lower(program, "decode"), mask_token_id=VOCABULARY - 1, block_size=SIZE, readouts={"ar-trust": "causal"},
        eos_ids=(), max_positions=400, suppress=[VOCABULARY - 1], horizon=lambda: HorizonProgram(wide),
    )
    policy = RandomPolicy(CHOICES, random.Random(1))
    hold(engine, policy)
    prompts = [[5, 17, 33], [7], [101, 4, 4, 9]]
    each = [GenerationOptions(temperature=temperature, seed=3) for temperature in (0.0, 0.8, 1.0)]
    expected = [item.token_ids for item in engine.generate(prompts, each, mode="causal", max_new_tokens=30)]
    with_graphs(engine)
    found = engine.generate(prompts, each, max_new_tokens=30, **OPTIONS)
    assert [item.token_ids for item in found] == expected
    assert {item.placed for item in policy.used} == {0, 1, 2}


def test_it_is_refused_where_nobody_tells() -> None:
    model = FakeModel()
    whole, plain = make_engine(model, 3, readout="block_end")[0], make_engine(model, 3)[0]
    with pytest.raises(GenerationError, match=r"whole block.*drafts 'horizon' needs causal ones"):
        whole.generate([[1]], **OPTIONS)
    modes = [plain._mode(plain._filled(GenerationOptions(mode="ar-trust", drafts=d))) for d in ("horizon", "auto")]
    placed, others = (mode.policy.choices for mode in modes if isinstance(mode, ARTrustMode) and mode.policy)
    assert set(CHOICES) == set(placed) and not any(item.placed for item in others)
    plain._horizon = None
    with pytest.raises(GenerationError, match=r"no head.*drafts 'horizon' needs"):
        plain.generate([[1]], **OPTIONS)
    assert plain.generate([[1]], mode="ar-trust", drafts="auto", max_new_tokens=4)[0].new_tokens == 4


@pytest.mark.parametrize("drafting", [*[item for item in CHOICES if item.placed], Drafting(3), CAUSAL])
def test_a_step_asks_the_device_nothing(drafting: Drafting) -> None:
    """And what it returns to the host is as small as without a head."""
    program = ValuelessProgram(VALUES + 4)
    engine = Engine(
        program, mask_token_id=VALUES - 1, block_size=3, eos_ids=(), max_positions=1000,
        readouts={"ar-trust": "causal"}, horizon=lambda: program,
    )
    hold(engine, HeldPolicy(CHOICES, drafting))
    options = engine._filled(GenerationOptions(**OPTIONS))
    requests = [Request(index, [1, 2, 3], 20, Stopping(), options) for index in range(3)]
    rows = Rows(program, engine._mode(options), requests, [options] * 3, None)
    rows.mode.start(rows, *(torch.empty(3, 1, *more, VALUES + 4, device=META) for more in ((), (3,))))
    for _ in range(2):
        values = rows.compute(rows.mode.shape(rows))
        assert values.device == META and values.shape == (3, 3 + drafting.size if drafting.size else 1)
        assert rows.state["horizon"].shape == (3, 4)
