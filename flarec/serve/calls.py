"""Calls of functions in what a model writes, as the templates of Qwen and Hermes have it.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Ulm"}}
    </tool_call>

Text that is no such call of one of the request's functions stays text, to the last character.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NoReturn

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def in_template(template: Any) -> bool:
    """Whether a tokenizer's chat template, or one of several, tells a model to write calls this way."""
    texts = template.values() if isinstance(template, dict) else (template,)
    return any(isinstance(text, str) and OPEN in text and CLOSE in text for text in texts)


@dataclass
class CallReader:
    """Takes text as it comes and gives what may be shown: pieces of text, and calls.

    names   functions that may be called
    count   calls so far
    """

    names: Collection[str]
    count: int = 0
    _held: str = field(default="", init=False)
    _behind_call: bool = field(default=False, init=False)
    _shown: bool = field(default=False, init=False)
    _gap: str = field(default="", init=False)

    def feed(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(text, calls) of what came so far and was not given yet. Held back are an open call, what may become one, and
        white space: around a call it is text only where text stands on both sides of it."""
        self._held += text
        shown = ""
        calls: list[dict[str, Any]] = []
        while True:
            if self._behind_call:
                self._skip()
            before, mark, rest = self._held.partition(OPEN)
            inside, end, behind = rest.partition(CLOSE)
            if not mark or not end:
                kept = len(before.rstrip()) if mark else _safe(before)
                shown += self._take(kept)
                return shown, calls
            call = self._call(inside)
            if call is None:  # the mark was a text's own; another one may follow it
                shown += self._take(len(before) + len(OPEN))
            else:
                shown += self._take(size := len(before.rstrip()))
                self._gap += before[size:]
                self._held, self._behind_call = behind, True
                calls.append(call)

    def _skip(self) -> None:
        rest = self._held.lstrip()
        self._gap += self._held[: len(self._held) - len(rest)]
        self._held = rest

    def _take(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        if not text:
            return ""
        gap, self._gap = self._gap if self._shown else "", ""
        self._shown, self._behind_call = True, False
        return gap + text

    def close(self) -> str:
        """What was held back at the end: it is text, but for white space behind a call."""
        if self._behind_call:
            self._skip()
        return self._take(len(self._held))

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            table = json.loads(text, parse_constant=_no_number)
            if not isinstance(table, dict) or table.keys() != {"name", "arguments"}:
                return None
            name, arguments = table["name"], table["arguments"]
            if not isinstance(name, str) or name not in self.names or not isinstance(arguments, dict):
                return None
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 is read as infinity
            written.encode()  # half of a surrogate pair is no text that can be sent
        except (ValueError, RecursionError):
            return None
        self.count += 1
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
                "function": {"name": name, "arguments": written}}


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _safe(text: str) -> int:
    """How many characters can be no part of a call: all but the beginning of a mark at the end, and white space."""
    begun = next((size for size in range(min(len(text), len(OPEN) - 1), 0, -1) if OPEN.startswith(text[-size:])), 0)
    return len(text[: len(text) - begun].rstrip())
