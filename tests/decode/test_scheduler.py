"""Requests that come and go: each gives what it gives alone, whoever its neighbours are."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from flarec.base.generation import MODES, GenerationOptions
from flarec.decode.engine import OF_A_LANE
from flarec.decode.graphs import PlainReplays
from flarec.decode.modes.ar_trust import ARTrustMode
from flarec.decode.policy import choices_of
from flarec.decode.request import Request
from flarec.decode.rows import Rows
from flarec.decode.stepper import Stepper
from flarec.decode.stores import Shelf
from flarec.errors import GenerationError
from tests.decode.fake_model import FakeModel, FakeProgram
from tests.decode.helpers import HeldPolicy, hold, make_engine, random_options, random_prompts

WAYS: list[dict[str, Any]] = [
    {"mode": "causal"},
    {"mode": "ar-trust", "drafts": "branches"},
    {"mode": "ar-trust", "drafts": "single"},
    {"mode": "diffusion-trust", "threshold": 0.5},
    {"mode": "elastic", "threshold": 0.3},
    {"mode": "diffusion-trust", "threshold": 0.3, "recheck": 0.3},
    {"mode": "elastic", "threshold": 0.0, "recheck": 0.3},
]


def told(request: Request) -> tuple[list[int], int, list[int], str]:
    generation = request.generation()
    return generation.token_ids, generation.forwards, generation.accepted, generation.stop_reason


@pytest.mark.parametrize("seed", range(6))
def test_every_output_equals_its_solo_run(seed: int) -> None:
    """Random arrivals, modes, lengths, cancels, through few slots and prefills of several chunks."""
    rng = random.Random(seed)
    model = FakeModel(agreement=0.7, key=seed)
    engine, _ = make_engine(model, 3, eos=[2])
    engine.slots = 3
    engine._serving = engine._scheduler(3, 4)
    prompts = random_prompts(rng, model, 25, longest=14)
    ways = [
        replace(random_options(rng), max_new_tokens=rng.randint(1, 25), **rng.choice(WAYS[:3] if seed % 2 else WAYS))
        for _ in prompts
    ]
    running: list[tuple[Request, int]] = []
    cancelled, ended, waiting = set(), Counter[int](), list(range(len(prompts)))
    while waiting or engine.busy:
        for index in waiting[: rng.choice([0, 0, 1, 4])]:
            running.append((engine.add(prompts[index], ways[index]), index))
            waiting.remove(index)
        alive = [pair for pair in running if not pair[0].finished]
        if alive and rng.random() < 0.2:
            request, index = rng.choice(alive)
            engine.cancel(request)
            cancelled.add(index)
        ended.update(request.index for request in engine.step())
    assert engine.step() == []
    assert max(ended.values()) == 1 and len(ended) == len(prompts) - len(cancelled) and cancelled
    for request, index in running:
        alone = engine.generate([prompts[index]], ways[index])[0]
        if index in cancelled:
            assert request.generation().stop_reason == "cancelled"
            assert request.tokens == alone.token_ids[: len(request.tokens)]
        else:
            assert told(request) == (alone.token_ids, alone.forwards, alone.accepted, alone.stop_reason)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_prompts_beside_running_requests(way: dict[str, Any]) -> None:
    """A long prompt is read a chunk per step, and those that run go on meanwhile; then they share forwards."""
    model = FakeModel(agreement=0.7)
    engine, program = make_engine(model, 3)
    engine._serving = engine._scheduler(4, 5)
    first = engine.add([1, 2, 3], max_new_tokens=60, **way)
    engine.step()
    before = len(first.tokens)
    second = engine.add([4] * 23, max_new_tokens=60, **way)
    for _ in range(4):
        program.calls.clear()
        engine.step()
        assert [len(call.clean) for call in program.calls] == [1, 1]  # a chunk, and the step
        assert not second.tokens and len(first.tokens) > before - (way["mode"] == "diffusion-trust")
        before = len(first.tokens)
    engine.step()  # the last chunk: its first tokens, and its first step
    program.calls.clear()
    engine.step()
    assert [len(call.clean) for call in program.calls] == [2]
    assert second.forwards == 3


@pytest.mark.parametrize("offset", range(5))
def test_steps_are_timed_whoever_runs(offset: int) -> None:
    """Only the first step of requests that join is by itself and no measure: not the later ones, if the others ended in
    the step in which they joined."""
    engine, _ = make_engine(FakeModel())
    way: dict[str, Any] = {"mode": "ar-trust", "drafts": "auto"}
    engine.add([1, 2, 3], max_new_tokens=4, **way)
    for step in range(12):
        if step == offset:
            engine.add([4, 5], max_new_tokens=6, **way)
        engine.step()
        lanes = engine._serving.lanes.values()
        assert all(lane.running is None or lane.running.timed for lane in lanes)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("chosen_first", [True, False])
def test_steps_that_wait_for_a_prompt_of_another_lane_are_no_measure(
    chosen_first: bool, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece is queued; who reads results next waits for it, in whichever lane, and nobody behind that."""
    engine, _ = make_engine(FakeModel())
    if graphs:
        engine.shelf = Shelf(PlainReplays)
    engine._serving = engine._scheduler(4, 5)
    hold(engine, HeldPolicy(choices_of(3, "causal")))
    seconds, queued, heard = 0.0, 0.0, list[float]()
    run, report = Stepper.run, Rows._report

    def piece(stepper: Stepper, *arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal queued
        queued += 100.0
        return run(stepper, *arguments, **keywords)

    def waited(rows: Rows, values: list[list[int]]) -> None:
        nonlocal seconds, queued
        seconds, queued = seconds + 1.0 + queued, 0.0
        report(rows, values)

    monkeypatch.setattr(Stepper, "run", piece)
    monkeypatch.setattr(Rows, "_report", waited)
    monkeypatch.setattr("flarec.decode.rows.clock", lambda: seconds)
    monkeypatch.setattr("flarec.decode.graphs.clock", lambda: seconds)
    monkeypatch.setattr(ARTrustMode, "timed", lambda mode, shape, took: heard.append(took))
    engine.add([1, 2], max_new_tokens=60, mode="ar-trust", drafts="auto")
    for _ in range(20):
        engine.step()
    long, timed = engine.add([4] * 23, max_new_tokens=9), len(heard)
    if not chosen_first:
        engine._serving.lanes = dict(reversed(engine._serving.lanes.items()))
    for _ in range(10):
        engine.step()
    assert long.tokens and timed > 5 and len(heard) == timed + 10 - 4, "of the last piece the lane itself has read"
    assert set(heard) == {1.0}


SETTINGS: list[dict[str, Any]] = [
    {}, {"threshold": 0.5}, {"denoising_steps": 2}, {"recheck": 0.3}, {"drafts": "single"},
]


@pytest.mark.parametrize(
    ("mode", "lanes"), [("causal", 1), ("ar-trust", 2), ("elastic", 3), ("diffusion-trust", 4)]
)
def test_settings_that_a_mode_does_not_read_share_a_lane(mode: str, lanes: int) -> None:
    """A lane for all requests that agree in what is read of their settings."""
    engine, _ = make_engine(FakeModel(), 3)
    added = [engine.add([1, 2, 3], max_new_tokens=9, mode=mode, **setting) for setting in SETTINGS]
    assert len(engine._serving.lanes) == lanes and set(OF_A_LANE) == set(MODES)
    while engine.busy:
        engine.step()
    alone, _ = make_engine(FakeModel(), 3)
    for request, setting in zip(added, SETTINGS, strict=True):
        assert told(request)[0] == alone.generate([[1, 2, 3]], max_new_tokens=9, mode=mode, **setting)[0].token_ids


@pytest.mark.parametrize("way", [{"mode": "diffusion-trust", "recheck": 0.3}, {"mode": "ar-trust", "drafts": "auto"}])
def test_a_request_is_checked_without_a_mode_of_its_own(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes hold tensors on the device: a lane makes one, and whoever is added makes none."""
    engine, _ = make_engine(FakeModel(), 3)
    mode, made = engine._mode, list[object]()

    def counted(*arguments: Any) -> Any:
        made.append(mode(*arguments))
        return made[-1]

    monkeypatch.setattr(engine, "_mode", counted)
    for _ in range(5):
        engine.add([1, 2, 3], max_new_tokens=9, **way)
    assert len(made) == len(engine._serving.lanes) == 1


def test_slots_bound_what_runs_and_the_longest_prompts_come_first() -> None:
    model = FakeModel(agreement=0.7)
    engine, program = make_engine(model, 3)
    prompts = random_prompts(random.Random(3), model, 40, longest=30)
    order: list[int] = []
    together = engine.generate(
        prompts, mode="ar-trust", max_new_tokens=12, batch=4, on_end=lambda index, generation: order.append(index)
    )
    assert max(len(call.clean) for call in program.calls) == 4
    assert sorted(order) == list(range(40)) and order != sorted(order)
    assert [item.token_ids for item in together] == [
        engine.generate([prompt], mode="ar-trust", max_new_tokens=12)[0].token_ids for prompt in prompts
    ]
    early, late = order[:10], order[-10:]
    assert sum(len(prompts[index]) for index in early) > sum(len(prompts[index]) for index in late)


def test_a_prefill_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flarec.decode.scheduler.PREFILL_ROWS", 24)
    engine, program = make_engine(FakeModel(), 3)
    engine.generate([[1] * 8 for _ in range(10)] + [[1] * 40], max_new_tokens=3, prefill_chunk=10)
    assert max(sum(len(row) for row in call.clean) for call in program.calls) <= 24


def test_caches_shrink_with_the_requests() -> None:
    """What is kept belongs to those that run."""
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    lanes = engine._serving.lanes
    long = engine.add([1] * 900, mode="ar-trust", max_new_tokens=2)
    short = engine.add([1, 2], mode="ar-trust", max_new_tokens=90)
    while not long.finished:
        engine.step()
    engine.step()
    (lane,) = lanes.values() if lanes else engine._serving.lanes.values()
    assert lane.running is not None and lane.running.cache.batch == 1 and lane.running.cache.capacity < 512
    while engine.busy:
        engine.step()
    assert not engine._serving.lanes and short.finished


def test_a_request_that_fails_leaves_the_others_alone() -> None:
    model = FakeModel(agreement=0.9)
    engine, program = make_engine(model, 3)
    step = FakeProgram.step

    def wrong(ids: torch.Tensor, layout: Any, rows: torch.Tensor, cache: Any) -> torch.Tensor:
        logits = step(program, ids, layout, rows, cache)
        if len(program.calls) == 4:
            logits[rows // layout.length == 0, 2] = torch.nan
        return logits

    def fails(tokens: Sequence[int]) -> int | None:
        raise RuntimeError("mine")

    program.step = wrong  # type: ignore[method-assign, assignment]
    requests = [engine.add([1, 2, 3], mode="ar-trust", max_new_tokens=40) for _ in range(2)]
    requests.append(engine.add([5], mode="ar-trust", max_new_tokens=20, stop_check=fails))
    seen: list[Request] = []
    while engine.busy:
        seen += engine.step()
    assert set(seen) == set(requests)
    with pytest.raises(GenerationError, match="logits of prompt 0 are not finite"):
        requests[0].generation()
    with pytest.raises(RuntimeError, match="mine"):
        requests[2].generation()
    alone = make_engine(model, 3)[0].generate([[1, 2, 3]], GenerationOptions(max_new_tokens=40))[0]
    assert requests[1].generation().token_ids == alone.token_ids


def test_refused_when_added() -> None:
    engine, _ = make_engine(FakeModel(), 3)
    with pytest.raises(GenerationError, match="empty"):
        engine.add([])
    with pytest.raises(GenerationError, match="outside the vocabulary"):
        engine.add([99])
    with pytest.raises(GenerationError, match="unknown mode"):
        engine.add([1], mode="fast")
    with pytest.raises(GenerationError, match="batch is 0"):
        engine.generate([[1]], batch=0)
    assert not engine.busy


@pytest.mark.slow
@pytest.mark.parametrize(("graphs", "in_a_round"), [(False, 60), (True, 25)])
def test_many_requests_through_sixteen_slots(graphs: bool, in_a_round: int) -> None:
    """Random lengths, seeds, ends, stops and cancels; nothing is left behind by those that are gone.

    `make test-serve` sends a thousand through a server.
    """
    rng = random.Random(0)
    model = FakeModel(agreement=0.7)
    engine, program = make_engine(model, 3, eos=[2])
    engine._serving = engine._scheduler(16, 8)
    if graphs:
        engine.shelf = Shelf(PlainReplays)
    alone, _ = make_engine(model, 3, eos=[2])

    def stop(tokens: Sequence[int]) -> int | None:
        return len(tokens) - 1 if list(tokens[-2:]) == [3, 3] else None

    def alive() -> int:
        program.calls.clear()
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    left = []
    for _ in range(4):
        requests = []
        for prompt in random_prompts(rng, model, in_a_round, longest=20):
            options = replace(random_options(rng), max_new_tokens=rng.randint(1, 25), **rng.choice(WAYS))
            check = stop if rng.random() < 0.3 else None
            requests.append((engine.add(prompt, options, stop_check=check), prompt, options, check))
        while engine.busy:
            if rng.random() < 0.05:
                engine.cancel(rng.choice(requests)[0])
            engine.step()
        for request, prompt, options, check in requests:
            whole = alone.generate([prompt], options, stop_check=check)[0]
            found = request.generation()
            if found.stop_reason == "cancelled":
                # a stop check may take back tokens of the whole run behind the place of the cancel
                sure = max(0, len(found.token_ids) - 1)
                assert found.token_ids[:sure] == whole.token_ids[:sure]
            else:
                assert told(request) == (whole.token_ids, whole.forwards, whole.accepted, whole.stop_reason)
        assert not engine.busy and not engine._serving.lanes
        requests.clear()
        del request, found, whole
        left.append(alive())
    if graphs:  # they stay, a few buffers per way to decode
        assert engine.shelf is not None
        kept = [len(stores._free) for stores in engine.shelf._stores.values()]
        assert len(kept) == len(WAYS) and max(kept) == 1
    else:
        assert max(left[1:]) <= left[0] + 64, left
