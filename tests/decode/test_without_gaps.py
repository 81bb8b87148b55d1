"""Pending rows lie in buffers as wide as the last step: steps without drafts cost what those of causal decoding cost,
and steps of any shape may follow one another."""

from __future__ import annotations

import functools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flarec.decode import Engine, graphs
from flarec.decode.graphs import StaticRows, Store
from flarec.decode.policy import CAUSAL, Drafting, DraftPolicy, choices_of
from flarec.ir.program import Program
from flarec.passes import lower
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import HeldPolicy, RandomPolicy, hold, make_engine, random_options, random_prompts
from tests.decode.test_graphs import with_graphs
from tests.models import VOCABULARY, captured

MASK = VOCABULARY - 1
FAMILIES = ("qwen3_5_text", "lfm2", "bamba")


class Operations(TorchDispatchMode):
    """Counts operations by name, those that only look at a tensor in another way left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += not func.is_view
        return func(*args, **(kwargs or {}))


class Copied(TorchDispatchMode):
    """Elements that copies write, and how many of them onto themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.onto_itself = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in ("aten.copy_.default", "aten._foreach_copy_.default"):
            targets, sources = (x if isinstance(x, list | tuple) else [x] for x in args[:2])
            for target, source in zip(targets, sources, strict=True):
                self.elements += target.numel()
                self.onto_itself += target.numel() * (target.data_ptr() == source.data_ptr())
        return func(*args, **(kwargs or {}))


@functools.cache
def program(family: str) -> Program:
    return lower(captured(family), "decode")


def engine_of(family: str, policy: DraftPolicy) -> Engine:
    engine = Engine(
        program(family), mask_token_id=MASK, block_size=3, readouts={"ar-trust": "causal"},
        eos_ids=(), max_positions=400, suppress=[MASK],
    )
    hold(engine, policy)
    return engine


def operations(engine: Engine, requests: int, **options: Any) -> tuple[Counter[str], int]:
    """(operations, reads of results) of a replayed step."""
    recorders = with_graphs(engine)
    for number in range(requests):
        engine.add([5 + number, 17, 33], max_new_tokens=50, **options)
    for _ in range(6):
        engine.step()
    reads = recorders[0].reads
    with Operations() as counted:
        engine.step()
    return counted.found, recorders[0].reads - reads


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_drafts_a_step_does_what_a_causal_one_does(family: str, requests: int) -> None:
    """No copy, no other operation and no wait more, however many requests there are."""
    policy = HeldPolicy(choices_of(3, "causal"))
    auto, reads = operations(engine_of(family, policy), requests, mode="ar-trust", drafts="auto")
    causal, plain_reads = operations(engine_of(family, policy), requests, mode="causal")
    assert auto == causal and reads == plain_reads == 1
    assert sum("copy" in name for name in auto) > 0


