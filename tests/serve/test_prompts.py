"""What of a request reaches the chat template and the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flarec import api
from flarec.serve.fields import ChatFields, parse
from flarec.serve.prompts import chat_prompt, choices_of, options_of
from flarec.serve.refusals import HttpRefusal

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SHOWS_ALL = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}C{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{{ mood or '' }}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def fields(**values: Any) -> ChatFields:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **values}
    return parse(ChatFields, json.dumps(body).encode())


@pytest.fixture
def shown(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The prompt's text under a template that shows everything."""
    monkeypatch.setattr(model.tokenizer, "chat_template", SHOWS_ALL)

    def show(**values: Any) -> str:
        ids = chat_prompt(model, fields(**values))
        return model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    return show


def test_tools_and_variables_reach_the_template(shown: Any) -> None:
    assert shown() == "<user>hi<assistant>"
    with_tools = shown(tools=[TOOL], tool_choice="auto", chat_template_kwargs={"mood": "calm"})
    assert with_tools == f"T[{json.dumps(TOOL)}]<user>hicalm<assistant>"
    assert shown(tools=[TOOL], tool_choice="none") == shown(tools=[]) == "<user>hi<assistant>"


def test_turns(shown: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    text = shown(messages=[
        {"role": "system", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "add"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ])
    assert text == '<system>one\ntwo<user>add<assistant>Cadd{"a": 1}<tool>2<assistant>'


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "add_generation_prompt", "messages", "tools"])
def test_the_servers_own_arguments_are_no_variables(name: str, model: api.Model) -> None:
    with pytest.raises(HttpRefusal, match=f"'chat_template_kwargs.{name}' is the server's own"):
        chat_prompt(model, fields(chat_template_kwargs={name: "x"}))


def test_without_a_template(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(HttpRefusal, match="no chat template") as caught:
        chat_prompt(model, fields())
    assert caught.value.param == "messages"


def test_defaults_are_openais_and_the_checkpoints(model: api.Model) -> None:
    options = options_of(model, fields(), 77)
    assert (options.temperature, options.top_p, options.top_k, options.max_new_tokens) == (1.0, 1.0, 0, 77)
    assert (options.mode, options.drafts, options.stop) == ("ar-trust", "branches", ())
    assert options_of(model, fields(), 77).seed != options.seed
    own = options_of(model, fields(temperature=0, top_k=-1, seed=2**63 - 1, stop="x", max_tokens=5, mode="causal"), 77)
    assert (own.temperature, own.top_k, own.stop, own.max_new_tokens, own.mode) == (0.0, 0, ("x",), 5, "causal")
    assert [choice.seed for choice in choices_of(own, 3)] == [2**63 - 1, 0, 1]
