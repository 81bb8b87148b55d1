"""What is supervised for templates that print a turn differently in the whole conversation, and of tool calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flarec.base.messages import BadRecord, messages_of, tools_of
from flarec.train.data.chat import ChatEncoder, Dialogue
from tests.train import small_tokenizer as small

END = "<|im_end|>"
TOKENIZERS = {
    name: small.small_tokenizer(getattr(small, name)) for name in ("REASONING", "CALLS", "JOINING", "BARE", "CHATML")
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
ASKED = {"role": "user", "content": "Rain?"}
ANSWERED = {"role": "assistant", "content": "No."}


def spans(name: str, messages: list[Any], tools: Any = None, **options: Any) -> list[str]:
    """The supervised text of the turns; that they are whole tokens of the whole rendering is checked."""
    tokenizer = TOKENIZERS[name]
    first = options.pop("first", 0)
    encoder = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    ids, found = encoder.encode_conversation(Dialogue(messages_of(messages), tools_of(tools), first, options))
    return [tokenizer.decode(ids[start:end]) for start, end in found]


def calling(call: Any, **fields: Any) -> list[Any]:
    return [ASKED, {"role": "assistant", "tool_calls": [call], **fields}, {"role": "tool", "content": "dry"}, ANSWERED]


def with_arguments(arguments: Any) -> Any:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


# --- reasoning


def test_reasoning_of_earlier_turns_is_not_there_and_of_the_last_one_is() -> None:
    first = {"role": "assistant", "content": "No.", "reasoning_content": "I look out."}
    last = {"role": "assistant", "content": "Dry.", "reasoning_content": "Again?"}
    messages = [ASKED, first, ASKED, last]
    assert spans("REASONING", messages) == ["No." + END, "Again?\n</think>\n\nDry." + END]
    inline = [ASKED, {"role": "assistant", "content": "<think>\nI look out.\n</think>\n\nNo."}, ASKED, last]
    assert spans("REASONING", inline) == spans("REASONING", messages), "wherever the record holds it"
    aliased = [ASKED, first, ASKED, {"role": "assistant", "content": "Dry.", "reasoning": "Again?"}]
    assert spans("REASONING", messages_of(aliased))[0] == "No." + END


def test_a_turn_starts_behind_what_the_generation_prompt_writes() -> None:
    """An open block of reasoning; an empty one; and the part of an empty one that the turn's own block shares."""
    thought = {"role": "assistant", "content": "No.", "reasoning_content": "I look."}
    assert spans("REASONING", [ASKED, ANSWERED]) == ["\n</think>\n\nNo." + END]
    assert spans("REASONING", [ASKED, ANSWERED], thinking=False) == ["No." + END]
    assert spans("REASONING", [ASKED, thought]) == ["I look.\n</think>\n\nNo." + END]
    assert spans("REASONING", [ASKED, thought], thinking=False) == ["I look.\n</think>\n\nNo." + END]
    tokenizer = TOKENIZERS["REASONING"]
    for options in ({}, {"thinking": False}):
        prompt = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, tokenize=False, **options)
        whole = tokenizer.apply_chat_template([ASKED, ANSWERED], tokenize=False, **options)
        assert whole == prompt + spans("REASONING", [ASKED, ANSWERED], **options)[0] + "\n"


def test_steps_with_tools_behind_the_last_question_keep_their_reasoning() -> None:
    messages = calling(CALL, reasoning_content="I ask.")
    assert spans("REASONING", messages) == [
        "I ask.\n</think>\n\n<call=weather> city=Rome days=2</call>" + END, "\n</think>\n\nNo." + END,
    ]
    assert spans("REASONING", [*messages, ASKED, ANSWERED]) == [
        "<call=weather> city=Rome days=2</call>" + END, "No." + END, "\n</think>\n\nNo." + END,
    ], "and lose it when another question follows"
    assert spans("REASONING", calling(CALL, content="Wait."))[0].startswith("\n</think>\n\nWait.<call=")


def test_records_that_a_reasoning_template_refuses_have_its_reason() -> None:
    with pytest.raises(BadRecord, match=r"rejects the messages .no question in the conversation"):
        spans("REASONING", [{"role": "system", "content": "Hi"}, ANSWERED])
    with pytest.raises(BadRecord, match=r"rejects the messages .no such role: developer"):
        spans("REASONING", [{"role": "developer", "content": "Be brief."}, ASKED, ANSWERED])


