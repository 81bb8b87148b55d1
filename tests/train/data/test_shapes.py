"""Shapes of records, each decided for itself: what is trained, and what is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flarec.base.messages import BadRecord
from flarec.errors import DataError
from flarec.train.data.shapes import Text, shape_of
from flarec.train.data.sources import RecordEncoder, TokenSource, load_sources, parse_source
from tests.train.small_tokenizer import CHATML, MARKED_CONTENT, REASONING, small_tokenizer

TOKENIZER = small_tokenizer()
END = "<|im_end|>"
USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}
TURN = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"
IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}


def load(path: Path, *records: Any, **options: Any) -> TokenSource:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return load_sources([parse_source(str(path))], TOKENIZER, max_length=options.pop("max_length", 200), **options)[0]


def read(record: Any, tokenizer: Any = TOKENIZER) -> tuple[str, list[str]]:
    """(the whole text, what is trained)."""
    ids, spans = RecordEncoder(tokenizer, None, Path("a.jsonl"))(record)
    return tokenizer.decode(ids), [tokenizer.decode(ids[start:end]) for start, end in spans]


CHATS: dict[str, Any] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "messages as JSON text": {"messages": json.dumps([USER, ASSISTANT])},
    "conversations with roles": {"conversations": [USER, ASSISTANT], "id": "3"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "world"}]},
    "other names": {"conversation": [{"from": "user", "value": "Hello"}, {"from": "model", "value": "world"}]},
    "messages and a prompt": {"prompt": "other", "prompt_id": "3", "messages": [USER, ASSISTANT]},
    "null beside": {"text": None, "prompt": None, "messages": [USER, ASSISTANT]},
    "prompt and completion": {"prompt": [USER], "completion": [ASSISTANT]},
    "prompt and response": {"prompt": [USER], "response": [ASSISTANT]},
    "a list and a text": {"prompt": [USER], "completion": "world"},
    "a text and a list": {"prompt": "Hello", "completion": [ASSISTANT]},
    "Alpaca": {"instruction": "Hello", "input": "", "output": "world"},
    "dolly": {"instruction": "Hello", "context": "", "response": "world", "category": "x"},
    "capitals": {"messages": [{"role": "User", "content": "Hello"}, {"role": "Assistant", "content": "world"}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                           {"role": "assistant", "content": [{"type": "output_text", "text": "world"}]}]},
    "parts that are text": {"messages": [{"role": "user", "content": ["Hello"]}, ASSISTANT]},
}


@pytest.mark.parametrize("name", CHATS)
def test_chats(name: str) -> None:
    assert read(CHATS[name]) == (TURN, ["world" + END])


PAIRS: dict[str, Any] = {
    "response": {"prompt": "Hello ", "response": "world"},
    "completion": {"prompt": "Hello ", "completion": "world"},
    "twice the same": {"prompt": "Hello ", "response": "world", "completion": "world"},
    "null answer": {"prompt": "Hello ", "response": None, "completion": "world"},
    "empty answer": {"prompt": "Hello ", "response": "", "completion": "world"},
    "text beside": {"prompt": "Hello ", "completion": "world", "text": "other"},
    "null beside": {"messages": None, "instruction": None, "prompt": "Hello ", "completion": "world", "text": None},
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    assert read(PAIRS[name]) == ("Hello world" + END, ["world" + END])


def test_the_first_shape_counts() -> None:
    """Data sets carry the prompt, or the rendered text, beside the messages, and null in columns of others."""
    beside = {"prompt": "a", "completion": "b", "instruction": "c", "output": "d", "text": "e"}
    assert read({**beside, **CHATS["messages"]}) == read(CHATS["messages"])
    assert shape_of(beside)[0] == "prompt/completion"
    assert shape_of({**beside, "prompt": None})[0] == "instruction/output"
    assert shape_of({"prompt": None, "response": None, "text": "e"}) == ("text", Text("e"))


def test_parts_are_lines() -> None:
    """As the server joins them: what is trained is what is asked later."""
    parts = [{"type": "text", "text": "Hello"}, {"text": "you"}, "there"]
    text, _ = read({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert text.startswith("<|im_start|>user\nHello\nyou\nthere<|im_end|>")


def test_turns_of_the_prompt_are_not_trained() -> None:
    text, found = read({"prompt": [USER, ASSISTANT, USER], "completion": [{"role": "assistant", "content": "Fine"}]})
    assert text.count("world") == 1 and found == ["Fine" + END]
    _, found = read({"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]})
    assert found == ["world" + END] * 2
    _, found = read({"system": "You", "prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert found == ["world" + END]


def test_instructions() -> None:
    record = {"instruction": "Add", "input": "1 2", "output": "3", "system": "You", "history": [["Hello", "world"]]}
    text, found = read(record)
    assert text.startswith("<|im_start|>system\nYou<|im_end|>\n" + TURN + "<|im_start|>user\nAdd\n\n1 2<|im_end|>")
    assert found == ["world" + END, "3" + END]


def test_sharegpt_with_tools() -> None:
    tokenizer = small_tokenizer(REASONING)
    record = {
        "system": "You", "tools": '[{"name": "f", "parameters": {}}]',
        "conversations": [
            {"from": "human", "value": "Hello"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "world"},
        ],
    }
    text, found = read(record, tokenizer)
    assert text.startswith("<|im_start|>system\nYou<|im_end|>") and "<|im_start|>tool\n3<|im_end|>" in text
    assert found == ["\n</think>\n\n<call=f> a=1</call>" + END, "\n</think>\n\nworld" + END]


def test_variables_of_the_template() -> None:
    tokenizer = small_tokenizer(REASONING)
    record: dict[str, Any] = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"thinking": False}}
    assert read(record, tokenizer)[1] == ["world" + END]
    assert read({**record, "chat_template_kwargs": '{"thinking": false}'}, tokenizer)[1] == ["world" + END]
    for bad, reason in [({"tokenize": True}, "sets tokenize, which is no variable"), (3, "is not an object")]:
        with pytest.raises(BadRecord, match=reason):
            read({**record, "chat_template_kwargs": bad}, tokenizer)


def test_shapes_mixed_in_one_file(tmp_path: Path) -> None:
    records = [{"text": "Hello"}, CHATS["messages"], PAIRS["completion"], CHATS["Alpaca"], CHATS["messages"]]
    source = load(tmp_path / "a.jsonl", *records)
    assert source.stats.format == "1 instruction/output, 2 messages, 1 prompt/completion, 1 text"
    alone = [load(tmp_path / f"{number}.jsonl", record) for number, record in enumerate(records)]
    assert [source.document(i).ids.tolist() for i in range(5)] == [one.document(0).ids.tolist() for one in alone]


def test_counts(tmp_path: Path) -> None:
    three = {"messages": [USER, ASSISTANT] * 3}
    full = load(tmp_path / "a.jsonl", three, CHATS["messages"])
    assert (full.stats.turns, full.stats.lost_turns, full.stats.endless) == (4, 0, 0)
    assert dict(full.stats.ends) == {TOKENIZER.eos_token_id: 4}
    assert f"{full.stats.targets} targets in 4 turns" in str(full.stats) and "without" not in str(full.stats)
    second = full.document(0).responses[1]
    cut = load(tmp_path / "a.jsonl", three, CHATS["messages"], max_length=second[0] + 1)
    assert (cut.stats.turns, cut.stats.lost_turns, dict(cut.stats.ends)) == (3, 1, {TOKENIZER.eos_token_id: 2})
    assert "tokens lost, 1 turns)" in str(cut.stats)


def test_turns_without_an_end_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(CHATS["messages"]))
    specs = [parse_source(str(tmp_path / "a.jsonl"))]
    (source,) = load_sources(specs, small_tokenizer(MARKED_CONTENT), max_length=200)
    assert source.stats.endless == 1 and "1 turns end without a token that ends a text" in str(source.stats)


REFUSED: dict[str, tuple[Any, str]] = {
    "image": ({"messages": [{"role": "user", "content": [IMAGE]}, ASSISTANT]},
              r"message 1 \(user\) has a part of type 'image_url', and a text model reads text alone"),
    "thinking part": ({"messages": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}]},
                      r"message 2 \(assistant\) has a part of type 'thinking'"),
    "part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'text' without text"),
    "no parts": ({"messages": [{"role": "user", "content": []}]}, "list of parts is empty"),
    "JSON as content": ({"messages": [USER, {"role": "tool", "content": {"a": 1}}]},
                        r"message 2 \(tool\) has no text content, but a value of type dict; give JSON as text"),
    "number as content": ({"messages": [{"role": "user", "content": 3}]}, "no text content, but a value of type int"),
    "reasoning": ({"messages": [USER, {**ASSISTANT, "reasoning": ["x"]}]}, "has reasoning of type list, not text"),
    "narrator": ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1 is from 'narrator', which is no"),
    "half a pair": ({"messages": [USER, {**ASSISTANT, "reasoning_content": "\ud83d"}]}, "half a surrogate pair"),
    "history": ({"instruction": "a", "output": "b", "history": [["a"]]}, "history is not a list of pairs"),
    "text in messages": ({"messages": "hello"}, "messages is not a list with at least one message"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "two answers": ({"prompt": "a", "response": "b", "completion": "c"}, "has response and completion, .* differ"),
    "two outputs": ({"instruction": "a", "output": "b", "response": "c"}, "has output and response, .* differ"),
    "two inputs": ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "has input and context, .* diff"),
    "two reasonings": ({"messages": [USER, {**ASSISTANT, "reasoning": "x", "thinking": "y"}]},
                       r"message 2 \(assistant\) has reasoning and thinking, .* differ"),
    "two calls": ({"messages": [USER, {**ASSISTANT, "function_call": {"name": "f"}, "tool_calls": [{"name": "g"}]}]},
                  r"message 2 \(assistant\) has function_call and tool_calls"),
    "empty list": ({"prompt": [USER], "completion": []}, "completion is not a list with at least one message"),
    "nothing": ({}, r"has none of the keys .* \(it has no key\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    record, reason = REFUSED[name]
    with pytest.raises(BadRecord, match=reason):
        shape_of(record)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*--skip-bad-lines"):
        load(tmp_path / "a.jsonl", CHATS["messages"], record)
    stats = load(tmp_path / "a.jsonl", record, CHATS["messages"], skip_bad_lines=True).stats
    assert (stats.bad_lines, stats.documents) == (1, 1) and "line 1" in stats.first_bad_line


def test_chats_need_a_template(tmp_path: Path) -> None:
    for name in ("Alpaca", "ShareGPT", "prompt and completion"):
        with pytest.raises(DataError, match="no chat template; give prompt and response"):
            read(CHATS[name], small_tokenizer(None))
    assert read(PAIRS["completion"], small_tokenizer(None))[1] == ["world" + END]
    assert small_tokenizer().chat_template == CHATML


def test_ends_inside_of_a_turn_are_counted(tmp_path: Path) -> None:
    """A special token that somebody's words hold is that token to the tokenizer: a generation would stop there."""
    records = [
        {"messages": [{"role": "user", "content": f"say {END}"}, {"role": "assistant", "content": text}]}
        for text in ("fine", f"a {END} b", "fine too")
    ]
    stats = load(tmp_path / "a.jsonl", *records).stats
    assert (stats.inner_ends, stats.endless) == (1, 0)
    assert "1 turns hold a token that ends a text before their end" in str(stats)
