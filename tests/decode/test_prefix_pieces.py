"""With a prefix cache prompts are read in pieces as large as without it, and what some of them share is still found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from flarec.decode import Engine
from flarec.decode.engine import PREFILL_ALONE, PREFILL_CHUNK
from flarec.decode.modes.causal import CausalMode
from flarec.decode.prefill import Prefill, chunk_ends, whole_pages
from flarec.decode.prefix import Prefix, PrefixCache, PrefixNode
from flarec.passes import lower
from tests.decode.fake_model import FakeModel, FakeProgram
from tests.decode.helpers import make_engine
from tests.decode.test_pieces import NO_VALUES, Valueless, rows_of
from tests.models import VOCABULARY, captured

PAGE = 4
MODEL = FakeModel(agreement=0.7)


def engine_of(limit: int = 10**6, page: int = PAGE) -> tuple[Engine, FakeProgram]:
    engine, program = make_engine(MODEL, 3)
    engine.prefixes = PrefixCache(limit, page) if limit else None
    return engine, program


def ask(engine: Engine, prompt: list[int], new_tokens: int = 3, **way: Any) -> list[int]:
    return engine.generate([prompt], mode="causal", max_new_tokens=new_tokens, **way)[0].token_ids


def read(program: FakeProgram, prompt: list[int], engine: Engine, **way: Any) -> list[tuple[int, int]]:
    """(first position, tokens) of the pieces in which a prompt is read; what it gives is what it gives anew."""
    program.calls.clear()
    plain = ask(make_engine(MODEL, 3)[0], prompt)
    assert ask(engine, prompt, **way) == plain
    pieces = [(call.clean[0][0], len(call.clean[0])) for call in program.calls if call.clean[0]]
    return [(start, count) for start, count in pieces if start < len(prompt)]


def text(length: int, seed: int = 0) -> list[int]:
    return [(7 * place + seed + place * place * seed) % MODEL.mask for place in range(length)]


@pytest.mark.parametrize("chunk", [PAGE, 3 * PAGE, 512])
def test_as_many_forwards_as_without_it(chunk: int) -> None:
    for length in (1, PAGE, PAGE + 1, 8 * PAGE, 8 * PAGE + 3):
        counts = []
        for limit in (0, 10**6):
            engine, _ = engine_of(limit)
            ask(engine, text(length), prefill_chunk=chunk)
            counts.append(engine.stats.prefills)
        assert counts == [-(-length // chunk)] * 2


def test_alone_pieces_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a prefix cache, behind what is known too."""
    monkeypatch.setitem(PREFILL_ALONE, "cpu", 24)
    monkeypatch.setitem(PREFILL_CHUNK, "cpu", 9)  # two pages
    engine, program = engine_of()
    assert read(program, text(60), engine) == [(0, 24), (24, 24), (48, 12)]
    assert read(program, [*text(53), 1, 2], engine) == [(48, 4), (52, 3)]  # up to the branch, and behind it
    assert read(program, [*text(54), 3, *text(30)], engine) == [(52, 24), (76, 9)]