@pytest.mark.parametrize("name", ["CHATML", "CALLS"])
def test_a_record_without_a_question(name: str) -> None:
    assert spans(name, [{"role": "system", "content": "Say no."}, ANSWERED]) == ["No." + END]
    assert spans(name, [ANSWERED, ASKED, ANSWERED]) == ["No." + END, "No." + END]


def test_messages_that_the_template_leaves_out_are_named() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, ASKED, ANSWERED]
    assert spans("CHATML", messages) == ["No." + END]
    with pytest.raises(BadRecord, match=r"message 1 \(developer\) is not printed by the chat template; give it"):
        spans("CALLS", messages)


def test_several_templates() -> None:
    tokenizer = small.small_tokenizer({"default": small.CHATML, "tool_use": small.CALLS})
    encoder = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    texts = []
    for tools in (None, [{"type": "function", "function": {"name": "weather"}}]):
        ids, ((start, end),) = encoder.encode([ASKED, ANSWERED], tools)
        texts.append((tokenizer.decode(ids).startswith("[{"), tokenizer.decode(ids[start:end])))
    assert texts == [(False, "No." + END), (True, "No." + END)]
    tokenizer.chat_template = {"rag": small.CHATML, "tool_use": small.CALLS}
    with pytest.raises(BadRecord, match="chat templates rag, tool_use and none of them is the default"):
        encoder.encode([ASKED, ANSWERED])


# --- tool calls


@pytest.mark.parametrize("name", ["REASONING", "CALLS", "JOINING", "BARE"])
@pytest.mark.parametrize("empty", [{}, {"content": None}, {"content": ""}], ids=["missing", "null", "empty"])
def test_a_call_is_trained_whatever_form_the_record_has(name: str, empty: dict[str, Any]) -> None:
    """Arguments as an object, as JSON text, twice as JSON text; the call or the message as JSON text; no content."""
    text = json.dumps(CALL["function"]["arguments"])  # type: ignore[index]
    forms = [
        CALL, with_arguments(text), with_arguments(json.dumps(text)), json.dumps(CALL),
        {**CALL, "function": json.dumps(CALL["function"])},
    ]
    found = [spans(name, calling(form, **empty)) for form in forms]
    found += [spans(name, [json.dumps(message) for message in calling(CALL, **empty)])]
    assert all(one == found[0] for one in found)
    call, answer = found[0]
    assert answer.endswith("No." + END) and call.endswith("</call>" + END)
    assert "weather" in call and "Rome" in call and "'" not in call and "None" not in call


def test_calls_without_arguments_and_of_the_older_form() -> None:
    assert "</call>" in spans("REASONING", calling(with_arguments("")))[0]
    assert "</call>" in spans("REASONING", calling(with_arguments(None)))[0]
    old = [ASKED, {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"a": 1}'}},
           {"role": "function", "name": "weather", "content": "dry"}, ANSWERED]
    assert "weather> a=1</call>" in spans("REASONING", old)[0]


def test_null_in_arguments_is_kept_where_somebody_wrote_it() -> None:
    assert '"city": null' in spans("CALLS", calling(with_arguments({"city": None})))[0]


def test_large_integers_and_dates_stay_what_they_are() -> None:
    call = spans("CALLS", calling(with_arguments({"n": 2**63, "m": 2**70, "day": "2024-01-01"})))[0]
    assert f'"n": {2**63}, "m": {2**70}, "day": "2024-01-01"' in call


def test_a_call_that_the_template_does_not_print_is_an_error() -> None:
    for fields in ({}, {"content": "I ask."}):
        with pytest.raises(BadRecord, match=r"message 2 \(assistant\) calls the tool weather, which the chat template"):
            spans("CHATML", calling(CALL, **fields))
    tokenizer = small.small_tokenizer(small.MARKED)
    with pytest.raises(BadRecord, match="calls the tool weather"):
        ChatEncoder(tokenizer, [tokenizer.eos_token_id]).encode(messages_of(calling(CALL, content="Wait.")))


