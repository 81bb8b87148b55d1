"""Where generations end: EOS, stop checks, length limits, the context; and which requests are refused."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from flarec.base.generation import MODES, GenerationOptions
from flarec.decode import Engine
from flarec.errors import GenerationError
from tests.decode.fake_model import FakeModel, FakeProgram
from tests.decode.helpers import make_engine, random_prompts

MODE_OPTIONS = [
    ("causal", {}),
    ("ar-trust", {"drafts": "branches"}),
    ("ar-trust", {"drafts": "single"}),
    ("diffusion-trust", {"threshold": 0.5}),
    ("diffusion-trust", {"threshold": 0.3, "recheck": 0.3}),
    ("elastic", {"threshold": 0.0, "recheck": 0.3}),
]
PARAMS = GenerationOptions(temperature=1.0, seed=5)


@pytest.mark.parametrize(("mode", "options"), MODE_OPTIONS)
def test_nothing_follows_eos(mode: str, options: dict) -> None:
    """The result is the run without EOS, cut after the first EOS, wherever in a block it falls."""
    model = FakeModel(agreement=0.9)
    free, _ = make_engine(model, 4)
    prompts = random_prompts(random.Random(0), model, 6)
    whole = free.generate(prompts, PARAMS, mode=mode, max_new_tokens=60, **options)
    offsets = set()
    for eos in range(4):
        engine, _ = make_engine(model, 4, eos=[eos, 15])
        cut = engine.generate(prompts, PARAMS, mode=mode, max_new_tokens=60, **options)
        for long, result in zip(whole, cut, strict=True):
            ends = [i for i, token in enumerate(long.token_ids) if token in (eos, 15)]
            if ends:
                offsets.add(ends[0] % 4)
                assert result.stop_reason == "eos" and result.token_ids == long.token_ids[: ends[0] + 1]
                assert result.forwards <= long.forwards
            else:
                assert result.stop_reason == "length" and result.token_ids == long.token_ids
    assert offsets == {0, 1, 2, 3}


@pytest.mark.parametrize(("mode", "options"), MODE_OPTIONS)
@pytest.mark.parametrize("dropped", [0, 2])
def test_stop_check(mode: str, options: dict, dropped: int) -> None:
    model = FakeModel(agreement=0.9)
    engine, _ = make_engine(model, 3)
    whole = engine.generate([[1, 2]], PARAMS, mode=mode, max_new_tokens=60, **options)[0].token_ids
    for end in range(2, 20):
        pattern = whole[end - 2 : end]
        first = next(i for i in range(2, 61) if whole[i - 2 : i] == pattern)

        def check(tokens: Sequence[int], pattern: list[int] = pattern) -> int | None:
            return len(tokens) - dropped if list(tokens[-2:]) == pattern else None

        result = engine.generate([[1, 2]], PARAMS, mode=mode, max_new_tokens=60, stop_check=check, **options)[0]
        assert result.stop_reason == "stop" and result.token_ids == whole[: first - dropped]
        assert len(result.origins) == result.new_tokens


@pytest.mark.parametrize(("mode", "options"), MODE_OPTIONS)
def test_length_limits_cut_the_same_text(mode: str, options: dict) -> None:
    model = FakeModel(agreement=0.9)
    engine, _ = make_engine(model, 4)
    whole = engine.generate([[3, 1, 2]], PARAMS, mode=mode, max_new_tokens=30, **options)[0].token_ids
    for limit in range(1, 12):
        result = engine.generate([[3, 1, 2]], PARAMS, mode=mode, max_new_tokens=limit, **options)[0]
        assert result.token_ids == whole[:limit] and result.stop_reason == "length"


@pytest.mark.parametrize(("mode", "options"), MODE_OPTIONS)
def test_context_length(mode: str, options: dict) -> None:
    """Prompt and new tokens fill the context M exactly; the last forward starts at M - 2 at the latest."""
    model = FakeModel(agreement=0.9)
    size = 3
    for context in range(4, 20):
        engine, program = make_engine(model, size, max_positions=context)
        result = engine.generate([[3, 1, 2]], PARAMS, mode=mode, max_new_tokens=100, **options)[0]
        assert len(result.token_ids) == context - 3 and result.stop_reason == "length"
        for call in program.calls:
            if mode != "diffusion-trust" and call is not program.calls[0]:
                assert call.clean[0][0] <= context - 2
            last = max([*call.clean[0], *(anchor + size - 1 for anchor, _ in call.blocks[0])])
            assert last <= context - 2 + size + size


@pytest.mark.parametrize(("mode", "options"), MODE_OPTIONS)
def test_stream_of_tokens_is_the_result(mode: str, options: dict) -> None:
    model = FakeModel(agreement=0.8)
    engine, _ = make_engine(model, 4, eos=[1])
    prompts = random_prompts(random.Random(1), model, 5)
    seen: dict[int, list[int]] = {index: [] for index in range(5)}

    def on_tokens(index: int, tokens: list[int]) -> None:
        assert tokens
        seen[index] += tokens

    results = engine.generate(prompts, PARAMS, mode=mode, max_new_tokens=40, on_tokens=on_tokens, **options)
    assert [seen[index] for index in range(5)] == [result.token_ids for result in results]


def test_unconverted_models_decode_causally_only() -> None:
    model = FakeModel()
    engine, program = make_engine(model, None)
    assert engine.generate([[1, 2]], max_new_tokens=3)[0].new_tokens == 3
    assert all(not blocks for call in program.calls for blocks in call.blocks)
    for mode in MODES[1:]:
        with pytest.raises(GenerationError, match=r"not converted .* run flarec convert"):
            engine.generate([[1, 2]], mode=mode)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1] * 20]}, "20 tokens, which leaves no room"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 99]]}, "id 99, outside the vocabulary"),
        ({"prompts": [[1, 10**5000]]}, "an integer of [0-9]+ bits, outside the vocabulary"),
        ({"prompts": [1, 2]}, "prompt 0 is 1; give a list of token ids"),
        ({"prompts": torch.tensor([1, 2])}, r"prompt 0 is tensor\(1\); give a list"),
        ({"prompts": "text"}, "prompt 0 is 't'; give a list"),
        ({"prompts": [[1, 2.0]]}, "a token id of prompt 0 is 2.0"),
        ({"prompts": [[1], [True]]}, "a token id of prompt 1 is True"),
        ({"prompts": torch.ones(1, 2)}, "a token id of prompt 0 is 1.0"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"options": [GenerationOptions()] * 3}, "1 prompts came with 3 generation options"),
        ({"drafts": "tree"}, "unknown drafts 'tree'"),
        ({"threshold": 1.5}, r"threshold is 1\.5; give a number, at least 0, at most 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"denoising_steps": 0}, "denoising_steps is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"prefill_chunk": True}, "prefill_chunk is True"),
        ({"stop_check": lambda tokens: len(tokens) + 1}, "asked to keep 2 of 1"),
        ({"stop_check": []}, "1 prompts came with 0 stop checks"),
        ({"stop": "x"}, "text to stop at needs a tokenizer"),
        ({"suppress": [3, 17]}, r"suppressed ids \[17\] are outside the vocabulary of 17"),
        ({"suppress": -1}, r"suppressed ids \[-1\]"),
        ({"suppress": range(16)}, "all 17 ids of the vocabulary are suppressed"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    engine, _ = make_engine(FakeModel(), 3, max_positions=20)
    with pytest.raises(GenerationError, match=message) as error:
        engine.generate(**{"prompts": [[1, 2]], **arguments})
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "values"),
    [("mode", list(MODES)), ("drafts", ["branches", "single"]), ("threshold", [0.1, 0.9]),
     ("denoising_steps", [1, 3]), ("suppress", [[1], [2]])],
)
def test_prompts_may_differ_in_how_they_step(name: str, values: list) -> None:
    engine, _ = make_engine(FakeModel(agreement=0.8), 3)
    mode = {} if name == "mode" else {"mode": "ar-trust" if name == "drafts" else "diffusion-trust"}
    each = [GenerationOptions(max_new_tokens=15, **{**mode, name: value}) for value in values]
    together = engine.generate([[1, 2]] * len(each), each)
    for options, result in zip(each, together, strict=True):
        alone = engine.generate([[1, 2]], options)[0]
        assert (result.token_ids, result.forwards, result.mode) == (alone.token_ids, alone.forwards, alone.mode)


def test_eos_suppressed_ids_and_stop_checks_are_of_the_call() -> None:
    """Also of single prompts, where they may differ; the engine's own stay as they are."""
    engine, _ = make_engine(FakeModel(agreement=0.9), 3, eos=[15])
    free, other = engine.generate([[1, 2], [3]], max_new_tokens=12, eos_ids=())
    assert free.stop_reason == "length"
    eos = free.token_ids[4]
    first, same = engine.generate(
        [[1, 2], [3]], [GenerationOptions(eos_ids=frozenset([eos])), GenerationOptions(eos_ids=frozenset())],
        max_new_tokens=12,
    )
    assert first.token_ids == free.token_ids[: free.token_ids.index(eos) + 1] and first.stop_reason == "eos"
    assert same.token_ids == other.token_ids
    assert eos not in engine.generate([[1, 2]], max_new_tokens=12, suppress=eos)[0].token_ids
    stopped, going = engine.generate(
        [[1, 2], [3]], max_new_tokens=12, eos_ids=[], stop_check=[lambda tokens: 2 if len(tokens) == 3 else None, None]
    )
    assert stopped.token_ids == free.token_ids[:2] and going.token_ids == other.token_ids
    assert (set(engine.eos_ids), set(engine.suppress)) == ({15}, {16})


