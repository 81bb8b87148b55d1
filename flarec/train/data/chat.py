"""Chat records: token ids and the spans of the assistant's turns.

A template with `{% generation %}` markers says itself which characters the assistant writes. For any other template the
spans are found in the rendered text, and only from facts that are checked: a turn starts where the rendering of the
messages before it, generation prompt included, ends; it ends with its end-of-turn token. Where a template renders a
turn differently once later turns exist (reasoning is dropped from earlier turns, for example), the turn is located by
rendering the conversation with a marker in its place: what is supervised is always what the whole rendering holds.

docs/chat.md has a table of what is supervised for which kind of template.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from typing import Any

from ...base.messages import BadRecord, Message, tool_name
from ...base.rendering import render, rendered, template_of
from .characters import Spans, token_spans
from .markers import has_markers, marked_spans

MARKER = "\ue0f1\ue0f2\ue0f1"  # private-use characters: no template or text has a reason to contain them
USUAL = ("system", "user", "tool")  # roles that templates know: one whose text is in the rendering is taken as printed
Turns = list[tuple[int | None, tuple[int, int]]]
"""(place of the message, if it is known, characters [start, end) of its text and end token)."""


@dataclass(frozen=True)
class Dialogue:
    """A chat record. first: number of messages that are a prompt, whose turns are not trained; options: variables of
    the template."""

    messages: Sequence[Message]
    tools: Any = None
    first: int = 0
    options: Mapping[str, Any] | None = None

    def assistant(self) -> list[int]:
        """Places of the assistant's messages."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]

    def trained(self) -> list[int]:
        """Places of those to train: not those of the prompt, and none of weight 0."""
        return [place for place in self.assistant() if place >= self.first and self.messages[place].get("weight", 1)]


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    `end_ids` are the tokens that end a turn: what a template writes after them (a newline) is nothing to learn. Where a
    turn has none of them, the special token that closes it is its end.

    notes  what should be known of the conversations so far, and of how many
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.notes: Counter[str] = Counter()
        texts = {int(i): str(tokenizer.convert_ids_to_tokens(int(i))) for i in {*end_ids, *tokenizer.all_special_ids}}
        self._ends = frozenset(texts[int(i)] for i in end_ids)
        one = "|".join(re.escape(text) for text in sorted(texts.values(), key=len, reverse=True)) or "(?!)"
        self._special, self._tail = re.compile(one), re.compile(rf"(?:\s|{one})*\Z")

    def encode(self, messages: Sequence[Message], tools: Any = None) -> tuple[list[int], Spans]:
        """Token ids and the token spans [start, end) of the assistant's turns. Raises `BadRecord`."""
        return self.encode_conversation(Dialogue(messages, tools))

    def encode_conversation(self, chat: Dialogue) -> tuple[list[int], Spans]:
        """As `encode`, for the turns that the conversation trains."""
        template = template_of(self.tokenizer, chat.tools)
        messages, text = rendered(self.tokenizer, chat.messages, chat.tools, options=chat.options)
        chat = replace(chat, messages=messages)
        self._check_printed(chat, text)
        turns = self._marked(chat, text, template) if has_markers(template) else self._found(chat, text)
        for place, (start, end) in turns:
            self._check_turn(chat.messages[place] if place is not None else {}, place, text[start:end])
        spans = [span for _, span in turns]
        if any(before[1] > after[0] for before, after in pairwise(spans)):
            raise BadRecord("the chat template renders assistant turns out of order")
        return token_spans(self.tokenizer, text, spans)

    def _check_turn(self, message: Message, place: int | None, text: str) -> None:
        """Raises `BadRecord` for a turn of which the template prints nothing but its end."""
        if place is not None:
            self._check_calls(message, place, text)
        if message.get("reasoning_content", "").strip() not in text:
            self.notes["turns without their reasoning, which the chat template does not print there"] += 1
        if not text[: self._ending(text)[0]].strip():
            who = "an assistant message" if place is None else f"message {place + 1} (assistant)"
            raise BadRecord(f"{who} has no text but its end; leave the message out")

    def _check_calls(self, message: Message, place: int, text: str) -> None:
        """Raises `BadRecord` for a tool call that is not in the text that is trained."""
        for name in (str(tool_name(call)) for call in message.get("tool_calls", ())):
            if name not in text:
                raise BadRecord(
                    f"message {place + 1} (assistant) calls the tool {name}, which the chat template does not print; "
                    "give a tokenizer whose template prints tool calls, or the call as content"
                )

    def _check_printed(self, chat: Dialogue, text: str) -> None:
        """Raises `BadRecord` for a message of others that the template leaves out; notes tools that it leaves out."""
        if chat.tools and not all(str(tool_name(tool)) in text for tool in chat.tools):
            self.notes["conversations with tools that the chat template does not print"] += 1
        behind = 0
        for place, message in enumerate(chat.messages):
            content = message.get("content", "").strip()
            if message["role"] == "assistant" or not content:
                continue
            found = text.find(content, behind)
            if found >= 0 and message["role"] in USUAL:
                behind = found + len(content)
                continue
            try:
                printed = MARKER in self._render(chat, self._instead(chat, place, {**message, "content": MARKER}))
            except BadRecord:  # a template that looks into the message: it is not ignored
                printed = True
            if not printed:
                raise BadRecord(
                    f"message {place + 1} ({message['role']}) is not printed by the chat template; give it another "
                    "role (system, user) or leave it out"
                )

    def _marked(self, chat: Dialogue, text: str, template: str) -> Turns:
        spans = marked_spans(template, text, lambda marked: self._render(chat, chat.messages, template=marked))
        assistant, trained = chat.assistant(), chat.trained()
        if not any(start < end for start, end in spans) and trained:
            raise BadRecord("the chat template's generation markers enclose no assistant token")
        if len(spans) == len(assistant):
            turns = zip(assistant, spans, strict=True)
            return [(place, span) for place, span in turns if place in trained]
        if trained != assistant:
            raise BadRecord(
                f"the chat template's generation markers enclose {len(spans)} pieces of {len(assistant)} assistant "
                "messages, of which not all are trained; give the trained ones a record of their own"
            )
        pieces: Turns = [(None, span) for span in spans if span[0] < span[1]]
        for place in trained:  # which piece is whose is not known
            self._check_calls(chat.messages[place], place, "".join(text[start:end] for _, (start, end) in pieces))
        return pieces

    def _found(self, chat: Dialogue, text: str) -> Turns:
        return [(place, self._turn(chat, text, place)) for place in chat.trained()]

    def _turn(self, chat: Dialogue, text: str, place: int) -> tuple[int, int]:
        """Characters of an assistant turn in the rendered conversation."""
        before, after = self._part(chat, place, prompt=True), self._part(chat, place + 1)
        start = len(before) if before and text.startswith(before) else None
        end = len(after) if after and text.startswith(after) else None
        if start is None or end is None:
            shared = self._part(chat, place)
            opening = before[len(shared) :] if before.startswith(shared) else ""
            if found := next(self._located(chat, text, place, opening), None):
                start, end = found[0] if start is None else start, found[1] if end is None else end
        if start is None or end is None or start > end:
            raise BadRecord(
                f"assistant message {place + 1} cannot be located: the chat template renders it differently in the "
                "whole conversation; add {% generation %} markers to the template or give prompt and response"
            )
        return start, start + self._ending(text[start:end])[1]

    def _ending(self, turn: str) -> tuple[int, int]:
        """Where a turn's text ends, and where the token that ends it does; what the template writes behind it is out.

        Of several tokens at the end it is the first of the `end_ids`, else the last.
        """
        match = self._tail.search(turn)
        assert match is not None
        closing = list(self._special.finditer(turn, match.start()))
        chosen = next((token for token in closing if token[0] in self._ends), closing[-1] if closing else None)
        return chosen.span() if chosen else (len(turn), len(turn))

    def _located(self, chat: Dialogue, text: str, place: int, opening: str) -> Iterator[tuple[int, int]]:
        """Characters of a turn, from the rendering with a marker as its content. opening: the generation prompt."""
        message, before = chat.messages[place], chat.messages[place - 1] if place else {}
        previous = before.get("content", "").strip()
        plain = {"role": message["role"], "content": MARKER}
        for form in (plain, {**message, "content": MARKER}):
            try:
                parts = self._render(chat, self._instead(chat, place, form)).split(MARKER)
            except BadRecord:
                continue
            start = _start(parts[0], text, opening, previous)
            if len(parts) == 2 and start is not None and text.endswith(parts[1]):
                content_end = len(text) - len(parts[1])
                if start <= content_end:
                    yield start, content_end + self._end_behind(chat, place, form, parts[1])

    def _end_behind(self, chat: Dialogue, place: int, form: Message, rest: str) -> int:
        """Characters behind a turn's content that belong to it, of the rest of the rendering."""
        try:
            alone = self._render(chat, [*chat.messages[:place], form]).partition(MARKER)[2]
        except BadRecord:
            alone = ""
        if alone and rest.startswith(alone):
            return len(alone)
        match = re.match(r"\s*", rest)
        assert match is not None
        token = self._special.match(rest, match.end())
        return token.end() if token and token[0] in self._ends else 0

    def _part(self, chat: Dialogue, count: int, prompt: bool = False) -> str:
        """The rendering of the first messages; empty if the template refuses part of a conversation, as some do."""
        try:
            return self._render(chat, chat.messages[:count], prompt=prompt)
        except BadRecord:
            return ""

    def _render(
        self, chat: Dialogue, messages: Sequence[Message], *, prompt: bool = False, template: str | None = None
    ) -> str:
        return render(self.tokenizer, messages, chat.tools, prompt=prompt, template=template, options=chat.options)

    @staticmethod
    def _instead(chat: Dialogue, place: int, message: Message) -> list[Message]:
        return [*chat.messages[:place], message, *chat.messages[place + 1 :]]


def _start(header: str, text: str, opening: str, previous: str) -> int | None:
    """Where a turn starts whose content alone would stand behind `header`; None if that is not certain.

    Behind the lines that `opening`, the generation prompt, and the text have in common, which may be fewer than all
    (an empty block of reasoning where the turn has one of its own), but the first one is. Without a generation
    prompt, behind what header and text have in common, if the header goes on with nothing but white space. previous:
    what the message before says.
    """
    lines = opening.splitlines(keepends=True)
    at = header.rfind(lines[0]) if opening.strip() else -1
    if at >= 0 and text.startswith(header[: at + len(lines[0])]) and not (previous and previous in header[at:]):
        shared = takewhile(lambda size: text.startswith(opening[:size], at), accumulate(map(len, lines)))
        return at + max(shared)
    common = next((at for at, (one, other) in enumerate(zip(header, text, strict=False)) if one != other), len(header))
    return None if header[common:].strip() else common
