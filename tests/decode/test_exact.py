"""AR-Trust gives the tokens of causal decoding, whatever runs beside it: random scenarios on real (tiny) models.

A scenario draws a family, a readout, a policy of drafts, a block size, slots, chunks of prompts, whether steps go
through the buffers of graphs, and whether prompts come from a prefix cache; the noise of every third is random ids; its
requests arrive, stop and are cancelled at random. A case is a request. The default suite runs a sample; `make
test-exact CASES=10000` runs as many as one likes, in parts of a few families each, so that several processes share
them.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import pytest

from flarec.base.generation import HEADLESS
from flarec.decode import Engine
from flarec.decode.prefix import PrefixCache
from flarec.decode.request import Request
from flarec.layout import READOUTS
from flarec.passes import lower
from flarec.verify import Subject
from flarec.verify.decoding import near_tie, random_sampling
from tests.decode.test_graphs import with_graphs
from tests.models import ALL_FAMILIES, FAMILIES, VOCABULARY, captured, shared_model

REQUESTS = 6
SAMPLE = 9 * REQUESTS
PARTS = 16
MASK = VOCABULARY - 1


@functools.cache
def subject(family: str) -> Subject:
    decode = lower(captured(family), "decode")
    return Subject(decode, decode, shared_model(family), mask_token_id=MASK, block_size=3, suppress=(MASK,))


def scenario(seed: int, families: tuple[str, ...]) -> tuple[int, int, int, list[str]]:
    """(cases, prompt tokens that a prefix cache knew, near ties, differences) of one."""
    rng = random.Random(seed)
    family, size, readout = rng.choice(families), rng.choice([1, 2, 3, 5]), rng.choice(sorted(READOUTS))
    drafts = rng.choice([name for name in HEADLESS if name != "auto" or readout == "causal"])
    made = subject(family)
    engine = Engine(
        made.decode, mask_token_id=MASK, block_size=size, readouts={"ar-trust": readout}, eos_ids=(),
        max_positions=400, suppress=[MASK], noise_ids=((0, MASK),) if seed % 3 == 2 else (),
    )
    graphs = rng.random() < 0.5
    if graphs:
        with_graphs(engine)
    engine._serving = engine._scheduler(rng.choice([1, 2, 4]), rng.choice([3, 8, 512]))
    opening = [rng.randrange(MASK) for _ in range(9)]  # of some of them: a prefix cache finds it
    prompts = [
        [*opening[: rng.choice([0, 0, 4, 9])], *[rng.randrange(MASK) for _ in range(rng.randint(1, 14))]]
        for _ in range(REQUESTS)
    ]
    each = [replace(random_sampling(rng), max_new_tokens=rng.randint(1, 14)) for _ in prompts]
    expected = engine.generate(prompts, each, mode="causal")
    eos = [
        [item.token_ids[rng.randrange(len(item.token_ids))]] if rng.random() < 0.3 else [] for item in expected
    ]
    prefixes = rng.choice([0, 0, 3 * 10**5, 10**8])  # none, one that forgets, one that keeps everything
    if prefixes:
        engine.prefixes = PrefixCache(prefixes, rng.choice([2, 5]))
        engine._serving = engine._scheduler(rng.choice([1, 2, 4]), rng.choice([1, 11, 512]))
    waiting, running = list(range(REQUESTS)), dict[int, Request]()
    while waiting or engine.busy:
        for index in waiting[: rng.choice([0, 1, 3])]:
            waiting.remove(index)
            running[index] = engine.add(prompts[index], each[index], mode="ar-trust", drafts=drafts, eos_ids=eos[index])
        alive = [request for request in running.values() if not request.finished]
        if alive and rng.random() < 0.08:
            engine.cancel(rng.choice(alive))
        engine.step()
    ties, wrong = 0, []
    for index, request in running.items():
        whole = expected[index].token_ids
        ends = next((place + 1 for place, token in enumerate(whole) if token in eos[index]), len(whole))
        found = request.generation()
        wanted = whole[: len(found.token_ids) if found.stop_reason == "cancelled" else ends]
        if found.token_ids == wanted:
            continue
        length = min(len(wanted), len(found.token_ids))
        a, b = wanted[:length], found.token_ids[:length]
        if a != b and near_tie(made, prompts[index], each[index], a, b):
            ties += 1
        else:
            wrong.append(
                f"scenario {seed}: {family}, blocks of {size}, {readout}, {drafts}, graphs {graphs}, prefix cache "
                f"{prefixes}, request {index}, {each[index]}: causal {wanted}, AR-Trust {found.token_ids}"
            )
    return REQUESTS, engine.stats.known_tokens, ties, wrong


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A part has a number, families and cases: all of what was asked for in PARTS, or a sample in one."""
    asked: Any = metafunc.config.getoption("--exact-cases")
    parts: list[tuple[int, tuple[str, ...], int]] = [(0, FAMILIES, SAMPLE)]
    if asked is not None:
        parts = [(part, ALL_FAMILIES[part::PARTS], -(-asked // PARTS)) for part in range(PARTS)]
    metafunc.parametrize(("part", "families", "wanted"), parts, ids=[f"part {part}" for part, *_ in parts])


def test_ar_trust_equals_causal(part: int, families: tuple[str, ...], wanted: int) -> None:
    cases = known = ties = 0
    seed = 10**6 * part
    wrong: list[str] = []
    while cases < wanted:
        more, hits, tied, found = scenario(seed, families)
        cases, known, ties, wrong, seed = cases + more, known + hits, ties + tied, wrong + found, seed + 1
    print(
        f"{', '.join(families)}: {cases} cases, {known} prompt tokens from prefix caches, {ties} near ties, "
        f"{len(wrong)} differences"
    )
    assert known
    assert not wrong, "\n".join(wrong[:5])
    assert ties <= cases // 100, f"{ties} near ties of {cases}"