def test_prompts_in_every_form() -> None:
    engine, _ = make_engine(FakeModel(), 3)
    expected = [item.token_ids for item in engine.generate([[1, 2], [3, 4]], mode="ar-trust", max_new_tokens=5)]
    pairs = [[1, 2], [3, 4]]
    forms: list = [
        torch.tensor(pairs), np.array(pairs), [torch.tensor(pair) for pair in pairs], [np.array(p) for p in pairs],
        [tuple(pair) for pair in pairs], [[np.int64(token) for token in pair] for pair in pairs],
    ]
    for prompts in forms:
        result = engine.generate(prompts, mode="ar-trust", max_new_tokens=5)
        assert [item.token_ids for item in result] == expected
        assert all(type(token) is int for item in result for token in item.token_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size is 0; give a whole number, at least 1, at most 20"),
        ({"block_size": 21}, "block_size is 21"),
        ({"block_size": True}, "block_size is True"),
        ({"mask_token_id": 18}, "mask_token_id is 18; give a whole number, at least 0, at most 17"),
        ({"mask_token_id": -1}, "mask_token_id is -1"),
        ({"suppress": [17]}, "outside the vocabulary"),
        ({"suppress": range(17)}, "all 17 ids"),
        ({"eos_ids": [0.5]}, "a token id of eos_ids is 0.5"),
        ({"readouts": {"ar-trust": "sideways"}}, "cannot use readouts"),
    ],
)
def test_an_engine_that_cannot_be(changes: dict, message: str) -> None:
    given: dict = {"mask_token_id": 16, "block_size": 3, "readouts": {}, "eos_ids": (), "max_positions": 20}
    with pytest.raises(GenerationError, match=message):
        Engine(FakeProgram(FakeModel()), **{**given, **changes})


def test_no_prompts() -> None:
    assert make_engine(FakeModel())[0].generate([]) == []
