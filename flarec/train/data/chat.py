"""Chat records: token ids and the spans of the assistant's turns.

A template with `{% generation %}` markers says itself which tokens the assistant writes. For any other template the
spans are found in the rendered text, and only from facts that are checked: a turn starts where the rendering of the
messages before it, generation prompt included, ends; it ends with its end-of-turn token. Where a template renders a
turn differently once later turns exist (reasoning is dropped from earlier turns, for example), the turn's content is
located by rendering the conversation with a marker in its place.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError

from .files import BadRecord

MARKER = "\ue0f1flarec\ue0f1"  # private-use characters: no template or text has a reason to contain them
Spans = list[tuple[int, int]]


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    `end_ids` are the tokens that end a turn: what a template writes after them (a newline) is nothing to learn.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.has_markers = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None

    def encode(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> tuple[list[int], Spans]:
        """Token ids and the token spans [start, end) of the assistant's turns. Raises `BadRecord`."""
        try:
            return self._encode_marked(messages, tools) if self.has_markers else self._encode_plain(messages, tools)
        except TemplateError as error:
            raise BadRecord(f"the chat template rejects the messages ({error})") from None

    def _encode_marked(self, messages: Sequence[dict[str, Any]], tools: Any) -> tuple[list[int], Spans]:
        out = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
        if not any(mask) and any(message["role"] == "assistant" for message in messages):
            raise BadRecord("the chat template's generation markers enclose no assistant token")
        edges = [i for i in range(len(mask) + 1) if (mask[i] if i < len(mask) else 0) != (mask[i - 1] if i else 0)]
        return ids, list(zip(edges[::2], edges[1::2], strict=True))

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(text, str)
        return text

    def _encode_plain(self, messages: Sequence[dict[str, Any]], tools: Any) -> tuple[list[int], Spans]:
        text = self._render(messages, tools)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
        spans: Spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._turn(text, messages, turn, tools)
            inside = [i for i, at in enumerate(starts) if start <= at < end]
            ends = [i for i in inside if ids[i] in self.end_ids]
            if inside:
                spans.append((inside[0], (ends or inside)[-1] + 1))
        if any(before[1] > after[0] for before, after in pairwise(spans)):
            raise BadRecord("the chat template renders assistant turns out of order")
        return ids, spans

    def _turn(self, text: str, messages: Sequence[dict[str, Any]], turn: int, tools: Any) -> tuple[int, int]:
        """Character span of an assistant turn in the rendered conversation."""
        try:
            before, after = self._render(messages[:turn], tools, True), self._render(messages[: turn + 1], tools)
        except (TemplateError, IndexError):  # some templates refuse to render parts of a conversation
            before, after = "", ""
        start = len(before) if before and text.startswith(before) else None
        end = len(after) if after and text.startswith(after) else None
        if start is None or end is None:
            content = self._content(text, messages, turn, tools)
            if content is not None:
                start = content[0] if start is None else start
                end = self._turn_end(text, content[1]) if end is None else end
        if start is None or end is None or start > end:
            raise BadRecord(
                f"assistant message {turn + 1} cannot be located: the chat template renders it differently in the "
                "whole conversation; add {% generation %} markers to the template or give prompt and response"
            )
        return start, end

    def _content(
        self, text: str, messages: Sequence[dict[str, Any]], turn: int, tools: Any
    ) -> tuple[int, int] | None:
        """Character span of a message's content, from the rendering with a marker in its place."""
        marked = [{**m, "content": MARKER} if i == turn else m for i, m in enumerate(messages)]
        parts = self._render(marked, tools).split(MARKER)
        if len(parts) != 2 or not text.startswith(parts[0]) or not text.endswith(parts[1]):
            return None
        start, end = len(parts[0]), len(text) - len(parts[1])
        return (start, end) if start <= end else None

    def _turn_end(self, text: str, content_end: int) -> int | None:
        """End of the end-of-turn token that follows the content, or None."""
        tail = text[content_end:]
        tokens = [self.tokenizer.convert_ids_to_tokens(i) for i in sorted(self.end_ids)]
        for token in tokens:
            match = re.match(rf"\s*{re.escape(token)}", tail)
            if match:
                return content_end + match.end()
        return None
