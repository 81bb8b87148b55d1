"""The prefix cache: what is found is what was read, and every output is the one without it."""

from __future__ import annotations

import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from flarec.base.generation import MODES
from flarec.decode import Cache, Engine
from flarec.decode.prefix import PrefixCache
from flarec.errors import GenerationError
from flarec.ir.slots import CacheSlot
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine, random_options
from tests.decode.test_scheduler import WAYS

PAGE = 4
SLOTS = (
    CacheSlot("keys", "keys", ("batch", "capacity", 2), torch.float32),
    CacheSlot("conv", "conv", ("batch", 3, 2), torch.float32),
    CacheSlot("state", "state", ("batch", 5), torch.float32),
    CacheSlot("pending", "pending_keys", ("batch", "pending", 2), torch.float32),
)
LOGITS = torch.zeros(1, 1, 7), torch.zeros(1, 0, 0, 7)


def cache_of(rows: int = 2, clean: int = PAGE) -> Cache:
    """As after a forward of `clean` rows, with a number of its own in every place."""
    cache = Cache.allocate(SLOTS, rows, 64, "cpu", pending=clean)
    for name, tensor in cache.tensors.items():
        cache.tensors[name] = torch.arange(tensor.numel(), dtype=torch.float32).reshape(tensor.shape)
    return cache


def nothing_lost(cache: PrefixCache) -> None:
    """The count of bytes is that of the nodes in the tree, every one of which can be reached."""
    nodes, waiting = [], [root for _, root in cache._roots.values()]
    while waiting:
        node = waiting.pop()
        children = [*node.pages.values(), *node.ends.values()]
        nodes += children
        waiting += children
    assert set(nodes) == set(cache._used) and cache.bytes == sum(node.size for node in nodes) <= cache.limit


def test_the_longest_prefix_is_found() -> None:
    prefixes, prompt = PrefixCache(10**6, PAGE), list(range(10))
    assert prefixes.find("p", prompt, None).length == 0
    prefixes.add_page("p", prompt, 8, cache_of(), 0)  # what leads to it is not known
    assert len(prefixes) == 0
    for end in (4, 8):
        prefixes.add_page("p", prompt, end, cache_of(), 0)
    assert prefixes.find("p", prompt, None).length == 8
    assert prefixes.find("p", prompt[:8], None).length == 4  # one token is left to read
    assert prefixes.find("p", [*prompt[:5], 99, *prompt[6:]], None).length == 4
    assert prefixes.find("other", prompt, None).length == 0
    prefixes.add_end("p", prompt, cache_of(clean=2), 1, 2, "mode", LOGITS)
    assert prefixes.find("p", prompt, "mode").length == 10 and prefixes.find("p", prompt, "mode").logits is not None
    assert prefixes.find("p", prompt, "another").length == 8  # nothing to start from
    longer = prefixes.find("p", [*prompt, 3], "another")
    assert longer.length == 10 and longer.logits is None and longer.nodes[-1].pending == 2
    nothing_lost(prefixes)


def test_programs_are_told_apart_as_objects_and_kept() -> None:
    """What an id stands for must not change hands."""

    @dataclass
    class Named:
        """Equal to every other one, and without a hash, as programs are."""

    prefixes, prompt, one, other = PrefixCache(10**6, PAGE), list(range(10)), Named(), Named()
    prefixes.add_page(one, prompt, 4, cache_of(), 0)
    assert (prefixes.find(one, prompt, None).length, prefixes.find(other, prompt, None).length) == (4, 0)
    alive = weakref.ref(one)
    del one
    assert alive() is not None


def test_parts_are_those_of_the_request() -> None:
    prefixes, prompt, cache = PrefixCache(10**6, PAGE), list(range(9)), cache_of(clean=6)
    prefixes.add_page("p", prompt, 4, cache, 1)
    page = prefixes.find("p", prompt, None).nodes[-1]
    assert torch.equal(page.tensors["keys"], cache.tensors["keys"][1:2, :4])
    assert page.states is not None
    assert torch.equal(page.states["conv"], cache.tensors["conv"][1:2, :, :2])
    assert torch.equal(page.states["state"], cache.tensors["state"][1:2])
    assert page.states["pending"].shape == (1, 0, 2)
    prefixes.add_page("p", prompt, 8, cache, 1)
    prefixes.add_end("p", prompt, cache, 1, 5, None, LOGITS)
    end = prefixes.find("p", [*prompt, 1], None).nodes[-1]
    assert torch.equal(end.tensors["keys"], cache.tensors["keys"][1:2, 8:9])
    assert end.states is not None
    assert torch.equal(end.states["conv"], cache.tensors["conv"][1:2, :, :7])
    assert torch.equal(end.states["pending"], cache.tensors["pending"][1:2, :5])
    assert set(page.tensors) == set(end.tensors) == {"keys"} and set(page.states) == set(end.states)


