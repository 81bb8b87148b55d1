"""Steps from buffers into buffers: they give what plain steps give, and ask the device nothing but their result."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.base.generation import GenerationOptions
from flarec.decode import Engine, graphs
from flarec.decode.graphs import SETTLE, Function, PlainReplays, StaticRows
from flarec.decode.plan import StepShape
from flarec.decode.stores import Shelf
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine, random_options, random_prompts
from tests.decode.test_scheduler import WAYS


class CountingReplays(PlainReplays):
    """Counts what a GPU would do: captures, replays, and reads of results."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.reads = 0

    def record(self, function: Function) -> Function:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            function()

        return replay

    def read(self, tensor: Any) -> list[list[int]]:
        self.reads += 1
        return super().read(tensor)


class ForgetfulReplays(PlainReplays):
    """Like a graph on a GPU: it keeps nothing alive that it reads."""

    def record(self, function: Function) -> Function:
        known = weakref.ref(function)

        def replay() -> None:
            there = known()
            assert there is not None, "a graph is replayed, and what it reads is gone"
            there()

        return replay


def with_graphs(engine: Engine) -> list[CountingReplays]:
    """Let an engine on the CPU take the way of graphs. Returns the recorders that it makes."""
    recorders: list[CountingReplays] = []

    def make() -> CountingReplays:
        recorders.append(CountingReplays())
        return recorders[-1]

    engine.shelf = Shelf(make)
    return recorders


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_graphs_on_equals_graphs_off(way: dict[str, Any]) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        model = FakeModel(agreement=0.7, key=seed)
        prompts = random_prompts(rng, model, 13, longest=20)
        each = [replace(random_options(rng), max_new_tokens=rng.randint(1, 30)) for _ in prompts]
        engine, _ = make_engine(model, 3, eos=[2])
        options: dict[str, Any] = {"prefill_chunk": 7, "batch": rng.choice([1, 3, 16]), **way}
        plain = engine.generate(prompts, each, **options)
        with_graphs(engine)
        for _ in range(2):  # the second time the buffers and graphs are there
            static = engine.generate(prompts, each, **options)
            assert [(r.token_ids, r.forwards, r.accepted, r.stop_reason) for r in static] == [
                (r.token_ids, r.forwards, r.accepted, r.stop_reason) for r in plain
            ]
        assert engine.stats.replays > 0


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_one_read_per_step_and_few_graphs(way: dict[str, Any]) -> None:
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    recorders = with_graphs(engine)
    engine.generate([[1, 2, 3]], max_new_tokens=150, **way)
    stats, (recorder,) = engine.stats, recorders
    assert recorder.reads == stats.steps - 1  # the first step was not in the buffers yet
    shapes = 3 if way["mode"] == "diffusion-trust" and "recheck" in way else 2
    assert recorder.recorded == stats.graphs <= shapes
    assert recorder.replayed == stats.replays >= stats.steps - 3 * shapes
    before = stats.graphs
    engine.generate([[4, 5]], max_new_tokens=50, **way)
    assert stats.graphs == before and len(recorders) == 1


def test_graphs_outlive_the_call_that_recorded_them() -> None:
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    engine.shelf = Shelf(ForgetfulReplays)
    results = [engine.generate([[1, 2, 3]], mode="ar-trust", max_new_tokens=60)[0].token_ids for _ in range(2)]
    assert results[0] == results[1] and engine.stats.graphs > 0


def test_buffers_grow_with_the_requests() -> None:
    model = FakeModel(agreement=0.8)
    engine, _ = make_engine(model, 3)
    recorders = with_graphs(engine)
    first = engine.add([1, 2], mode="ar-trust", max_new_tokens=120)
    for _ in range(8):
        engine.step()
    others = [engine.add([3] * 300, mode="ar-trust", max_new_tokens=20 + n) for n in range(5)]
    while engine.busy:
        engine.step()
    assert len(recorders) > 1
    plain, _ = make_engine(model, 3)
    assert first.tokens == plain.generate([[1, 2]], max_new_tokens=120)[0].token_ids
    for request in others:
        assert request.tokens == plain.generate([[3] * 300], max_new_tokens=request.limit)[0].token_ids