def test_what_is_left_in_pieces() -> None:
    """All but the last end at pages, none is longer than a chunk, those before a branch end there, and no more of them
    than that takes."""
    for tokens in range(1, 26):
        for length in range(tokens + 1):
            for branch in [0, *range((length // PAGE + 1) * PAGE, tokens, PAGE)]:
                known = Prefix((PrefixNode(None, (0,) * length, 0, {}),) if length else (), branch=branch)
                for pages in (1, 2, 3):
                    ends = chunk_ends(tokens, pages * PAGE, known, PAGE)
                    starts = [length, *ends][: len(ends)]
                    assert ends[-1:] == [tokens] * (length < tokens) and (not branch or branch in ends)
                    assert all(end % PAGE == 0 for end in ends[:-1])
                    assert all(0 < end - start <= pages * PAGE for start, end in zip(starts, ends, strict=True))
                    fewest = [-(-(until - start // PAGE * PAGE) // (pages * PAGE))
                              for start, until in ((length, branch), (max(length, branch), tokens)) if start < until]
                    assert len(ends) <= sum(fewest)
    assert [whole_pages(chunk, 4) for chunk in (1, 4, 7, 8, 11)] == [4, 4, 4, 8, 8]


def test_prompts_with_the_same_opening() -> None:
    """The second one that leaves it ends a piece at its last whole page; from the third on nobody reads it again."""
    engine, program = engine_of()
    opening = text(30)
    first, second, third, fourth = ([*opening, seed, *text(9, seed)] for seed in (11, 12, 13, 14))
    assert read(program, first, engine) == [(0, 40)]
    assert read(program, second, engine) == [(0, 28), (28, 12)]
    assert read(program, third, engine) == [(28, 12)]
    assert read(program, fourth[:30] + fourth[:3], engine) == [(28, 5)]
    assert read(program, [*opening[:17], 9, 9], engine) == [(0, 16), (16, 3)]  # leaves it inside of the first piece
    assert read(program, [*opening[:18], 8, 8], engine) == [(16, 4)]


def test_pages_of_a_piece_are_kept_without_a_search_for_each() -> None:
    """Of a long prompt that would be its pages squared."""
    searches: list[int] = []

    class Counting(PrefixCache):
        def _parent(self, program: object, prompt: Sequence[int], end: int) -> PrefixNode | None:
            searches.append(end)
            return super()._parent(program, prompt, end)

    engine, _ = engine_of()
    engine.prefixes = Counting(10**6, PAGE)
    ask(engine, text(60))
    assert searches == [0, 56] and len(engine.prefixes) == 15  # of the first page, and of the end
    engine.prefixes = Counting(100, PAGE)  # two pages fit
    searches.clear()
    ask(engine, text(60))
    assert len(searches) <= 4


def test_a_chat_goes_on_behind_its_end() -> None:
    """A turn adds to the prompt before it; the first token of its answer is generated, so that states are there."""
    engine, program = engine_of()
    known = text(21)
    assert read(program, known, engine) == [(0, 21)]
    for _ in range(3):
        longer = [*known, *text(11, len(known))]
        assert read(program, longer, engine) == [(len(known), 11)]
        known = longer
    assert read(program, known, engine) == []


def test_an_end_is_kept_with_the_states_behind_it() -> None:
    """Not with the rows of a long piece, which the first step commits; a short piece leaves its rows at once."""
    engine, _ = engine_of()
    assert engine.prefixes is not None
    program, prompt = engine.program, text(14)
    ask(engine, prompt, 2)
    end = engine.prefixes.find(program, [*prompt, 1], None).nodes[-1]
    assert end.pending == 0 and end.states is not None and end.states["pending"].shape[1] == 0
    ask(engine, [*prompt, 1, 2], 1)
    end = engine.prefixes.find(program, [*prompt, 1, 2, 1], None).nodes[-1]
    assert (end.end, end.pending) == (16, 2)
    ask(engine, text(14, 5), 1)  # ends with its first token, before a step
    found = engine.prefixes.find(program, [*text(14, 5), 1], None)
    assert (found.length, found.branch) == (0, 12)


def test_those_of_one_opening_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward holds as many prompts as what is left of them allows."""
    monkeypatch.setattr("flarec.decode.scheduler.PREFILL_ROWS", 40)
    engine, program = engine_of()
    opening = text(30)
    for seed in (11, 12):
        ask(engine, [*opening, seed, 1], prefill_chunk=32)
    program.calls.clear()
    prompts = [[*opening, 3 + index, 2, 1] for index in range(9)]
    found = engine.generate(prompts, mode="causal", max_new_tokens=2, prefill_chunk=32)
    assert [item.token_ids for item in found] == [ask(make_engine(MODEL, 3)[0], prompt, 2) for prompt in prompts]
    assert [len(call.clean) for call in program.calls if len(call.clean[0]) > 1] == [8, 1]


def test_together_with_a_branch_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with as many chunks left end at once, wherever those of one of them have to end."""
    monkeypatch.setitem(PREFILL_ALONE, "cpu", 1000)
    monkeypatch.setitem(PREFILL_CHUNK, "cpu", 16)
    engine, program = engine_of()
    ask(engine, text(40))
    program.calls.clear()
    prompts = [[*text(21), 1, 2], text(40, 9)]
    found = engine.generate(prompts, mode="causal", max_new_tokens=3)
    assert [item.token_ids for item in found] == [ask(make_engine(MODEL, 3)[0], prompt) for prompt in prompts]
    pieces = [[(row[0], len(row)) for row in call.clean] for call in program.calls if len(call.clean[0]) > 1]
    assert sorted(pieces[0]) == [(0, 20), (0, 32)] and sorted(pieces[1]) == [(20, 3), (32, 8)]


@pytest.mark.parametrize("limit", [2_000, 700])
def test_what_was_forgotten_is_read_again(limit: int) -> None:
    """States, pages or everything: as long as a limit holds, texts are those without it."""
    engine, program = engine_of(limit)
    assert engine.prefixes is not None
    for seed in range(12):
        prompt = [*text(9 + seed % 3 * 8), seed, *text(seed, seed)]
        pieces = read(program, prompt, engine, prefill_chunk=[8, 512][seed % 2])
        assert sum(count for _, count in pieces) <= len(prompt) and engine.prefixes.bytes <= limit
    assert engine.prefixes.evicted and engine.stats.known_tokens


@pytest.mark.parametrize("family", ["qwen3_5_text", "llama", "mamba", "recurrent_gemma"])
def test_models_share_an_opening(family: str) -> None:
    """Linear attention and convolutions, softmax attention alone, selective scan, gated recurrence: tokens are those
    of an engine without prefixes; of an opening read at once the third prompt reads nothing again."""
    program = lower(captured(family), "decode")
    engines = [
        Engine(program, mask_token_id=None, block_size=None, readouts={}, eos_ids=(), max_positions=400, prefix_cache=n)
        for n in (0, 10**8)
    ]
    generator = torch.Generator().manual_seed(0)
    opening, *rest = ([int(n) for n in torch.randint(3, VOCABULARY - 1, (size,), generator=generator)]
                      for size in (70, 30, 9, 22))
    engines[1].prefixes = PrefixCache(10**8, 16)
    prompts = [[*opening, *tail] for tail in rest]
    prompts += [[*prompts[2], 5], prompts[2], [*opening[:50], 7]]
    states = any(not slot.in_place for slot in program.cache_slots)
    known, forwards = [0, 0, 64, 92, 92, 0], [1, 2, 1, 1, 0, 2]
    if not states:
        known, forwards = [0, 64, 64, 92, 92, 48], [1, 1, 1, 1, 0, 1]
    for prompt, length, count in zip(prompts, known, forwards, strict=True):
        before = engines[1].stats.known_tokens, engines[1].stats.prefills
        plain, found = (engine.generate([prompt], max_new_tokens=6)[0].token_ids for engine in engines)
        assert found == plain
        assert (engines[1].stats.known_tokens, engines[1].stats.prefills) == (before[0] + length, before[1] + count)


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba"])
def test_a_piece_waits_for_nothing(family: str) -> None:
    """Nor do pages and states that are kept, or those that are put back."""
    program = Valueless(lower(captured(family), "decode", kernels="triton"))
    prefixes = PrefixCache(1 << 40, 64)
    for known, forwards in ((0, 3), (512, 2)):  # the second one up to the last page, and behind it
        rows = rows_of(program, CausalMode(), [640])
        found = [prefixes.find(program, request.prompt, None) for request in rows.requests]
        prefill = Prefill(rows, 256, prefixes, found)
        assert prefill.known[0].length == known
        for _ in range(forwards - 1):
            assert not prefill.advance()
        with pytest.raises(NO_VALUES):
            prefill.advance()
        assert prefill.forwards == forwards
        prefill._keep_pages([512], [640])  # as behind the first tokens
    assert len(prefixes) == 9