def test_a_page_without_states_is_a_branch() -> None:
    """Known, and nothing to continue from: what is found says how far pages go, until somebody leaves states there."""
    prefixes, prompt = PrefixCache(10**6, PAGE), list(range(14))
    for end, states in ((4, True), (8, False), (12, False)):
        prefixes.add_page("p", prompt, end, cache_of(), 0, states=states)
    pages = prefixes.bytes
    for given, length, branch in (
        (prompt, 4, 12), ([*prompt[:11], 99, 98], 4, 8), ([*prompt[:7], 99], 4, 0), ([99, *prompt], 0, 0),
        (prompt[:12], 4, 8),  # one token is left to read
    ):
        found = prefixes.find("p", given, None)
        assert (found.length, found.branch) == (length, branch)
    prefixes.add_page("p", prompt, 8, cache_of(), 1)
    found = prefixes.find("p", prompt, None)
    assert (found.length, found.branch) == (8, 12) and prefixes.bytes > pages
    assert torch.equal(found.states["state"], cache_of().tensors["state"][1:2])
    prefixes.add_end("p", prompt, cache_of(clean=2), 0, 0, None, LOGITS)
    assert (prefixes.find("p", [*prompt, 1], None).length, prefixes.find("p", [*prompt, 1], None).branch) == (14, 0)
    nothing_lost(prefixes)


def test_keys_and_values_alone_need_no_states() -> None:
    """A model of softmax attention continues behind every page."""
    prefixes, prompt = PrefixCache(10**6, PAGE), list(range(10))
    cache = Cache.allocate(SLOTS[:1], 1, 64, "cpu")
    for end in (4, 8):
        prefixes.add_page("p", prompt, end, cache, 0, states=False)
    found = prefixes.find("p", prompt, None)
    assert (found.length, found.branch, found.states) == (8, 0, {})


def test_states_of_pages_make_room_for_an_end() -> None:
    """Where a prompt fills the limit: those behind its last pages first, and none in vain."""
    def filled(limit: int) -> PrefixCache:
        prefixes = PrefixCache(limit, PAGE)
        for end in (4, 8):
            prefixes.add_page("p", prompt, end, cache_of(), 0)
        prefixes.add_end("p", prompt, cache_of(), 0, 0, None, LOGITS)
        nothing_lost(prefixes)
        return prefixes

    prompt = list(range(10))
    whole = filled(10**6)
    page, end = whole.find("p", prompt[:9], None).nodes[0], whole.find("p", prompt, None).nodes[-1]
    states = page.size - sum(tensor.nbytes for tensor in page.tensors.values())
    assert whole.bytes == 2 * page.size + end.size
    for missing, left in ((0, [4, 8]), (1, [4]), (states, [4]), (states + 1, [])):
        prefixes = filled(whole.bytes - missing)
        assert prefixes.find("p", prompt, None).length == 10
        found = prefixes.find("p", prompt[:9], None)
        assert (found.length, found.branch) == (left[-1] if left else 0, 0 if 8 in left else 8)
    assert filled(whole.bytes - 2 * states - 1).find("p", [*prompt, 1], None).length == 4


def test_an_end_stays_where_more_logits_do_not_fit() -> None:
    """Another mode has read the same prompt, and brings what it starts from."""
    def filled(limit: int) -> PrefixCache:
        prefixes = PrefixCache(limit, PAGE)
        for mode in ("one", "two"):
            prefixes.add_end("p", [1, 2, 3], cache_of(), 0, 0, mode, LOGITS)
            nothing_lost(prefixes)
        return prefixes

    both = filled(10**6)
    for missing, modes in ((0, ["one", "two"]), (1, ["one"])):
        prefixes = filled(both.bytes - missing)
        assert [mode for mode in ("one", "two") if prefixes.find("p", [1, 2, 3], mode).logits is not None] == modes
        assert prefixes.find("p", [1, 2, 3, 4], "two").length == 3


