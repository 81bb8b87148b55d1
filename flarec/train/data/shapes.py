"""Shapes of records: what a record trains, decided for each one by its keys.

messages; conversations (ShareGPT); prompt with response or completion, texts or lists of messages; instruction, input
and output (also context and response); text. Keys that are null are absent. Of a record with keys of several shapes the
first of this list counts; two names for one thing must hold the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...base.messages import (
    CONVERSATIONS,
    BadRecord,
    Message,
    check_plain,
    from_json,
    messages_of,
    not_text,
    one_of,
    tools_of,
)
from ...base.rendering import check_options
from .chat import Dialogue

ANSWERS = ("response", "completion")
MISSING = (
    "has none of the keys messages, conversations, prompt with response or completion, instruction with output, or text"
)


@dataclass(frozen=True)
class Pair:
    """A prompt and the response to it, as texts."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Text:
    """A text of which everything is trained."""

    text: str


Shape = Dialogue | Pair | Text


def shape_of(record: Mapping[str, Any]) -> tuple[str, Shape]:
    """(name of the shape, what the record trains). Raises `BadRecord`."""
    given = {key: value for key, value in record.items() if value is not None}
    if found := _shape_by(given, record) or _shape_by(record, record):  # the second says which key is null
        return found
    if record.get("chosen") is not None:
        raise BadRecord("is a pair of a chosen and a rejected answer; give the chosen one as completion of its prompt")
    if "prompt" in record:
        raise BadRecord("has a prompt without response or completion")
    keys = ", ".join(sorted(str(key) for key in record)[:8])
    raise BadRecord(f"{MISSING} (it has {keys or 'no key'})")


def _shape_by(keys: Collection[str], record: Mapping[str, Any]) -> tuple[str, Shape] | None:
    """The shape that these keys of a record decide."""
    for key in CONVERSATIONS:
        if record.get(key) is not None:
            return key, _conversation(record, messages_of(record[key], key))
    if "prompt" in keys and (there := [key for key in ANSWERS if key in keys]):
        key = one_of(record, ANSWERS) or there[0]
        return f"prompt/{key}", _prompt_and(record, key)
    if record.get("instruction") is not None:
        return "instruction/output", _instruction(record)
    return ("text", Text(_string(record, "text"))) if "text" in keys else None


def _conversation(record: Mapping[str, Any], messages: list[Message], first: int = 0) -> Dialogue:
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":  # as ShareGPT's files have it
        messages, first = [{"role": "system", "content": system}, *messages], first + 1 if first else 0
    check_plain("the record", [messages[0]["role"], record.get("chat_template_kwargs")])
    return Dialogue(
        messages, tools_of(record.get("tools")), first, check_options(from_json(record.get("chat_template_kwargs")))
    )


def _prompt_and(record: Mapping[str, Any], key: str) -> Shape:
    """Two texts, or messages of which those of the response alone are trained."""
    if record.get("label") is False:  # as data of KTO have it
        raise BadRecord(f"has the label false: its {key} is one that is not to be learned; leave the record out")
    prompt, response = record["prompt"], record[key]
    if not isinstance(prompt, list) and not isinstance(response, list):
        return Pair(_string(record, "prompt", empty=True), _string(record, key))
    before = messages_of(prompt, "prompt") if isinstance(prompt, list) else [_said("user", _string(record, "prompt"))]
    after = messages_of(response, key) if isinstance(response, list) else [_said("assistant", _string(record, key))]
    return _conversation(record, [*before, *after], len(before))


def _instruction(record: Mapping[str, Any]) -> Dialogue:
    """Alpaca's keys, and those of databricks-dolly: the user's message is the instruction and the input below it."""
    output, given = one_of(record, ("output", "response")) or "output", one_of(record, ("input", "context"))
    parts = [_string(record, "instruction"), *([_string(record, given)] if given and record[given] else [])]
    messages: list[Message] = []
    for pair in record.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRecord("history is not a list of pairs of texts")
        messages += [_said("user", pair[0]), _said("assistant", pair[1])]
    messages += [_said("user", "\n\n".join(parts)), _said("assistant", _string(record, output))]
    return _conversation(record, messages)


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _string(record: Mapping[str, Any], key: str, empty: bool = False) -> str:
    value = record.get(key)
    if value is None:
        raise BadRecord(f"{key} is missing, not text")
    if not isinstance(value, str):
        if hasattr(value, "isoformat"):
            raise BadRecord(f"{key} holds {not_text(value)}")
        raise BadRecord(f"{key} is {type(value).__name__}, not text")
    if not value and not empty:
        raise BadRecord(f"{key} is empty")
    check_plain(key, value)
    return value
