"""Answers as the model wrote them: their very ids are trained where the record still says what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flarec.decode.tokenizing import decode_tokens, encode_prompt
from flarec.errors import DataError
from flarec.train.data import generated
from flarec.train.data.generated import KEY, GeneratedIds
from flarec.train.data.sources import RecordEncoder, TokenSource, load_sources, parse_source
from tests.train.small_tokenizer import CHATML, MARKED_CONTENT, REASONING, small_tokenizer

TOKENIZER = small_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
EARLIER = [
    {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"},
    {"role": "user", "content": "again"},
]


def letters(text: str) -> list[int]:
    """Ids of a text, a token per byte: other ones than the tokenizer's merges give."""
    found = [TOKENIZER(letter, add_special_tokens=False)["input_ids"] for letter in text]
    assert all(len(ids) == 1 for ids in found)
    return [ids[0] for ids in found]


def record(
    answer: str, ids: list[int], messages: list[Any] | None = None, tokenizer: Any = TOKENIZER
) -> dict[str, Any]:
    prompt: Any = "Hello " if messages is None else messages
    plain = {"prompt": prompt, "response": answer} if messages is None else {
        "messages": [*messages, {"role": "assistant", "content": answer}]
    }
    return {**plain, KEY: GeneratedIds(tokenizer).field(encode_prompt(tokenizer, prompt), ids)}


def encoded(found: dict[str, Any], tokenizer: Any = TOKENIZER) -> tuple[list[int], list[tuple[int, int]], list[str]]:
    encode = RecordEncoder(tokenizer, [END], Path("a.jsonl"))
    ids, spans = encode(found)
    return ids, spans, sorted(encode.notes)


@pytest.mark.parametrize("messages", [None, EARLIER[:1], EARLIER], ids=["pair", "chat", "turns before"])
def test_the_very_ids_are_trained(messages: list[Any] | None) -> None:
    written = letters("world")
    found = record("world", [*written, END], messages)
    ids, spans, notes = encoded(found)
    asked: Any = found.get("prompt", messages)
    prompt = encode_prompt(TOKENIZER, asked)
    start, stop = spans[-1]
    assert notes == [generated.USED]
    assert ids[:start] == prompt and ids[start:stop] == [*written, END]
    text, text_spans, none = encoded({key: value for key, value in found.items() if key != KEY})
    assert none == [] and text != ids and TOKENIZER.decode(text) == TOKENIZER.decode(ids)
    assert spans[:-1] == text_spans[:-1] and ids[stop:] == text[text_spans[-1][1] :]


@pytest.mark.parametrize("messages", [None, EARLIER], ids=["pair", "chat"])
def test_ids_that_the_text_has_too_change_nothing(messages: list[Any] | None) -> None:
    plain = {key: value for key, value in record("world", [END], messages).items() if key != KEY}
    text, spans, _ = encoded(plain)
    same = record("world", text[slice(*spans[-1])], messages)
    assert encoded(same)[:2] == (text, spans)


@pytest.mark.parametrize("messages", [None, EARLIER], ids=["pair", "chat"])
def test_an_answer_before_a_stop_text_gets_an_end(messages: list[Any] | None) -> None:
    ids, spans, _ = encoded(record("world", letters("world"), messages))
    assert ids[slice(*spans[-1])] == [*letters("world"), END]


def test_a_turn_that_the_template_ends_with_nothing() -> None:
    """Markers around the content alone: the model's own end is trained, and none is made of its last letter."""
    tokenizer = small_tokenizer(MARKED_CONTENT)
    ids, spans, _ = encoded(record("world", letters("world"), EARLIER[:1], tokenizer), tokenizer)
    assert ids[slice(*spans[-1])] == letters("world")
    ids, spans, _ = encoded(record("world", [*letters("world"), END], EARLIER[:1], tokenizer), tokenizer)
    assert ids[slice(*spans[-1])] == [*letters("world"), END]


