"""What is sent back: OpenAI's objects, whole or as chunks of a stream.

A chunk is put together from text, since a stream has one per step: only what the model wrote is encoded.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flarec.decode.request import TokenLogprob

from .calls import CallReader
from .jobs import Job, News
from .prompts import Served

Chosen = Sequence[tuple[int, TokenLogprob]]
DONE = b"data: [DONE]\n\n"


def encoded(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


def usage(jobs: Sequence[Job], tokens: int) -> dict[str, int]:
    """Prompts count once however many choices they have."""
    prompts = {id(job.prompt): len(job.prompt) for job in jobs}
    read = sum(prompts.values())
    return {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}


@dataclass
class Transcript:
    """What one job has said so far."""

    index: int
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    chosen: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    finish: str | None = None

    def take(self, news: News) -> None:
        self.text.append(news.text)
        self.tokens = max(self.tokens, news.tokens)
        self.chosen += news.chosen
        self.finish = news.finish


class Reply(Protocol):
    """How answers of one kind look.

    whole    the answer to a request without a stream
    opening  the first chunks of a stream, piece those of news about a choice
    """

    id: str

    def whole(self, choices: Sequence[Transcript], usage: dict[str, int]) -> dict[str, Any]: ...

    def opening(self, index: int) -> bytes: ...

    def piece(self, choice: Transcript, news: News) -> bytes: ...

    def total(self, usage: dict[str, int]) -> bytes: ...


class _Reply:
    """What both kinds share. with_usage: chunks have the key `usage`, null but in the last one."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, model: Served, name: str, *, with_usage: bool, logprobs: bool) -> None:
        self.model, self.name = model, name
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.logprobs = logprobs
        head = {"id": self.id, "object": self.chunk_object, "created": self.created, "model": name}
        self._head = encoded(head)[:-1] + ',"choices":['
        self._tail = ']}' if not with_usage else '],"usage":null}'

    def _chunk(self, index: int, payload: str, logprobs: Any, finish: str | None) -> bytes:
        told = encoded(logprobs) if logprobs is not None else "null"
        end = encoded(finish)
        return event(
            f'{self._head}{{"index":{index},{payload},"logprobs":{told},"finish_reason":{end}}}{self._tail}'
        )

    def total(self, usage: dict[str, int]) -> bytes:
        """The chunk with the usage, which has no choices."""
        return event(f'{self._head}],"usage":{encoded(usage)}}}')

    def _whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self.id, "object": self.whole_object, "created": self.created, "model": self.name,
            "choices": choices, "usage": usage,
        }

    def _token(self, token: int) -> str:
        text: str = self.model.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text


class ChatReply(_Reply):
    """functions: those that the model may call (`flarec.serve.calls`)."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: Served, name: str, *, with_usage: bool, logprobs: bool, functions: Collection[str] = ()
    ) -> None:
        super().__init__(model, name, with_usage=with_usage, logprobs=logprobs)
        self.functions = functions
        self._readers: dict[int, CallReader] = {}

    def whole(self, choices: Sequence[Transcript], usage: dict[str, int]) -> dict[str, Any]:
        return self._whole([
            {
                "index": choice.index, **self._message("".join(choice.text), choice.finish),
                "logprobs": self._logprobs(choice.chosen),
            }
            for choice in choices
        ], usage)

    def _message(self, text: str, finish: str | None) -> dict[str, Any]:
        reader = CallReader(self.functions)
        shown, calls = reader.feed(text) if self.functions else (text, [])
        content = shown + reader.close()
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message, "finish_reason": _finish(finish, reader)}

    def opening(self, index: int) -> bytes:
        return self._chunk(index, '"delta":{"role":"assistant","content":""}', None, None)

    def piece(self, choice: Transcript, news: News) -> bytes:
        if self.functions:
            return self._piece_with_calls(choice, news)
        delta = f'{{"content":{encoded(news.text)}}}' if news.text or news.chosen else "{}"
        told = self._logprobs(news.chosen) if news.chosen else None
        return self._chunk(choice.index, f'"delta":{delta}', told, news.finish)

    def _piece_with_calls(self, choice: Transcript, news: News) -> bytes:
        """A call is told whole, once it ends: until then nobody knows that it is one."""
        reader = self._readers.setdefault(choice.index, CallReader(self.functions))
        number = reader.count
        text, calls = reader.feed(news.text)
        if news.finish is not None:
            text += reader.close()
        delta: dict[str, Any] = {"content": text} if text or news.chosen else {}
        if calls:
            delta["tool_calls"] = [{"index": number + place, **call} for place, call in enumerate(calls)]
        if not delta and news.finish is None:
            return b""
        told = self._logprobs(news.chosen) if news.chosen else None
        return self._chunk(choice.index, f'"delta":{encoded(delta)}', told, _finish(news.finish, reader))

    def _logprobs(self, chosen: Chosen) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [
            {**self._entry(token, one.logprob), "top_logprobs": [self._entry(*pair) for pair in one.top]}
            for token, one in chosen
        ], "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


class CompletionReply(_Reply):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: Served, name: str, *, with_usage: bool, logprobs: bool) -> None:
        super().__init__(model, name, with_usage=with_usage, logprobs=logprobs)
        self._offset: dict[int, int] = {}

    def whole(self, choices: Sequence[Transcript], usage: dict[str, int]) -> dict[str, Any]:
        return self._whole([
            {
                "index": choice.index,
                "text": "".join(choice.text),
                "logprobs": self._logprobs(choice.index, choice.chosen),
                "finish_reason": choice.finish,
            }
            for choice in choices
        ], usage)

    def opening(self, index: int) -> bytes:
        return b""

    def piece(self, choice: Transcript, news: News) -> bytes:
        told = self._logprobs(choice.index, news.chosen) if news.chosen else None
        return self._chunk(choice.index, f'"text":{encoded(news.text)}', told, news.finish)

    def _logprobs(self, index: int, chosen: Chosen) -> dict[str, Any] | None:
        """text_offset counts the tokens' own texts, which are not always pieces of the whole text: a character may
        have several tokens."""
        if not self.logprobs:
            return None
        tokens, offsets = [self._token(token) for token, _ in chosen], []
        for text in tokens:
            offsets.append(self._offset.get(index, 0))
            self._offset[index] = offsets[-1] + len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one.logprob) for _, one in chosen],
            "top_logprobs": [  # of tokens with the same text the most likely one counts
                {self._token(i): _finite(x) for i, x in reversed(one.top)} for _, one in chosen
            ],
            "text_offset": offsets,
        }


def _finish(finish: str | None, reader: CallReader) -> str | None:
    """Why a chat ended: by itself, with calls or without, or by its length."""
    return "tool_calls" if finish == "stop" and reader.count else finish


def _finite(logprob: float) -> float:
    """JSON has no infinity; clients read -9999 as one, as OpenAI writes it."""
    return max(logprob, -9999.0)