def test_a_page_behind_one_that_was_dropped() -> None:
    """Whoever keeps several in a row hands the last one on; meanwhile others may have dropped it, or read it anew."""
    prefixes, prompt = PrefixCache(10**6, PAGE), list(range(13))
    first = prefixes.add_page("p", prompt, 4, cache_of(), 0)
    assert first is not None
    second = prefixes.add_page("p", prompt, 8, cache_of(), 0, behind=first)
    assert second is not None and second.parent is first
    prefixes.limit = first.size
    assert prefixes.add_page("p", [7] * 5, 4, cache_of(), 0) is not None  # nothing else is left
    assert prefixes.add_page("p", prompt, 8, cache_of(), 0, behind=first) is None
    nothing_lost(prefixes)
    prefixes.limit = 10**6
    assert prefixes.add_page("p", prompt, 12, cache_of(), 0, behind=second) is None
    again = prefixes.add_page("p", prompt, 4, cache_of(), 0)
    found = prefixes.add_page("p", prompt, 8, cache_of(), 0, behind=first)
    assert again is not None and found is not None and found.parent is again is not first
    assert prefixes.find("p", prompt, None).length == 8
    nothing_lost(prefixes)


def test_the_least_recently_used_go_first() -> None:
    one = PrefixCache(10**6, PAGE)
    one.add_page("p", list(range(5)), 4, cache_of(), 0)
    prefixes = PrefixCache(3 * one.bytes, PAGE)
    chain, other = list(range(9)), [9] * 5
    for end in (4, 8):
        prefixes.add_page("p", chain, end, cache_of(), 0)
    prefixes.add_page("p", other, 4, cache_of(), 0)
    assert len(prefixes) == 3 and prefixes.evicted == 0
    assert prefixes.find("p", other, None).length == 4
    prefixes.add_page("p", [7] * 5, 4, cache_of(), 0)
    assert prefixes.find("p", chain, None).length == 4  # the leaf went, not what leads to it
    prefixes.add_page("p", [6] * 5, 4, cache_of(), 0)
    assert prefixes.find("p", chain, None).length == 4 and prefixes.find("p", other, None).length == 0
    nothing_lost(prefixes)
    small = PrefixCache(one.bytes - 1, PAGE)
    small.add_page("p", chain, 4, cache_of(), 0)  # its states do not fit
    assert len(small) == 1 and (small.find("p", chain, None).length, small.find("p", chain, None).branch) == (0, 4)
    nothing_lost(small)
    tiny = PrefixCache(9, PAGE)
    tiny.add_page("p", chain, 4, cache_of(), 0)
    assert len(tiny) == tiny.bytes == 0
    filled = PrefixCache(2 * one.bytes, PAGE)
    for end in (4, 8):
        filled.add_page("p", [*chain, 1, 2, 3, 4], end, cache_of(), 0)
    filled.add_page("p", [*chain, 1, 2, 3, 4], 12, cache_of(), 0)  # its own path fills the limit
    assert len(filled) == 2
    nothing_lost(filled)


def test_random_prompts_and_evictions() -> None:
    rng, prefixes = random.Random(0), PrefixCache(6000, PAGE)
    for _ in range(300):
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
        known = prefixes.find("p", prompt, None)
        assert [token for node in known.nodes for token in node.tokens] == prompt[: known.length]
        assert known.length < len(prompt) or known.logits is not None
        for end in range(PAGE, len(prompt), PAGE):
            prefixes.add_page("p", prompt, end, cache_of(1), 0, states=rng.random() < 0.5)
        prefixes.add_end("p", prompt, cache_of(1), 0, 1, None, LOGITS)
        nothing_lost(prefixes)
    assert prefixes.evicted > 0


def with_cache(engine: Engine, limit: int) -> Engine:
    engine.prefixes = PrefixCache(limit, PAGE)
    return engine


