"""Calls of functions: read out of a text, however it comes in pieces, and told as OpenAI's client expects them."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from flarec import api
from flarec.serve import app
from flarec.serve.calls import CLOSE, OPEN, CallReader, in_template
from flarec.serve.fields import ChatFields, parse
from flarec.serve.jobs import Job, News
from flarec.serve.prompts import turn
from flarec.serve.replies import ChatReply, Transcript
from tests.serve.serving import NAME, client_of

NAMES = frozenset({"weather", "time"})


def written(name: str = "weather", **arguments: Any) -> str:
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments})}\n{CLOSE}"


CASES: list[tuple[str, str, list[tuple[str, dict[str, Any]]]]] = [
    (written(city="Ulm"), "", [("weather", {"city": "Ulm"})]),
    (f"I look.\n\n{written(city='Ulm')}\n{written('time')}\n", "I look.", [("weather", {"city": "Ulm"}), ("time", {})]),
    (f"{written(text=CLOSE[:-1], n=[1, None, {'ä': 2.5}])} and more ", "and more ",
     [("weather", {"text": CLOSE[:-1], "n": [1, None, {"ä": 2.5}]})]),
    (f" I look.\n{written('time')} \n{written('time')}It is ", " I look.\n \nIt is ", [("time", {})] * 2),
    (f"\n{written('time')}\nIt is {written('other')}", f"It is {written('other')}", [("time", {})]),
    ("no call at all \n", "no call at all \n", []),
    (f"{OPEN}\n{{\"name\": \"weather\", \"argu", f"{OPEN}\n{{\"name\": \"weather\", \"argu", []),  # cut by its length
    (written("other"), written("other"), []),
    (f"{OPEN}<function=weather>{CLOSE}", f"{OPEN}<function=weather>{CLOSE}", []),
    (f"{OPEN}{{\"name\": \"time\", \"arguments\": \"{{}}\"}}{CLOSE}",
     f"{OPEN}{{\"name\": \"time\", \"arguments\": \"{{}}\"}}{CLOSE}", []),
    (f"{OPEN}{{\"name\": \"time\", \"arguments\": {{\"x\": NaN}}}}{CLOSE}",
     f"{OPEN}{{\"name\": \"time\", \"arguments\": {{\"x\": NaN}}}}{CLOSE}", []),
    *[(f"{OPEN}{text}{CLOSE}", f"{OPEN}{text}{CLOSE}", []) for text in (  # no JSON, or none that can be sent
        '{"name": "time", "arguments": {"x": 1e999}}', '{"name": "time", "arguments": {"x": "\\ud800"}}',
        f'{{"name": "time", "arguments": {{"x": {"9" * 5000}}}}}', '{"name": "time", "arguments": {"x": "a\nb"}}',
    )],
    (f"say {OPEN} like this: {written('time')}", f"say {OPEN} like this:", [("time", {})]),
    (f"{OPEN}{'[' * 100_000}{CLOSE}", f"{OPEN}{'[' * 100_000}{CLOSE}", []),
    ("<tool_cal <", "<tool_cal <", []),
    ("", "", []),
]


def read(pieces: list[str]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    reader, text = CallReader(NAMES), ""
    calls: list[Any] = []
    for piece in pieces:
        shown, found = reader.feed(piece)
        text, calls = text + shown, calls + found
    assert reader.count == len(calls) == len({call["id"] for call in calls})
    return text + reader.close(), [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls
    ]


@pytest.mark.parametrize(("text", "shown", "calls"), CASES, ids=range(len(CASES)))
def test_what_is_a_call(text: str, shown: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    assert read([text]) == (shown, calls)


@given(st.sampled_from([case for case in CASES if len(case[0]) < 1000]), st.lists(st.integers(1, 20), max_size=40))
def test_however_it_comes(case: tuple[str, str, list[Any]], sizes: list[int]) -> None:
    text, shown, calls = case
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    assert read([*pieces, text[start:]]) == (shown, calls)


@given(st.text(alphabet="<tool_cal>/ \n{}x", max_size=60), st.integers(1, 5))
def test_text_without_calls_is_kept(text: str, size: int) -> None:
    assert read([text[at : at + size] for at in range(0, len(text), size)]) == (text, [])


def test_nothing_is_shown_and_taken_back() -> None:
    reader = CallReader(NAMES)
    assert reader.feed("Let me see. <too") == ("Let me see.", [])
    assert reader.feed("ls") == (" <tools", [])
    assert reader.feed(" \n" + OPEN + '{"name"') == ("", [])
    assert reader.close() == " \n" + OPEN + '{"name"'


def test_templates() -> None:
    assert in_template(f"... {OPEN} ... {CLOSE}") and in_template({"default": "x", "tool_use": OPEN + CLOSE})
    assert not in_template(None) and not in_template("plain") and not in_template({"default": "x"})


def reply() -> ChatReply:
    model: Any = SimpleNamespace()
    return ChatReply(model, "m", with_usage=False, logprobs=False, functions=NAMES)


@pytest.mark.parametrize(("text", "shown", "calls"), CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_whole_and_streamed_answers_agree(
    text: str, shown: str, calls: list[tuple[str, dict[str, Any]]], finish: str
) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    whole = ChatCompletion.model_validate(reply().whole([Transcript(0, [text], 1, [], finish)], usage), strict=True)
    (choice,) = whole.choices
    assert (choice.message.content or "") == shown and (choice.message.content is None) == (not shown and bool(calls))
    answered: list[Any] = [*(choice.message.tool_calls or ())]
    found = [(call.function.name, json.loads(call.function.arguments)) for call in answered]
    reason = "tool_calls" if calls and finish == "stop" else finish
    assert found == calls and choice.finish_reason == reason

    stream, job, size = reply(), Job([1], SimpleNamespace()), max(7, len(text) // 20)  # type: ignore[arg-type]
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    news = [*(News(job, piece) for piece in pieces), News(job, finish=finish)]
    body = b"".join(stream.piece(Transcript(0), item) for item in news).decode()
    chunks = [ChatCompletionChunk.model_validate_json(line[6:]) for line in body.splitlines() if line]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == shown
    told: list[Any] = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [call.index for call in told] == list(range(len(calls)))
    assert [(call.function.name, json.loads(call.function.arguments)) for call in told] == calls
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * (len(chunks) - 1), reason]


def test_an_answer_with_calls_may_be_sent_back() -> None:
    message = reply().whole([Transcript(0, [written(city="Ulm")], 1, [], "stop")], {})["choices"][0]["message"]
    tool = {"type": "function", "function": {"name": "weather"}}
    body = {"model": "m", "messages": [message, {"role": "tool", "content": "rain", "tool_call_id": "x"}]}
    fields = parse(ChatFields, json.dumps({**body, "tools": [tool]}).encode())
    assert turn(fields.messages[0])["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert fields.functions == {"weather"}
    none = parse(ChatFields, json.dumps({**body, "tools": [tool], "tool_choice": "none"}).encode())
    assert none.functions == frozenset() and none.offered == []


TOOLS: Any = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(("mark", "choice", "functions"), [
    (f"{{# {OPEN}{CLOSE} #}}", "auto", {"weather"}), (f"{{# {OPEN}{CLOSE} #}}", "none", set()), ("", "auto", set()),
])
def test_the_server_reads_calls_where_the_template_has_them(
    mark: str, choice: Any, functions: set[str], url: str, model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words of a model that calls nothing are those of its solo run, whole and streamed."""
    seen: list[Any] = []
    monkeypatch.setattr(model.tokenizer, "chat_template", model.tokenizer.chat_template + mark)

    class Seen(ChatReply):
        def __init__(self, *given: Any, **more: Any) -> None:
            seen.append(set(more["functions"]))
            super().__init__(*given, **more)

    monkeypatch.setattr(app, "ChatReply", Seen)
    ask: Any = functools.partial(
        client_of(url).chat.completions.create, model=NAME, messages=[{"role": "user", "content": "How?"}], tools=TOOLS,
        tool_choice=choice, max_tokens=12, temperature=0,
    )
    right = model.generate([[{"role": "user", "content": "How?"}]], max_new_tokens=12, temperature=0)[0].text
    assert ask().choices[0].message.content == right
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)) == right
    assert seen == [functions] * 2
