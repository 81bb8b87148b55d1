"""A softmax model in float32: vLLM with drafts against vLLM without, on the same requests."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import flarec
from tests_vllm.conftest import MODELS, Answers, Rounds, answers, in_groups, record, texts

CONTEXT, WIDTH = 512, 8
EOS = 2
SAMPLES, SPLITS = 1000, 20
ENGINE = {"dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 32, "max_num_batched_tokens": 320}


def greedy(prompt: list[int], tokens: int = 96, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": tokens, **more}


def requests(samples: int) -> Rounds:
    """The rounds of both engines; `samples` is all that may differ."""
    known = record("llama")
    prompts, own = known["prompts"], known["tokens"]
    long = [token for prompt in prompts for token in prompt]
    each = [greedy(prompt) for prompt in prompts]
    return {
        "alone": in_groups(each, 1),
        "eight": in_groups(each, 8),
        # every text ends at a token of its middle, wherever in a step that comes
        "ends": in_groups([greedy(prompt, stop_token_ids=[text[len(text) // 2 - number % 9]])
                           for number, (prompt, text) in enumerate(zip(prompts, own, strict=True))], 8),
        "prefix": [[greedy(long[:300], 40)], [greedy(long[:300], 40)], [greedy(long[:310], 40)]],
        # vLLM keeps prefixes in blocks of 128 tokens on a CPU
        "one left": [[greedy(long[50:306], 40)], [greedy(long[50:307], 40)]],
        "chunks": [[greedy(long[:450], 40), greedy(prompts[0], 40), greedy(long[70:520], 40)]],
        "context end": [[greedy(long[20 + count : 500], 96, ignore_eos=True) for count in range(4)]],
        "grammar": [[greedy(prompt, 24, regex=r"(Step [0-9]: )?[a-z ]{5,40}\.") for prompt in prompts[:4]]],
        "mates": [[
            greedy(prompts[0], logprobs=3), {"prompt": prompts[1], "temperature": 1.3, "top_p": 0.8, "max_tokens": 70},
            greedy(prompts[2], 17), {"prompt": prompts[3], "temperature": 0.7, "top_k": 5, "seed": 3, "max_tokens": 90},
            greedy(prompts[4], ignore_eos=True), greedy(prompts[5], min_tokens=60),
            greedy(prompts[6], repetition_penalty=1.2, presence_penalty=0.3),
            greedy(prompts[7], bad_words=[], prompt_logprobs=1),
        ]],
        # here the third token is the first that meets a draft, and one of many
        "samples": [[{"prompt": prompts[6] + own[6][:2], "temperature": 1.0, "max_tokens": 8, "n": samples}]],
    }


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answers(tmp_path_factory.mktemp("plain"), "llama", False, requests(2 * SAMPLES), **ENGINE)[0]


@pytest.fixture(scope="session")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, dict[str, Any]]:
    return answers(tmp_path_factory.mktemp("drafted"), "llama", True, requests(SAMPLES), **ENGINE)


def test_the_prompts_are_many(plain: Answers, note: Callable[..., None]) -> None:
    """Else what follows says little; and plain vLLM writes what flarec writes."""
    own = record("llama")["tokens"]
    equal = sum(one == other for one, other in zip(texts(plain["alone"]), own, strict=True))
    note("llama, float32", prompts=len(own), tokens=sum(map(len, own)), equal_to_flarec=equal)
    assert len(own) == 50 and sum(map(len, own)) > 3000 and equal == 50


@pytest.mark.parametrize("name", ["alone", "eight"])
def test_greedy_texts_are_those_of_plain_vllm(
    plain: Answers, drafted: tuple[Answers, dict[str, Any]], note: Callable[..., None], name: str
) -> None:
    theirs, ours = texts(plain[name]), texts(drafted[0][name])
    note("llama, float32", **{f"equal_to_plain_vllm_{name}": sum(a == b for a, b in zip(theirs, ours, strict=True))})
    assert ours == theirs


@pytest.mark.parametrize("name", ["ends", "prefix", "one left", "chunks", "context end", "grammar"])
def test_odd_steps(plain: Answers, drafted: tuple[Answers, dict[str, Any]], name: str) -> None:
    assert texts(drafted[0][name]) == texts(plain[name])
    ours, theirs = ([a["cached"] for part in found[name] for a in part] for found in (drafted[0], plain))
    assert ours == theirs


def test_odd_steps_are_what_they_are_called(drafted: tuple[Answers, dict[str, Any]]) -> None:
    found = drafted[0]
    own = record("llama")["tokens"]
    ends = texts(found["ends"])
    assert sum(len(cut) < len(text) for cut, text in zip(ends, own, strict=True)) >= 40
    assert [part[0]["cached"] for part in found["prefix"]] == [0, 256, 256]
    assert found["one left"][1][0]["cached"] == 256  # of 257
    assert [20 + count + 12 for count in range(4)] == [len(text) for text in texts(found["context end"])]
    assert all(text[-1] == EOS for text in texts(found["grammar"]) if len(text) < 24)


def test_batch_mates_with_other_settings(plain: Answers, drafted: tuple[Answers, dict[str, Any]]) -> None:
    """Greedy requests beside others: their texts and log-probabilities are those of plain vLLM."""
    theirs, ours = plain["mates"][0], drafted[0]["mates"][0]
    for number in (0, 2, 4, 5, 6, 7):
        assert ours[number]["tokens"] == theirs[number]["tokens"], number
    (one,), (other,) = ours[0]["logprobs"], theirs[0]["logprobs"]
    assert len(one) == len(other) > 20
    for mine, their in zip(one, other, strict=True):
        assert {token: pytest.approx(value, abs=2e-3) for token, value in their.items()} == mine


def test_the_mask_is_no_word(drafted: tuple[Answers, dict[str, Any]]) -> None:
    known = {token for rounds in drafted[0].values() for text in texts(rounds) for token in text}
    mask = json.loads((MODELS / "llama" / "config.json").read_text())["mask_token_id"]
    assert len(known) > 200 and mask not in known


def test_tokens_per_forward(drafted: tuple[Answers, dict[str, Any]], note: Callable[..., None]) -> None:
    """Against `drafts = "single"` of flarec, which drafts in the forward of the prompt too. Masks are not counted."""
    own, counts = record("llama"), drafted[1]["alone"]
    tokens = len([token for text in texts(drafted[0]["alone"]) for token in text])
    forwards = 50 + counts["num_drafts"]
    ours, theirs = tokens / forwards, sum(map(len, own["tokens"])) / sum(own["forwards"])
    note("versions", **drafted[1]["versions"], flarec=flarec.__version__)
    note("llama, float32", tokens_per_forward=ours, tokens_per_forward_flarec_single=theirs, ratio=ours / theirs,
         drafted=counts["num_draft_tokens"], accepted=counts["num_accepted_tokens"],
         accepted_by_position=counts["num_accepted_tokens_per_pos"])
    assert ours / theirs >= 0.95
    # a text may end within a step; and only steps behind a full block draft, four tokens each
    assert tokens <= 50 + counts["num_drafts"] + counts["num_accepted_tokens"] <= tokens + 50 * 4
    assert counts["num_draft_tokens"] % 4 == 0 and counts["num_draft_tokens"] < 4 * counts["num_drafts"]
    assert counts["num_accepted_tokens_per_pos"][4:] == [0] * 4


def distance(one: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> float:
    """Total variation of two samples of equal size."""
    counts, others = Counter(one), Counter(other)
    return sum(abs(counts[key] - others[key]) for key in {*counts, *others}) / (2 * len(one))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_samples_have_the_same_distribution(
    plain: Answers, drafted: tuple[Answers, dict[str, Any]], note: Callable[..., None], length: int
) -> None:
    """Temperature 1: the first tokens, together, are as far from plain vLLM's as halves of plain vLLM's are apart."""
    theirs = [tuple(text[:length]) for text in texts(plain["samples"])]
    ours = [tuple(text[:length]) for text in texts(drafted[0]["samples"])]
    assert (len(theirs), len(ours)) == (2 * SAMPLES, SAMPLES)
    draw, apart = random.Random(0), []
    for _ in range(SPLITS):
        draw.shuffle(theirs)
        apart.append(distance(theirs[:SAMPLES], theirs[SAMPLES:]))
    bound = sorted(apart)[int(0.95 * SPLITS) - 1]
    found = distance(ours, theirs[:SAMPLES])
    note("llama, float32", **{f"total_variation_{length}": [found, bound]})
    assert found <= bound


def test_two_workers_that_share_a_model(tmp_path_factory: pytest.TempPathFactory, note: Callable[..., None]) -> None:
    """Tensor parallelism: every rank computes the same drafts, and the first one's are scheduled."""
    own = record("llama")
    rounds = {"eight": in_groups([greedy(prompt) for prompt in own["prompts"][:16]], 8)}
    found, counts = answers(
        tmp_path_factory.mktemp("parallel"), "llama", True, rounds, **ENGINE, tensor_parallel_size=2
    )
    equal = sum(one == other for one, other in zip(texts(found["eight"]), own["tokens"], strict=False))
    note("llama, float32, tensor parallel 2", prompts=16, equal=equal, **counts["eight"])
    assert equal == 16 and counts["eight"]["num_accepted_tokens"] > 300