def test_reasoning_is_trained_as_it_was_written() -> None:
    """The template splits reasoning and answer, and prints them with white space of its own; decoding saw neither."""
    tokenizer = small_tokenizer(REASONING)
    written = letters("so it is</think>world")
    found = record(decode_tokens(tokenizer, written), [*written, END], EARLIER[:1], tokenizer)
    ids, spans, notes = encoded(found, tokenizer)
    prompt = encode_prompt(tokenizer, EARLIER[:1])
    assert notes == [generated.USED]
    assert (ids[: spans[-1][0]], ids[slice(*spans[-1])]) == (prompt, [*written, END])


CHANGED: dict[str, tuple[Any, str]] = {
    "text": (lambda found: {**found, "messages": [*EARLIER, {"role": "assistant", "content": "World"}]},
             generated.OTHER_TEXT),
    "prompt": (lambda found: {**found, "messages": [EARLIER[0], *found["messages"][-1:]]}, generated.OTHER_PROMPT),
    "tokenizer": (lambda found: {**found, KEY: {**found[KEY], "tokenizer": "0"}}, generated.OTHER_TOKENIZER),
    "an end within": (lambda found: {**found, KEY: {**found[KEY], "ids": [*letters("wo"), END, *letters("rld"), END]}},
                      generated.OTHER_TEXT),
    "not trained": (lambda found: {**found, "messages": [*EARLIER, {**found["messages"][-1], "weight": 0}]},
                    generated.NO_ANSWER),
    "a question last": (lambda found: {**found, "messages": EARLIER}, generated.NO_ANSWER),
    "a text": (lambda found: {"text": "world", KEY: {**found[KEY], "tokenizer": "0"}}, generated.NO_ANSWER),
    **{
        f"id {bad}": (lambda found, bad=bad: {**found, KEY: {**found[KEY], "ids": [*letters("world"), bad, END]}},
                      generated.NO_TOKEN)
        for bad in (len(TOKENIZER), 2**31, 2**40)  # behind the last; too large for a stored token, for the decoder
    },
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_was_changed_is_read_as_text_and_counted(name: str) -> None:
    change, note = CHANGED[name]
    found = change(record("world", [*letters("world"), END], EARLIER))
    ids, spans, notes = encoded(found)
    assert notes == [note]
    assert (ids, spans) == encoded({key: value for key, value in found.items() if key != KEY})[:2]


def test_another_tokenizer_or_template_is_noticed() -> None:
    found = record("world", [*letters("world"), END], EARLIER)
    template = small_tokenizer(CHATML.replace("assistant\n", "model\n"))
    assert encoded(found, template)[2] == [generated.OTHER_PROMPT]
    more = small_tokenizer()
    assert more.add_tokens(["<new>"]) == 1
    assert encoded(found, more)[2] == [generated.OTHER_TOKENIZER]


@pytest.mark.parametrize("value", [[1], {"ids": []}, {"tokenizer": "a", "prompt": "b", "ids": [-1]},
                                   {"tokenizer": "a", "prompt": "b", "ids": [True]}, {"prompt": "b", "ids": [1]}])
def test_anything_else_under_that_name_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError, match='"flarec_ids" is not what flarec answers writes'):
        load(tmp_path, {"prompt": "a", "response": "b", KEY: value})


def load(folder: Path, *records: Any, length: int = 200) -> TokenSource:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in records))
    return load_sources([parse_source(str(path))], TOKENIZER, max_length=length, end_ids=[END])[0]


def test_a_source_counts_and_cuts_them(tmp_path: Path) -> None:
    answer = "world " * 8
    found = record(answer, [*letters(answer), END])
    foreign = {**found, KEY: {**found[KEY], "tokenizer": ""}}
    source = load(tmp_path, found, {"prompt": "Hello ", "response": "world"}, foreign)
    assert "1 answers trained as the token ids that the model wrote" in str(source.stats)
    assert "1 answers read as text (their token ids are of another tokenizer)" in str(source.stats)
    document = source.document(0)
    (start, stop), = document.responses
    assert document.ids[start:stop].tolist() == [*letters(answer), END] and not source.stats.endless
    cut = load(tmp_path, found, length=20)
    assert cut.document(0).ids.tolist() == document.ids[:20].tolist() and cut.stats.truncated == 1
