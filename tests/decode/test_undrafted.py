"""Steps of `--drafts auto` that draft nothing: run by the program of causal decoding, and chosen by each lane."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

from flarec.decode.graphs import PlainReplays
from flarec.decode.modes.ar_trust import ARTrustMode
from flarec.decode.policy import CAUSAL, Drafting, DraftPolicy, choices_of
from flarec.decode.scheduler import Lane
from flarec.decode.stores import Shelf, Static
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import HeldPolicy, hold, make_engine

AUTO: dict[str, Any] = {"mode": "ar-trust", "drafts": "auto"}


class Noted:
    """A program that notes whether its steps had noisy rows."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.noisy: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def step(self, ids: Any, layout: Any, head_rows: Any, cache: Any) -> Any:
        self.noisy.append(bool(layout.noisy_length))
        return self.program.step(ids, layout, head_rows, cache)


@pytest.mark.parametrize("way", ["run", "recorded", "compiled"])
def test_they_need_no_adapter(way: str) -> None:
    """What draws nothing but clean rows runs what `mode = causal` runs; blocks, and prompts, run the adapter's."""
    model = FakeModel(agreement=0.8)
    engine, _ = make_engine(model, 3)
    own, source = Noted(engine.program), Noted(engine.program)
    engine.program, engine._causal = own, lambda: source
    compiled: dict[int, Noted] = {}

    def make(program: Any) -> Any:
        return compiled.setdefault(id(program), Noted(program))

    if way != "run":
        engine.shelf = Shelf(PlainReplays, Static(make) if way == "compiled" else None)
    policy = HeldPolicy(choices_of(3, "causal"))
    hold(engine, policy)
    requests = [engine.add([1, 2, 3], max_new_tokens=40, **AUTO), engine.add([4], max_new_tokens=40, **AUTO)]
    while engine.busy:
        policy.held = Drafting(3) if engine.stats.steps % 10 > 6 else CAUSAL
        engine.step()
    assert not any(source.noisy) and len(source.noisy) > 10
    assert own.noisy.count(True) > 3 and own.noisy.count(False) <= 2
    if way == "compiled":
        assert not any(compiled[id(source)].noisy) and all(compiled[id(own)].noisy)
    expected, _ = make_engine(model, 3)
    plain = expected.generate([[1, 2, 3], [4]], max_new_tokens=40)
    assert [request.tokens for request in requests] == [item.token_ids for item in plain]


def lanes_of(engine: Any) -> list[Lane]:
    return list(engine._serving.lanes.values())


def policy_of(lane: Lane) -> DraftPolicy:
    assert isinstance(lane.mode, ARTrustMode) and lane.mode.policy is not None
    return lane.mode.policy


def test_lanes_that_take_turns_leave_each_other_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request and three, which have other costs: neither begins anew when the other has stepped."""
    engine, _ = make_engine(FakeModel(agreement=0.6), 3)
    engine.add([1, 2], max_new_tokens=300, **AUTO)
    for _ in range(3):
        engine.add([3, 4], max_new_tokens=300, suppress=[5], **AUTO)
    engine.step()
    first, second = map(policy_of, lanes_of(engine))
    assert first is not second
    chosen, waits = defaultdict[int, set[int]](set), Counter[int]()
    following = DraftPolicy.next

    def watched(policy: DraftPolicy, rows: int) -> Drafting:
        chosen[id(policy)].add(rows)
        waits[id(policy)] += policy._wait > 0
        return following(policy, rows)

    monkeypatch.setattr(DraftPolicy, "next", watched)
    for _ in range(60):
        engine.step()
    assert [len(found) for found in chosen.values()] == [1, 1] and all(waits[known] > 20 for known in chosen)
    engine.reset()
    engine.add([1, 2], max_new_tokens=4, **AUTO)
    engine.add([1, 2], max_new_tokens=4, logprobs=0, **AUTO)
    engine.step()
    again, other = map(policy_of, lanes_of(engine))
    assert again is first, "what one call learns serves the next one"
    assert other is not first and other is not second, "steps that give log-probabilities cost more"


def test_few_policies_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flarec.decode.engine.MOST_POLICIES", 3)
    engine, _ = make_engine(FakeModel(agreement=0.6), 3)
    kept = engine._policy("kept")
    for number in range(10):
        engine._policy(number)
        assert engine._policy("kept") is kept
    assert len(engine._policies) == 3 and engine._policy(None) is not engine._policy(None)
