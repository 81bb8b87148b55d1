"""From data files to tokenised sources: formats, loss spans, truncation, and counts of everything left out."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from .characters import Spans, continued
from .chat import ChatEncoder, Dialogue
from .document import Document
from .files import BadRecord, SourceSpec, parse_source, read_records
from .generated import GeneratedIds, generated_of
from .shapes import Pair, Text, shape_of

__all__ = ["DataStats", "RecordEncoder", "TokenSource", "hold_out", "load_sources", "parse_source"]

Seen = Callable[[object, Sequence[int]], None]
"""Told the place and the whole token ids of every record that can be used."""


@dataclass
class DataStats:
    """What became of one source. Tokens, targets and turns are those of the kept documents, after truncation.

    turns  supervised responses; lost_turns: those that truncation cut off; endless: those that end without one of the
    tokens that end a text; inner_ends: those that have such a token before their end; ends: the tokens that they end
    with, of the complete ones, with counts
    """

    source: str
    format: str = ""
    records: int = 0
    documents: int = 0
    tokens: int = 0
    targets: int = 0
    turns: int = 0
    lost_turns: int = 0
    endless: int = 0
    inner_ends: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: int = 0
    bad_lines: int = 0
    first_bad_line: str = ""
    ends: Counter[int] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = f"{self.source}: {self.documents:,} documents ({self.format}), {self.tokens:,} tokens"
        text += f", {self.targets:,} targets in {self.turns:,} turns"
        if self.truncated:
            text += f"; {self.truncated:,} truncated ({self.truncated_tokens:,} tokens lost"
            text += f", {self.lost_turns:,} turns" if self.lost_turns else ""
            text += ")"
        if self.dropped:
            text += f"; {self.dropped:,} dropped (no response token left)"
        if self.endless:
            text += f"; {self.endless:,} turns end without a token that ends a text: generation will not stop there"
        if self.inner_ends:
            text += f"; {self.inner_ends:,} turns hold a token that ends a text before their end, and train to go on"
        for note, count in sorted(self.notes.items()):
            text += f"; {count:,} {note}"
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
    seen: Seen | None = None,
) -> list[TokenSource]:
    """Read and tokenise every source completely, so that bad data shows before training starts.

    tokenizer: a transformers tokenizer. end_ids: tokens that end an assistant's turn (None: the tokenizer's EOS). seen:
    told of every document before it is cut.
    Raises `DataError` for a bad line (file, line, reason; counted instead with `skip_bad_lines`), for a source without
    any usable document, and for an empty list.
    """
    if not specs:
        raise DataError("no data; give at least one --data PATH, or --prompts FILE for answers of the source")
    return [_load(spec, tokenizer, max_length, skip_bad_lines, end_ids, seen) for spec in specs]


def _load(
    spec: SourceSpec, tokenizer: Any, max_length: int, skip_bad_lines: bool, end_ids: Collection[int] | None,
    seen: Seen | None,
) -> TokenSource:
    kept = _Kept(DataStats(str(spec.path)), max_length)
    stats, encode = kept.stats, RecordEncoder(tokenizer, end_ids, spec.path)
    for place, record in read_records(spec.path):
        stats.records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            ids, spans = encode(record)
        except BadRecord as error:
            stats.bad_lines += 1
            if not skip_bad_lines:
                raise DataError(f"{place}: {error}; fix the line or skip bad lines with --skip-bad-lines") from None
            stats.first_bad_line = stats.first_bad_line or f"{place}: {error}"
            continue
        if seen is not None:
            seen(place, ids)
        kept.add(ids, spans, encode.closing, encode.ends)
    stats.tokens, stats.notes, formats = len(kept.tokens), encode.notes, encode.formats
    named = [name if len(formats) == 1 else f"{count:,} {name}" for name, count in sorted(formats.items())]
    stats.format = ", ".join(named)
    if not stats.documents:
        raise DataError(_why_empty(stats))
    return kept.source(spec.weight)


class _Kept:
    """The documents of a source as they are read, cut at `max_length`."""

    def __init__(self, stats: DataStats, max_length: int) -> None:
        self.stats, self.max_length = stats, max_length
        self.tokens, self.starts = array("i"), array("q", [0])
        self.spans, self.span_starts = array("q"), array("q", [0])

    def add(self, ids: Sequence[int], found: Spans, end_ids: Collection[int], stops: Collection[int]) -> None:
        """end_ids: tokens that may end a turn; stops: those at which a generation stops."""
        stats, limit = self.stats, self.max_length
        whole = [(max(start, 1), end) for start, end in found if max(start, 1) < end]
        kept = [(start, min(end, limit)) for start, end in whole if start < limit]
        if not kept:
            stats.dropped += 1
            return
        if len(ids) > limit:
            stats.truncated += 1
            stats.truncated_tokens += len(ids) - limit
        self.tokens.extend(ids[:limit])
        self.starts.append(len(self.tokens))
        for start, end in kept:
            self.spans.extend((start, end))
            stats.targets += end - start
        self.span_starts.append(len(self.spans) // 2)
        complete = [ids[end - 1] for _, end in whole if end <= limit]
        stats.ends.update(complete)
        stats.endless += sum(token not in end_ids for token in complete)
        stats.inner_ends += sum(any(token in stops for token in ids[start : end - 1]) for start, end in kept)
        stats.turns += len(kept)
        stats.lost_turns += len(whole) - len(kept)
        stats.documents += 1

    def source(self, weight: float) -> TokenSource:
        return TokenSource(
            self.stats,
            weight,
            np.array(self.tokens, dtype=np.int32),
            np.array(self.starts, dtype=np.int64),
            np.array(self.spans, dtype=np.int64).reshape(-1, 2),
            np.array(self.span_starts, dtype=np.int64),
            np.arange(self.stats.documents, dtype=np.int64),
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


class RecordEncoder:
    """The function from a record to (token ids, response spans), each by its own shape.

    It raises `BadRecord` for the record, and `DataError` for a tokenizer that cannot serve its shape. `format` is the
    shape of the last record, `of_chat` whether a chat template wrote it, `formats` counts all of them; `ends` are the
    ids that end a text, `closing` those that can end a turn; `notes` is what should be known of the records so far, and
    of how many.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int] | None, path: Path) -> None:
        eos = tokenizer.eos_token_id
        self.tokenizer, self.path, self.eos = tokenizer, path, eos
        ends = frozenset(end_ids if end_ids is not None else [] if eos is None else [eos])
        self.ends, self.closing = ends, ends | {*tokenizer.all_special_ids}
        self.chat = ChatEncoder(tokenizer, ends)
        self.generated = GeneratedIds(tokenizer)
        self.notes = self.chat.notes
        self.formats: Counter[str] = Counter()
        self.format = ""
        self.of_chat = False

    def __call__(self, record: dict[str, Any]) -> tuple[list[int], Spans]:
        self.format, shape = shape_of(record)
        given, self.of_chat = generated_of(record), isinstance(shape, Dialogue)
        if isinstance(shape, Dialogue):
            if not getattr(self.tokenizer, "chat_template", None):
                raise DataError(
                    f"{self.path}: has {self.format}, but the tokenizer has no chat template; give prompt and response"
                )
            encoded = self.chat.encode_conversation(shape)
        elif self.eos is None:
            raise DataError(
                f"{self.path}: the tokenizer has no EOS token to end a response with; give it an eos_token"
            )
        else:
            encoded = self._text(shape) if isinstance(shape, Text) else self._pair(shape)
        if given is not None:
            written, note = self.generated.read(shape, given, encoded, self.ends, self.closing)
            self.notes[note] += 1
            encoded = encoded if written is None else written
        self.formats[self.format] += 1
        return encoded

    def _plain(self, text: str) -> list[int]:
        """With the tokenizer's own opening tokens; a closing EOS comes from us."""
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.eos and not text.endswith(self.tokenizer.eos_token) else ids

    def _text(self, shape: Text) -> tuple[list[int], Spans]:
        ids = [*self._plain(shape.text), self.eos]
        return ids, [(0, len(ids))]

    def _pair(self, shape: Pair) -> tuple[list[int], Spans]:
        before, ids = self._plain(shape.prompt), self._plain(shape.prompt + shape.response)
        # A token that spans the seam would show decoding a prompt it never sees: tokenise the response apart then.
        if ids[: len(before)] != before:
            ids = before + continued(self.tokenizer, before, shape.response, ids)
        return [*ids, self.eos], [(len(before), len(ids) + 1)]


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