def test_markers_that_leave_a_turn_out_are_an_error() -> None:
    """An empty block for a turn, and blocks for content and calls apart of which one is missing."""
    encoder = ChatEncoder(small.small_tokenizer(small.MARKED_CONTENT), [])
    with pytest.raises(BadRecord, match=r"message 2 \(assistant\) (calls the tool|has no text but its end)"):
        encoder.encode(messages_of(calling(CALL)))
    end = "{% endgeneration %}"
    apart = small.MARKED_CONTENT.replace(end, end + "{% generation %}!" + end)
    with pytest.raises(BadRecord, match=r"message 2 \(assistant\) calls the tool weather"):
        ChatEncoder(small.small_tokenizer(apart), []).encode(messages_of(calling(CALL, content="Wait.")))


def test_a_left_out_message_whose_words_stand_elsewhere() -> None:
    messages = [{"role": "developer", "content": "Rain?"}, ASKED, ANSWERED]
    with pytest.raises(BadRecord, match=r"message 1 \(developer\) is not printed"):
        spans("CALLS", messages)
    assert spans("CHATML", messages) == ["No." + END]


@pytest.mark.parametrize("arguments", ["{not JSON", "[1]", 3])
def test_arguments_that_are_no_object_are_a_reason(arguments: Any) -> None:
    with pytest.raises(BadRecord, match="the chat template rejects the messages"):
        spans("REASONING", calling(with_arguments(arguments)))
    assert "weather" in spans("CALLS", calling(with_arguments(arguments)))[0], "a template that prints anything does so"


@pytest.mark.parametrize("call", [{"function": {"arguments": {}}}, {}, 3, "weather", {"function": 3}])
def test_calls_without_a_name(call: Any) -> None:
    with pytest.raises(BadRecord, match=r"message 2 \(assistant\): tool call 1 is not an object with the name"):
        messages_of(calling(call))


def test_tools_as_objects_and_as_json_text() -> None:
    tool: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    as_text = {"type": "function", "function": {"name": "weather", "parameters": '{"type": "object"}'}}
    for form in ([tool], json.dumps([tool]), [json.dumps(tool)], json.dumps(tool), tool, [as_text]):
        assert tools_of(form) == [tool]
    assert tools_of(None) is tools_of("") is tools_of("[]") is tools_of([]) is None
    wrong: list[Any] = ["a tool", 3, [3], [{}], ['{"a": 1}']]
    for bad in wrong:
        with pytest.raises(BadRecord, match="tool"):
            tools_of(bad)


def test_tools_that_the_template_does_not_print_are_counted() -> None:
    encoder = ChatEncoder(TOKENIZERS["CHATML"], [TOKENIZERS["CHATML"].eos_token_id])
    encoder.encode([ASKED, ANSWERED], [{"name": "weather"}])
    assert dict(encoder.notes) == {"conversations with tools that the chat template does not print": 1}


def test_reasoning_that_the_template_does_not_print_is_counted() -> None:
    said = {**ANSWERED, "reasoning": "I look."}
    twice = [said, ASKED, said]
    for name, messages, count in [("CHATML", [said], 1), ("REASONING", twice, 1), ("REASONING", [said], 0)]:
        encoder = ChatEncoder(TOKENIZERS[name], [TOKENIZERS[name].eos_token_id])
        encoder.encode(messages_of([ASKED, *messages]))
        words = "turns without their reasoning, which the chat template does not print there"
        assert dict(encoder.notes) == ({words: count} if count else {}), name


def test_turns_that_are_not_trained() -> None:
    messages = [ASKED, {**ANSWERED, "weight": 0}, ASKED, ANSWERED]
    assert spans("CHATML", messages) == ["No." + END]
    assert spans("CHATML", [ASKED, ANSWERED, ASKED, ANSWERED], first=3) == ["No." + END]
    tokenizer = small.small_tokenizer(small.MARKED)
    ids, ((start, _),) = ChatEncoder(tokenizer, []).encode(messages_of(messages))
    assert tokenizer.decode(ids[:start]).count("No.") == 1, "the last turn, also where the template has markers"
    with pytest.raises(BadRecord, match=r"message 2 \(assistant\) has the weight 2"):
        spans("CHATML", [ASKED, {**ANSWERED, "weight": 2}])


@pytest.mark.parametrize("content", ["", " ", "\n"])
def test_a_turn_that_is_nothing_but_its_end_is_an_error(content: str) -> None:
    for name in ("CHATML", "CALLS"):
        with pytest.raises(BadRecord, match=r"message 2 \(assistant\) has no text but its end"):
            spans(name, [ASKED, {"role": "assistant", "content": content}, ASKED, ANSWERED])