def test_a_slot_forgets_what_was_not_finite() -> None:
    """After a cancel or an error nothing of the request is left in the buffers."""
    engine, _ = make_engine(FakeModel(agreement=0.8), 3)
    with_graphs(engine)
    request = engine.add([1, 2, 3], mode="ar-trust", max_new_tokens=50)
    other = engine.add([4, 2], mode="ar-trust", max_new_tokens=50)
    for _ in range(5):
        engine.step()
    engine.cancel(request)
    engine.step()
    (lane,) = engine._serving.lanes.values()
    rows: Any = lane.running
    assert rows.requests == [other]
    free = rows.store.slots - 1
    greedy = {rows.store.sampling.top_k, rows.store.sampling.top_p}  # one token at least: none is no token
    for tensor, axis in rows.store.per_slot():
        assert (tensor.narrow(axis, 1, free) == (1 if tensor in greedy else 0)).all()


def test_sampling_kinds_are_graphs_of_their_own() -> None:
    engine, _ = make_engine(FakeModel(agreement=0.8), 3)
    with_graphs(engine)
    for temperature, top_k in ((0.0, 0), (1.0, 0), (1.0, 3)):
        options = GenerationOptions(temperature=temperature, top_k=top_k, max_new_tokens=20, seed=3)
        before = engine.stats.graphs
        result = engine.generate([[1, 2]], options, mode="ar-trust")[0]
        assert engine.stats.graphs == before + 1
        assert result.token_ids == make_engine(FakeModel(agreement=0.8), 3)[0].generate([[1, 2]], options)[0].token_ids


def test_what_graphs_read_lives_as_long_as_they_do() -> None:
    """A graph holds addresses: every tensor of a step belongs to its store, not to the call that made it."""
    engine, _ = make_engine(FakeModel(agreement=0.8), 3)
    with_graphs(engine)
    stores, masks, plans = [], [], []
    for prompt in ([1, 2], [3]):
        engine.add(prompt, mode="ar-trust", max_new_tokens=30, suppress=[4])
        for _ in range(5):
            engine.step()
        (lane,) = engine._serving.lanes.values()
        rows: Any = lane.running
        assert isinstance(rows, StaticRows)
        stores.append(rows.store)
        masks.append(rows.suppress)
        plans.append(dict(rows.plans))
        assert rows.suppress is rows.store.suppress is not lane.suppress and rows.plans is rows.store.plans
        while engine.busy:
            engine.step()
    assert stores[0] is stores[1] and masks[0] is masks[1]
    assert all(plans[1][shape] is plan for shape, plan in plans[0].items())


@pytest.mark.parametrize("rows", [1, 3])
def test_buffers_are_filled_together_where_they_can_be(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one request all of them, also where a step leaves fewer pending rows than the buffers hold."""
    together: list[int] = []
    copy = torch._foreach_copy_

    def counted(buffers: list[Tensor], new: list[Tensor]) -> None:
        together.append(len(new))
        copy(buffers, new)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    windows, pending = torch.zeros(rows, 7, 5).transpose(1, 2), torch.zeros(rows, 4, 2, 3)
    new = [torch.randn(rows, 4, 5).transpose(1, 2), torch.randn(rows, 1, 2, 3)]
    graphs._copy([(windows.narrow(2, 0, 4), new[0]), (pending.narrow(1, 0, 1), new[1])])
    assert torch.equal(windows[:, :, :4], new[0]) and torch.equal(pending[:, :1], new[1])
    assert not windows[:, :, 4:].any() and not pending[:, 1:].any()
    assert together == ([2] if rows == 1 else [])


def test_replays_behind_a_recorded_step_are_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device had nothing to do while the host recorded it."""
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    recorders = with_graphs(engine)
    engine.add([1, 2, 3], mode="ar-trust", drafts="single", max_new_tokens=200)
    engine.step()
    (lane,) = engine._serving.lanes.values()
    timed: list[StepShape] = []
    monkeypatch.setattr(lane.mode, "timed", lambda shape, seconds: timed.append(shape))
    quiet = recorded = 0
    for _ in range(60):
        before = len(timed)
        engine.step()
        quiet = 0 if recorders[0].recorded > recorded or engine.stats.replays == 0 else quiet + 1
        recorded = recorders[0].recorded
        assert len(timed) == before or quiet > SETTLE
    assert timed