@pytest.mark.parametrize("limit", [10**6, 40_000])
@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_those_without_it(seed: int, limit: int) -> None:
    """Prompts that share beginnings, in all modes, a few at a time: miss, partial hit, whole hit, evicted."""
    rng = random.Random(seed)
    model = FakeModel(agreement=0.7, key=seed)
    engine, plain = (make_engine(model, 3, eos=[2])[0] for _ in range(2))
    with_cache(engine, limit)
    beginnings = [[rng.randrange(model.mask) for _ in range(18)] for _ in range(3)]
    for _ in range(8):
        prompts = [
            [*rng.choice(beginnings)[: rng.randint(1, 18)], *([rng.randrange(model.mask)] * rng.randint(0, 2))]
            for _ in range(4)
        ]
        options = random_options(rng)
        way = rng.choice(WAYS)
        chunk = rng.choice([1, 8, 9, 512])
        found = engine.generate(prompts, options, **way, max_new_tokens=9, prefill_chunk=chunk)
        expected = plain.generate(prompts, options, **way, max_new_tokens=9, prefill_chunk=chunk)
        for one, other in zip(found, expected, strict=True):
            assert (one.token_ids, one.forwards, one.accepted) == (other.token_ids, other.forwards, other.accepted)
    assert engine.prefixes is not None and engine.stats.known_tokens > 0 == plain.stats.known_tokens
    nothing_lost(engine.prefixes)


def test_threads_share_it() -> None:
    """Outputs of four at once are those without it, and nothing is lost of what they keep and forget."""
    model = FakeModel(agreement=0.7)
    engine, plain = with_cache(make_engine(model, 3)[0], 6_000), make_engine(model, 3)[0]
    beginnings = [[(7 * place + start) % model.mask for place in range(17)] for start in range(3)]

    def prompts(thread: int) -> list[list[int]]:
        rng = random.Random(thread)
        return [[*rng.choice(beginnings)[: rng.randint(1, 17)], rng.randrange(model.mask)] for _ in range(12)]

    def ask(thread: int) -> list[list[int]]:
        mode = MODES[thread % len(MODES)]
        return [engine.generate([prompt], mode=mode, max_new_tokens=4)[0].token_ids for prompt in prompts(thread)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    for thread, texts in enumerate(found):
        expected = plain.generate(prompts(thread), mode=MODES[thread % len(MODES)], max_new_tokens=4)
        assert texts == [one.token_ids for one in expected]
    assert engine.prefixes is not None and engine.stats.known_tokens > 0
    assert engine.prefixes.evicted > 0
    nothing_lost(engine.prefixes)


def test_a_whole_hit_needs_no_forward() -> None:
    engine, program = make_engine(FakeModel(agreement=0.7), 3)
    with_cache(engine, 10**6)
    prompt, calls = list(range(3, 14)), program.calls
    first = engine.generate([prompt], mode="ar-trust", max_new_tokens=2)[0]
    steps = len(calls) - 1
    again = engine.generate([prompt], mode="ar-trust", max_new_tokens=2)[0]
    assert len(calls) == 1 + 2 * steps and told_alike(first, again)
    engine.generate([[*prompt, 5]], mode="causal", max_new_tokens=1)  # behind the end
    assert [len(call.clean[0]) for call in calls[1 + 2 * steps :]] == [1]
    engine.generate([prompt], mode="causal", max_new_tokens=1)  # another mode starts from other logits
    assert [len(call.clean[0]) for call in calls[2 + 2 * steps :]] == [8, 3]  # and leaves states behind the last page
    engine.generate([[*prompt[:8], 1, 2]], mode="causal", max_new_tokens=1)
    assert [len(call.clean[0]) for call in calls[4 + 2 * steps :]] == [2] and engine.stats.prefills == 5


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_one_token_that_is_left(way: dict[str, Any]) -> None:
    """A prompt that is a known one and a token more: a forward with a single row, like a step, and yet a prompt's."""
    model = FakeModel(agreement=0.7)
    engine, plain = with_cache(make_engine(model, 3)[0], 10**6), make_engine(model, 3)[0]
    prompt = list(range(3, 14))
    engine.generate([prompt], **way, max_new_tokens=2)
    known = engine.stats.known_tokens
    found, expected = (one.generate([[*prompt, 5]], **way, max_new_tokens=12)[0] for one in (engine, plain))
    assert engine.stats.known_tokens - known == len(prompt)
    assert told_alike(found, expected) and found.accepted == expected.accepted


def told_alike(one: Any, other: Any) -> bool:
    return bool((one.token_ids, one.forwards) == (other.token_ids, other.forwards))


def test_bad_limits() -> None:
    model = FakeModel()
    for limit in (-1, 1.5, "many"):
        with pytest.raises(GenerationError, match="prefix_cache"):
            Engine(
                make_engine(model)[1], mask_token_id=None, block_size=None, readouts={}, eos_ids=[], max_positions=99,
                prefix_cache=limit,  # type: ignore[arg-type]
            )