@pytest.mark.parametrize("mode", ["causal", "ar-trust", "diffusion-trust"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_in_place_is_not_copied(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed step copies as much into buffers of 1,024 positions as into those of 256, and nothing onto itself."""
    copy, copied = graphs._copy, []

    def counted(pairs: Any) -> None:
        with found:
            copy(pairs)

    monkeypatch.setattr(graphs, "_copy", counted)
    for limit in (50, 1000):
        engine = Engine(
            program(family), mask_token_id=MASK, block_size=3, eos_ids=(), max_positions=2000, suppress=[MASK],
            readouts={"ar-trust": "causal", "diffusion-trust": "block_end"},
        )
        with_graphs(engine)
        engine.add([5] * (260 if limit > 50 else 20), mode=mode, max_new_tokens=limit)
        found = Copied()
        for _ in range(6):
            engine.step()
        replays, found = engine.stats.replays, Copied()
        engine.step()
        assert engine.stats.replays == replays + 1 and not found.onto_itself
        copied.append(found.elements)
    assert copied[0] == copied[1] > 0


@pytest.mark.parametrize("seed", range(2))
def test_shapes_may_follow_one_another(seed: int) -> None:
    """Blocks of random sizes in every step, requests that join and leave: the text of causal decoding."""
    rng, model = random.Random(seed), FakeModel(agreement=0.8, key=seed)
    engine, _ = make_engine(model, 3)
    hold(engine, RandomPolicy(choices_of(3, "causal"), random.Random(seed)))
    with_graphs(engine)
    prompts = random_prompts(rng, model, 9)
    each = [random_options(rng) for _ in prompts]
    plain, _ = make_engine(model, 3)
    expected = [item.token_ids for item in plain.generate(prompts, each, max_new_tokens=40)]
    options: dict[str, Any] = {"mode": "ar-trust", "drafts": "auto", "max_new_tokens": 40}
    for _ in range(2):
        found = engine.generate(prompts, each, batch=rng.choice([3, 4]), **options)
        assert [item.token_ids for item in found] == expected
    assert engine.stats.replays > 40


@pytest.mark.parametrize("family", FAMILIES)
def test_real_caches_are_spread_right(family: str) -> None:
    policy = RandomPolicy(choices_of(3, "causal"), random.Random(1))
    engine, prompts = engine_of(family, policy), [[5, 17, 33], [7], [101, 4, 4, 9]]
    expected = [item.token_ids for item in engine.generate(prompts, mode="causal", max_new_tokens=30)]
    with_graphs(engine)
    found = engine.generate(prompts, mode="ar-trust", drafts="auto", max_new_tokens=30)
    assert [item.token_ids for item in found] == expected
    assert len(policy.used) > 15 and len(set(policy.used)) > 3


def _store(engine: Engine) -> Store:
    (lane,) = engine._serving.lanes.values()
    assert isinstance(lane.running, StaticRows)
    return lane.running.store


def test_what_is_spread_stays_and_nothing_else_is_there() -> None:
    """Rows beyond those that were pending are zeros, also where another request's rows lay."""
    engine = engine_of("qwen3_5_text", HeldPolicy(choices_of(3, "causal")))
    with_graphs(engine)
    for number in range(3):
        engine.add([5 + number, 17], mode="ar-trust", drafts="auto", max_new_tokens=50)
    for _ in range(4):
        engine.step()
    store = _store(engine)
    assert store.held == 1 < store.pending == 4
    before = {name: tensor.clone() for name, tensor in store.views(store.slots, store.cache.capacity, 1).items()}
    seen = 0
    store.spread(4)
    after = store.views(store.slots, store.cache.capacity, 4)
    for slot in store.cache.slots:
        axis, old, new = slot.pending_dim(), before[slot.name], after[slot.name]
        if axis is None:
            assert torch.equal(old, new)
            continue
        assert new.data_ptr() == store.cache.tensors[slot.name].data_ptr() and new.shape[axis] == old.shape[axis] + 3
        assert torch.equal(new.narrow(axis, 0, old.shape[axis]), old)
        assert not new.narrow(axis, old.shape[axis], 3).any()
        seen += bool(old.any())
    assert seen > 3 and store.held == 4


@pytest.mark.parametrize("held", [1, 2, 4])
def test_buffers_are_filled_together(held: int) -> None:
    """Of three requests in four slots, whatever a step leaves pending: tensors as kernels write them are one copy."""
    engine = engine_of("qwen3_5_text", HeldPolicy(choices_of(3, "causal")))
    with_graphs(engine)
    for number in range(4):
        engine.add([5 + number, 17], mode="ar-trust", drafts="auto", max_new_tokens=50)
    engine.step()
    store, pairs, expected = _store(engine), [], {}
    views = store.views(3, store.cache.capacity, held)
    for slot in store.cache.slots:
        if slot.pending_dim() is None:
            continue
        view = views[slot.name]
        new = torch.randn(view.shape) if slot.kind != "conv" else torch.randn(view.mT.shape).mT
        pairs.append(graphs._place((view, new, slot)))
        expected[slot.name] = new
    with Operations() as counted:
        graphs._copy(pairs)
    assert +counted.found == {"aten._foreach_copy_.default": 1} and len(pairs) > 8
    views = store.views(3, store.cache.capacity, held)
    assert all(torch.equal(views[name], new) for name, new in expected.items())


def test_requests_join_buffers_of_any_width() -> None:
    """Those that run have no drafts and one pending row each; who comes has drafted."""
    model, policy = FakeModel(agreement=0.9), HeldPolicy(choices_of(3, "causal"))
    engine, _ = make_engine(model, 3)
    hold(engine, policy)
    with_graphs(engine)
    options: dict[str, Any] = {"mode": "ar-trust", "drafts": "auto", "max_new_tokens": 30}
    requests = [engine.add([1, 2, 3], **options), engine.add([4], **options)]
    for held in (CAUSAL, Drafting(3), CAUSAL, Drafting(1, False), CAUSAL):
        for _ in range(4):
            engine.step()
        policy.held = held
        requests.append(engine.add([len(requests), 5], **options))
    while engine.busy:
        engine.step()
    plain, _ = make_engine(model, 3)
    for request in requests:
        assert request.tokens == plain.generate([request.prompt], max_new_tokens=30)[0].token_ids
