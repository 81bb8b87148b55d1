"""What the server answers is what the engine gives alone: as a whole or as a stream, whoever else is served."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from flarec import api
from flarec.base.generation import GenerationOptions
from tests.serve.serving import NAME, client_of, metrics

MODES: list[dict[str, Any]] = [
    {"mode": "causal"},
    {"mode": "ar-trust", "drafts": "single"},
    {"mode": "ar-trust", "drafts": "branches"},
    {"mode": "diffusion-trust", "threshold": 0.3, "denoising_steps": 2},
    {"mode": "diffusion-trust", "threshold": 0.0, "recheck": 0.4},
]
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
FIELDS: dict[str, Any] = {"max_tokens": 16, "temperature": 0.9, "top_p": 0.95, "seed": 11}


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return client_of(url)


def alone(model: api.Model, prompt: Any, way: dict[str, Any], **fields: Any) -> api.Output:
    fields = {**FIELDS, **fields}
    fields["max_new_tokens"] = fields.pop("max_tokens")
    return model.generate_ids([prompt if isinstance(prompt[0], int) else model.encode(prompt)], **fields, **way)[0]


def streamed(stream: Any, text_of: Any) -> dict[int, tuple[str, str]]:
    """Text and finish reason per choice; nothing follows a finish reason."""
    found: dict[int, tuple[str, str]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            text, end = found.get(choice.index, ("", ""))
            assert not end
            found[choice.index] = (text + (text_of(choice) or ""), choice.finish_reason or "")
    return found


def delta(choice: Any) -> str:
    return choice.delta.content


@pytest.mark.parametrize("way", MODES, ids=str)
def test_a_chat_whole_and_streamed_is_the_solo_run(way: dict[str, Any], client: Any, model: api.Model) -> None:
    ask = functools.partial(
        client.chat.completions.create, model=NAME, messages=MESSAGES, extra_body=way, **FIELDS
    )
    whole, right = ask(), alone(model, MESSAGES, way)
    assert whole.choices[0].message.content == right.text and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == right.new_tokens == 16
    assert whole.usage.prompt_tokens == len(model.encode(MESSAGES))
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 16
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage and all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 5
    assert streamed(chunks, delta) == {0: (right.text, "length")}
    assert streamed(ask(stream=True), delta) == {0: (right.text, "length")}


@pytest.mark.parametrize("stream", [False, True])
def test_choices_and_prompts(stream: bool, client: Any, model: api.Model) -> None:
    """Choice i of a prompt has the seed plus i; texts and token ids are prompts."""
    ids = [model.encode("one two"), model.encode("three")]
    for prompt, prompts in [(["one two", "three"], ids)] if stream else [(ids, ids), (ids[0], ids[:1])]:
        answer = client.completions.create(model=NAME, prompt=prompt, n=2, stream=stream, **FIELDS)
        right = [
            alone(model, tokens, {}, seed=seed).text for tokens in prompts for seed in (11, 12)
        ]
        if stream:
            found = streamed(answer, lambda choice: choice.text)
            assert found == {index: (text, "length") for index, text in enumerate(right)}
        else:
            assert [choice.text for choice in answer.choices] == right
            assert [choice.index for choice in answer.choices] == list(range(len(right)))
            assert answer.usage.prompt_tokens == sum(map(len, prompts))
            assert answer.usage.completion_tokens == 16 * len(right)


@pytest.mark.parametrize("way", [MODES[0], MODES[2], MODES[3]], ids=str)
def test_stop_strings_end_the_text_before_them(way: dict[str, Any], client: Any, model: api.Model) -> None:
    text = alone(model, "stop", way, max_tokens=60).text
    found = 0
    for start in range(3, len(text) - 4, 12):
        stops = [text[start : start + 3], "never in any text"]
        right = alone(model, "stop", way, max_tokens=60, stop=stops)
        ask = functools.partial(
            client.completions.create, model=NAME, prompt="stop", stop=stops, extra_body=way,
            **{**FIELDS, "max_tokens": 60},
        )
        whole = ask().choices[0]
        assert (whole.text, whole.finish_reason) == (right.text, "stop")
        assert not any(stop in whole.text for stop in stops)
        assert streamed(ask(stream=True), lambda choice: choice.text) == {0: (right.text, "stop")}
        found += 1
    assert found > 1


@pytest.mark.parametrize("way", [MODES[0], MODES[2], MODES[3]], ids=str)
def test_logprobs(way: dict[str, Any], client: Any, model: api.Model) -> None:
    """One per token, the same as a whole and streamed; those of the engine."""
    ask = functools.partial(
        client.chat.completions.create, model=NAME, messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body=way,
        **FIELDS,
    )
    whole = ask()
    told = whole.choices[0].logprobs.content
    assert whole.choices[0].message.content == alone(model, MESSAGES, way).text
    pieces = [chunk.choices[0].logprobs for chunk in ask(stream=True)]
    assert [entry for piece in pieces if piece for entry in piece.content] == told
    engine = model._engine("off")  # the server's own is its worker's
    request = engine.add(
        model.encode(MESSAGES), model.complete(GenerationOptions(
            max_new_tokens=16, temperature=0.9, top_p=0.95, seed=11, **way
        )), logprobs=2,
    )
    while engine.busy:
        engine.step()
    assert [entry.logprob for entry in told] == pytest.approx([one.logprob for one in request.chosen], abs=1e-4)
    assert whole.usage is not None and len(told) == whole.usage.completion_tokens
    for entry in told:
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.top_logprobs[0].logprob >= entry.logprob - 1e-6
        assert entry.bytes == (None if "\ufffd" in entry.token else list(entry.token.encode()))
    old = client.completions.create(model=NAME, prompt="x", logprobs=3, max_tokens=4, temperature=0).choices[0].logprobs
    assert old is not None and old.token_logprobs is not None and old.tokens is not None
    assert len(old.tokens) == len(old.token_logprobs) == len(old.text_offset or []) == 4
    assert [max(top.values()) for top in old.top_logprobs or []] == pytest.approx(old.token_logprobs)


def test_neighbours_with_other_settings(client: Any, model: api.Model) -> None:
    """Modes, seeds, temperatures and lengths at the same time; a prompt with one token left to prefill among them, and
    texts that end with EOS inside of a block."""
    hot = [GenerationOptions(max_new_tokens=24, temperature=3.0, seed=seed, **MODES[2]) for seed in range(60)]
    drawn = model.generate_ids([[7]] * 60, hot)
    ending = [index for index, output in enumerate(drawn) if output.stop_reason == "eos" and output.new_tokens % 4 != 1]
    assert len(ending) > 1
    cases = [([7], hot[index]) for index in ending[:3]]
    for index in range(9):
        options = GenerationOptions(
            max_new_tokens=8 + index, temperature=index % 3, seed=index, top_p=0.95, **MODES[index % len(MODES)]
        )
        cases.append(([5 + index] * (513 if index == 2 else 1 + index), options))

    def ask(case: tuple[list[int], GenerationOptions]) -> tuple[str, str, int]:
        prompt, options = case
        way = {name: getattr(options, name) for name in ("mode", "drafts", "threshold", "denoising_steps", "recheck")}
        answer = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=options.max_new_tokens, temperature=options.temperature,
            top_p=options.top_p, seed=options.seed, extra_body=way,
        )
        return answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.completion_tokens

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, cases))
    right = [model.generate_ids([prompt], options)[0] for prompt, options in cases]
    reasons = {"eos": "stop", "length": "length"}
    assert found == [(output.text, reasons[output.stop_reason], output.new_tokens) for output in right]
    assert [output.stop_reason for output in right[:2]] == ["eos", "eos"]


def test_what_was_read_before_is_not_read_again(client: Any, url: str, model: api.Model) -> None:
    """A prefix that is known, the whole prompt known, and one token behind what is known."""
    long = [3 + index % 200 for index in range(300)]
    prompts, way = [long, long, long[:257], [*long, 9], [*long[:270], 4]], MODES[2]
    right = [alone(model, prompt, way, max_tokens=6) for prompt in prompts]
    before = metrics(url)["flarec_prompt_tokens_known_total"]
    model.engine.keep_prefixes(64 << 20)
    try:
        for prompt, output in zip(prompts, right, strict=True):
            answer = client.completions.create(
                model=NAME, prompt=prompt, extra_body=way, logprobs=1, **{**FIELDS, "max_tokens": 6}
            )
            assert answer.choices[0].text == output.text
            assert len(answer.choices[0].logprobs.tokens) == output.new_tokens
    finally:
        model.engine.keep_prefixes(0)
    assert metrics(url)["flarec_prompt_tokens_known_total"] - before > 4 * 256


def test_a_random_seed_if_none_is_given(client: Any) -> None:
    texts = {client.completions.create(model=NAME, prompt="x", max_tokens=12).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_metrics_count(client: Any, url: str, model: api.Model) -> None:
    before = metrics(url)
    answer = client.completions.create(
        model=NAME, prompt="count", extra_body={"mode": "ar-trust", "drafts": "branches"}, **FIELDS
    )
    after = metrics(url)
    right = alone(model, "count", {"mode": "ar-trust", "drafts": "branches"})

    def added(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert answer.usage is not None
    assert added("flarec_generation_tokens_total") == answer.usage.completion_tokens
    assert added("flarec_prompt_tokens_total") == answer.usage.prompt_tokens
    assert added("flarec_generation_forwards_total") == right.forwards
    assert added('flarec_generations_total{finish="length"}') == 1
    for position in (1, 2, 3):
        assert added(f'flarec_drafted_tokens_total{{position="{position}"}}') == right.forwards - 1
        accepted = sum(right.accepted[position:])
        assert added(f'flarec_accepted_tokens_total{{position="{position}"}}') == accepted
    assert after["flarec_requests_waiting"] == after["flarec_requests_running"] == 0
    assert after["flarec_time_to_first_token_seconds_count"] > before["flarec_time_to_first_token_seconds_count"]


def test_models(client: Any) -> None:
    assert [entry.id for entry in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "flarec"
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist; this server has 'tiny'"):
        client.completions.create(model="other", prompt="x")
