"""From data files to tokenised sources: formats, loss spans, truncation, and counts of everything left out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from .chat import ChatEncoder, Spans
from .document import Document
from .files import BadRecord, SourceSpec, parse_source, read_records

__all__ = ["DataStats", "TokenSource", "hold_out", "load_sources", "parse_source", "record_encoder"]

Encoder = Callable[[dict[str, Any]], tuple[list[int], Spans]]


@dataclass
class DataStats:
    """What became of one source. Tokens and targets are those of the kept documents, after truncation."""

    source: str
    format: str = ""
    records: int = 0
    documents: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: int = 0
    bad_lines: int = 0
    first_bad_line: str = ""

    def __str__(self) -> str:
        text = f"{self.source}: {self.documents:,} documents ({self.format}), {self.tokens:,} tokens"
        text += f", {self.targets:,} targets"
        if self.truncated:
            text += f"; {self.truncated:,} truncated ({self.truncated_tokens:,} tokens lost)"
        if self.dropped:
            text += f"; {self.dropped:,} dropped (no response token left)"
        if self.bad_lines:
            text += f"; {self.bad_lines:,} bad lines skipped (first: {self.first_bad_line})"
        return text


@dataclass(frozen=True, eq=False)
class TokenSource:
    """The documents of one source in compact arrays.

    tokens  [total] int32; starts [documents + 1] int64 into tokens; spans [responses, 2] int64; span_starts
    [documents + 1] int64 into spans; members [n] int64: the documents that belong to the source now.
    """

    stats: DataStats
    weight: float
    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    span_starts: npt.NDArray[np.int64]
    members: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.members)

    def length(self, index: int) -> int:
        """Tokens of a document."""
        member = self.members[index]
        return int(self.starts[member + 1] - self.starts[member])

    def document(self, index: int) -> Document:
        member = self.members[index]
        ids = self.tokens[self.starts[member] : self.starts[member + 1]].astype(np.int64)
        spans = self.spans[self.span_starts[member] : self.span_starts[member + 1]].tolist()
        return Document(ids, tuple((start, end) for start, end in spans))

    def subset(self, keep: npt.NDArray[np.int64]) -> TokenSource:
        """The same source with only the documents `keep` (indices)."""
        return TokenSource(
            self.stats, self.weight, self.tokens, self.starts, self.spans, self.span_starts, self.members[keep]
        )

    def fingerprint(self) -> str:
        """A hash of everything that decides what is drawn from this source."""
        digest = hashlib.sha256(repr(self.weight).encode())
        for values in (self.tokens, self.starts, self.spans, self.span_starts, self.members):
            digest.update(values.tobytes())
        return digest.hexdigest()


def load_sources(
    specs: Sequence[SourceSpec],
    tokenizer: Any,
    *,
    max_length: int,
    skip_bad_lines: bool = False,
    end_ids: Collection[int] | None = None,
) -> list[TokenSource]:
    """Read and tokenise every source completely, so that bad data shows before training starts.

    tokenizer: a transformers tokenizer. end_ids: tokens that end an assistant's turn (None: the tokenizer's EOS).
    Raises `DataError` for a bad line (file, line, reason; counted instead with `skip_bad_lines`), for a source without
    any usable document, and for an empty list.
    """
    if not specs:
        raise DataError("no data; give at least one --data PATH, or --prompts FILE for answers of the source")
    return [_load(spec, tokenizer, max_length, skip_bad_lines, end_ids) for spec in specs]


def _load(
    spec: SourceSpec, tokenizer: Any, max_length: int, skip_bad_lines: bool, end_ids: Collection[int] | None
) -> TokenSource:
    stats = DataStats(str(spec.path))
    tokens, starts, spans, span_starts = array("i"), array("q", [0]), array("q"), array("q", [0])
    encode: Encoder | None = None
    for number, record in read_records(spec.path):
        stats.records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            if encode is None:
                stats.format = _format(record)
                encode = _encoder(stats.format, tokenizer, end_ids, spec.path)
            ids, found = encode(record)
        except BadRecord as error:
            stats.bad_lines += 1
            where = f"{spec.path}, line {number}: {error}"
            if not skip_bad_lines:
                raise DataError(f"{where}; fix the line or skip bad lines with --skip-bad-lines") from None
            stats.first_bad_line = stats.first_bad_line or where
            continue
        kept = [(max(start, 1), min(end, max_length)) for start, end in found]
        kept = [(start, end) for start, end in kept if start < end]
        if not kept:
            stats.dropped += 1
            continue
        if len(ids) > max_length:
            stats.truncated += 1
            stats.truncated_tokens += len(ids) - max_length
        tokens.extend(ids[:max_length])
        starts.append(len(tokens))
        for start, end in kept:
            spans.extend((start, end))
            stats.targets += end - start
        span_starts.append(len(spans) // 2)
        stats.documents += 1
    stats.tokens = len(tokens)
    if not stats.documents:
        raise DataError(_why_empty(stats))
    return TokenSource(
        stats,
        spec.weight,
        np.array(tokens, dtype=np.int32),
        np.array(starts, dtype=np.int64),
        np.array(spans, dtype=np.int64).reshape(-1, 2),
        np.array(span_starts, dtype=np.int64),
        np.arange(stats.documents, dtype=np.int64),
    )


def _why_empty(stats: DataStats) -> str:
    if not stats.records:
        return f"{stats.source}: no records; give a file with data"
    reasons = f"{stats.dropped} without a response token in reach, {stats.bad_lines} bad lines"
    reasons += f", first {stats.first_bad_line}" if stats.first_bad_line else ""
    return (
        f"{stats.source}: none of {stats.records} records has anything to learn ({reasons}); "
        "check the format and data.max_length"
    )


def _format(record: dict[str, Any]) -> str:
    if "messages" in record:
        return "messages"
    if "prompt" in record and "response" in record:
        return "prompt/response"
    if "text" in record:
        return "text"
    raise BadRecord("has none of the keys messages, prompt and response, or text")


def record_encoder(
    record: dict[str, Any], tokenizer: Any, end_ids: Collection[int] | None, path: Path
) -> Encoder:
    """The function from records of this record's format to (token ids, response spans); both raise `BadRecord`."""
    return _encoder(_format(record), tokenizer, end_ids, path)


