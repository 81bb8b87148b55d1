"""Prompt files: a prompt per line, or JSONL with `prompt` or `messages`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import why_no_file

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read_prompts(path: Path, option: str = "--prompts") -> Iterator[tuple[int, Any]]:
    """(line number, prompt) one by one: text, or a list of messages without a closing one of the assistant's.

    The file is read as it is asked for, a line at a time. Raises `DataError` naming file and line, also for a file
    without prompts.
    """
    found = False
    if reason := why_no_file(path):
        raise DataError(f"{option} {path} {reason}; write its contents to a file")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = _decoded(line, f"{option} {path}, line {number}")
                if text.strip():
                    found = True
                    where = f"{option} {path}, line {number}"
                    yield number, _parse(text, where) if path.suffix in JSONL_SUFFIXES else text
    except OSError as error:
        raise DataError(f"{option} {path}: cannot be read ({error.strerror})") from None
    if not found:
        raise DataError(f"{option} {path}: no prompts; write one per line")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error}); convert it") from None


def _parse(line: str, where: str) -> Any:
    """The prompt of a JSONL record: text, or messages up to the turn that the model writes."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return record["prompt"]
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
        rest = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if rest:
            return rest
    raise DataError(f'{where}: no "prompt" text and no "messages" list; give one of them')
