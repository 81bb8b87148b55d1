"""Prompt files: a prompt per line, or JSONL with `prompt` or `messages`, compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .json_records import SUFFIXES, Where, json_records, lines, plain_suffix
from .messages import CONVERSATIONS, BadRecord, messages_of, tools_of


def read_prompts(path: Path, option: str = "--prompts") -> Iterator[tuple[Where, Any]]:
    """(place, prompt) one by one: text, or a list of messages without a closing one of the assistant's.

    The file is read as it is asked for, a line at a time (a JSON array as a whole). Raises `DataError` naming file and
    line, also for a file without prompts.
    """
    found = False
    for where, prompt in _prompts(path, f"{option} "):
        found = True
        if isinstance(prompt, BadRecord):
            raise DataError(f"{where}: {prompt}")
        if prompt == "":
            raise DataError(f"{where}: the prompt is empty; give some text or remove it")
        yield where, prompt
    if not found:
        raise DataError(f"{option} {path}: no prompts; write one per line")


def _prompts(path: Path, option: str) -> Iterator[tuple[Where, Any]]:
    if plain_suffix(path) in SUFFIXES:
        for where, record in json_records(path, option):
            yield where, record if isinstance(record, BadRecord) else _prompt(record)
        return
    for number, line in lines(path, option):
        text = _decoded(line)
        if isinstance(text, BadRecord) or text.strip():
            yield Where(f"{option}{path}", "line", number), text


def _decoded(line: bytes) -> str | BadRecord:
    try:
        return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 text ({error}); convert it")


def _prompt(record: dict[str, Any]) -> Any:
    """The prompt of a record: text, or messages up to the turn that the model writes."""
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        return prompt
    try:
        key = next((key for key in (*CONVERSATIONS, "prompt") if record.get(key) is not None), None)
        if key is None:
            return BadRecord('no "prompt" text and no "messages" list; give one of them')
        if tools_of(record.get("tools")):
            return BadRecord("has tools, which a file of prompts cannot give; describe them in a system message")
        messages = messages_of(record[key], key)
    except BadRecord as error:
        return error
    rest = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return rest or BadRecord("holds nothing but a turn of the assistant's; give what it answers")
