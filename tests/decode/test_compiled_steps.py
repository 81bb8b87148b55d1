"""Steps whose regions are compiled: AR-Trust gives what causal decoding gives, and nobody else notices."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest

from flarec.decode import DecodeProgram, Engine
from flarec.decode.graphs import PlainReplays
from flarec.decode.stores import Shelf, Static
from flarec.errors import FlarecWarning
from flarec.ir.compiled import Codes, compiled_by_region
from flarec.ir.program import Program
from flarec.passes import lower
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine
from tests.models import VOCABULARY, captured

MASK = VOCABULARY - 1
PROMPTS = [[5, 17, 33, 2, 8], [7], [101, 4, 4, 9, 260, 11, 3, 3, 1]]


@functools.cache
def decode_program(family: str) -> Program:
    return lower(captured(family), "decode", regions=True)


def engine_of(family: str, static: Static | None) -> Engine:
    return Engine(
        decode_program(family), mask_token_id=MASK, block_size=3, readouts={"ar-trust": "causal"}, eos_ids=(),
        max_positions=400, suppress=[MASK], static=static, slots=2,
    )


def generated(engine: Engine, prompts: int, **options: Any) -> list[list[int]]:
    return [found.token_ids for found in engine.generate(PROMPTS[:prompts], max_new_tokens=24, **options)]


def check(family: str, backend: str, prompts: int, *modes: str) -> None:
    """At temperature 1. With more prompts than slots the number of rows changes. Prompts are read compiled, too, those
    of one length at once."""
    codes, reading = Codes(backend), Codes(backend, dynamic=True)

    def make(program: DecodeProgram, codes: Codes = codes) -> Program:
        assert isinstance(program, Program)
        return compiled_by_region(program, codes)

    static = Static(make, read=functools.partial(make, codes=reading), read_after=0)
    plain, engine = engine_of(family, None), engine_of(family, static)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlarecWarning)
        wanted = generated(plain, prompts, mode="causal", temperature=1.0, seed=3)
        for mode in modes:
            assert generated(engine, prompts, mode=mode, temperature=1.0, seed=3) == wanted
    assert engine.stats.replays > 20 and codes.known and reading.known.keys() == codes.known.keys()


def test_compiled_ar_trust_gives_the_tokens_of_causal_decoding() -> None:
    check("bamba", "eager", 2, "causal", "ar-trust")


@pytest.mark.slow
def test_inductor_gives_the_tokens_of_causal_decoding() -> None:
    """A layer of each kind, and no steps of causal decoding: every kernel of every size is a process of a compiler."""
    check("qwen3_next", "inductor", 3, "ar-trust")


class Counting:
    """A program that counts its steps."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def step(self, *given: Any) -> Any:
        self.steps += 1
        return self.program.step(*given)


@pytest.mark.parametrize("after", [0, 12])
def test_the_other_program_runs_once_it_pays_and_is_made_once(after: int) -> None:
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    made: list[Counting] = []

    def make(program: DecodeProgram) -> Any:
        made.append(Counting(program))
        return made[-1]

    plain = engine.generate([[1, 2, 3]], mode="causal", max_new_tokens=40)[0].token_ids
    engine.stats.steps = 0
    engine.shelf = Shelf(PlainReplays, Static(make, after))
    for _ in range(2):  # the second time with the buffers of the first
        assert engine.generate([[1, 2, 3]], mode="causal", max_new_tokens=40)[0].token_ids == plain
    assert len(made) == 1
    first_of_calls = 2 if after == 0 else 1  # behind a prefill; the other one is among the steps before
    assert engine.stats.steps - made[0].steps == after + first_of_calls


def test_prompts_are_read_by_the_other_program_after_many_of_them() -> None:
    """What the program read before is no prefix of what the other one reads: it may round differently."""
    engine, _ = make_engine(FakeModel(agreement=0.7), 3)
    engine.keep_prefixes(10**6)
    made: list[Counting] = []

    def make(program: DecodeProgram) -> Any:
        made.append(Counting(program))
        return made[-1]

    engine.shelf = Shelf(PlainReplays, Static(lambda program: program, read=make, read_after=6))
    prompt = [1, 2, 3]
    wanted = engine.generate([prompt], mode="causal", max_new_tokens=5)[0].token_ids
    for known, steps in ((3, 0), (3, 1), (6, 1)):  # tokens that were known, steps of the other program
        assert engine.generate([prompt], mode="causal", max_new_tokens=5)[0].token_ids == wanted
        assert engine.stats.known_tokens == known
        assert sum(program.steps for program in made) == steps
    assert len(made) == 1 and engine.stats.prompt_tokens == 12