def _encoder(name: str, tokenizer: Any, end_ids: Collection[int] | None, path: Path) -> Encoder:
    """The function from a record of this format to (token ids, response spans); it raises `BadRecord`."""
    eos = tokenizer.eos_token_id
    if name == "messages":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"{path}: has messages, but the tokenizer has no chat template; give prompt and response")
        chat = ChatEncoder(tokenizer, end_ids if end_ids is not None else ([] if eos is None else [eos]))
        return lambda record: chat.encode(_messages(record), record.get("tools"))
    if eos is None:
        raise DataError(f"{path}: the tokenizer has no EOS token to end a response with; give it an eos_token")

    def plain(text: str) -> list[int]:
        """With the tokenizer's own opening tokens; a closing EOS comes from us."""
        ids = list(tokenizer(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token) else ids

    def encode_text(record: dict[str, Any]) -> tuple[list[int], Spans]:
        ids = [*plain(_string(record, "text")), eos]
        return ids, [(0, len(ids))]

    def encode_pair(record: dict[str, Any]) -> tuple[list[int], Spans]:
        prompt, response = _string(record, "prompt", empty=True), _string(record, "response")
        before, ids = plain(prompt), plain(prompt + response)
        # A token that spans the seam would show decoding a prompt it never sees: tokenise the response apart then.
        if ids[: len(before)] != before:
            ids = before + list(tokenizer(response, add_special_tokens=False)["input_ids"])
        return [*ids, eos], [(len(before), len(ids) + 1)]

    return encode_text if name == "text" else encode_pair


def _string(record: dict[str, Any], key: str, empty: bool = False) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise BadRecord(f"{key} is {'missing' if value is None else type(value).__name__}, not text")
    if not value and not empty:
        raise BadRecord(f"{key} is empty")
    _check_unicode(key, value)
    return value


def _check_unicode(what: str, text: str) -> None:
    """JSON can hold half a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{what} holds half a surrogate pair, which is no text") from None


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRecord("messages is not a list with at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord(f"message {number} is not an object with a role")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise BadRecord(f"message {number} ({message['role']}) has no text content")
        _check_unicode(f"message {number} ({message['role']})", content or "")
    # Columnar files fill keys that a message does not have with null; templates ask whether a key is defined.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def hold_out(sources: Sequence[TokenSource], count: int, seed: int) -> tuple[list[TokenSource], list[Document]]:
    """Take up to `count` documents out of the sources for evaluation; every source keeps at least half of its own.

    Sources take turns, documents are drawn at random from `seed`. Returns the remaining sources and the documents.
    """
    order = [np.random.default_rng([seed, 1, number]).permutation(len(s)) for number, s in enumerate(sources)]
    taken = [0] * len(sources)
    held: list[Document] = []
    while len(held) < count:
        before = len(held)
        for number, source in enumerate(sources):
            if len(held) < count and taken[number] < len(source) // 2:
                held.append(source.document(int(order[number][taken[number]])))
                taken[number] += 1
        if len(held) == before:
            break
    return [s.subset(np.sort(o[n:])) for s, o, n in zip(sources, order, taken, strict=True)], held
