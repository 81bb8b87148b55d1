"""From characters to whole tokens: spans of a text as spans of its token ids.

Offsets of tokenizers are read with care: a token may leave a space at its start out (`trim_offsets`), a character may
have several tokens, and normalisation may drop characters. Where a token covers both sides of a span's edge, the sides
are tokenised apart, as they are in decoding, where the one is there before the other. What a span's tokens read is
compared with its characters in the end.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ...base.fields import shown
from ...base.messages import BadRecord
from ...errors import DataError

Spans = list[tuple[int, int]]
Offsets = list[tuple[int, int]]
CONTEXT = 5  # tokens: the bytes of the longest character, and one more


def token_spans(tokenizer: Any, text: str, spans: Spans) -> tuple[list[int], Spans]:
    """Token ids of a text, without tokens around it, and the token spans [start, end) of its character spans.

    Spans are ascending and disjoint; a span without a token is left out, and spans that touch become one. Raises
    `BadRecord` if a span's tokens do not read as its characters, `DataError` for a tokenizer without offsets.
    """
    merged: Spans = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        elif start < end:
            merged.append((start, end))
    ids, places = _cut(tokenizer, text, sorted({edge for span in merged for edge in span}))
    found = [(places[start], places[end]) for start, end in merged]
    for (start, end), (first, last) in zip(found, merged, strict=True):
        _check_text(tokenizer, ids, (start, end), text[first:last])
    return ids, [(start, end) for start, end in found if start < end]


def _cut(tokenizer: Any, text: str, edges: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """Ids of a text and, for each edge, the number of tokens before it."""
    ids, offsets = _encode(tokenizer, text)
    places = _places(tokenizer, text, ids, offsets, edges)
    apart = [edge for edge, place in places.items() if place is None]
    if not apart:
        return ids, {edge: place for edge, place in places.items() if place is not None}
    whole = decoded(tokenizer, ids)
    for after in ("", "\n"):
        parts = _cut_apart(tokenizer, text, edges, after)
        if decoded(tokenizer, parts[0]) == whole:
            return parts
    raise BadRecord("the tokenizer makes one token of the end of the prompt and the beginning of a turn")


def _cut_apart(tokenizer: Any, text: str, edges: Sequence[int], after: str) -> tuple[list[int], dict[int, int]]:
    """As `_cut`, with every part between two edges tokenised on its own, all but the first as text behind `after`."""
    ids: list[int] = []
    places = {}
    for start, end in pairwise([0, *edges, len(text)]):
        places[start] = len(ids)
        ids += _continued(tokenizer, text[start:end], after if start else "")
        places[end] = len(ids)
    return ids, places


def _continued(tokenizer: Any, text: str, after: str) -> list[int]:
    """Ids of a text that does not begin a document: some tokenizers begin every text with a space."""
    before = _encode(tokenizer, after)[0] if after else []
    ids = _encode(tokenizer, after + text)[0]
    return ids[len(before) :] if ids[: len(before)] == before else _encode(tokenizer, text)[0]


def continued(tokenizer: Any, before: Sequence[int], text: str, whole: Sequence[int]) -> list[int]:
    """Ids of `text` behind the tokens `before`, tokenised apart, so that both read as the tokens `whole` do.

    Raises `BadRecord` if the tokenizer has none.
    """
    expected = decoded(tokenizer, whole)
    for after in ("", "\n"):
        ids = _continued(tokenizer, text, after)
        if _alike(decoded(tokenizer, [*before, *ids]), expected):
            return ids
    raise BadRecord("the tokenizer makes one token of the end of the prompt and the beginning of the response")


def _encode(tokenizer: Any, text: str) -> tuple[list[int], Offsets]:
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the tokenizer has no character offsets, which chat data need; save it as tokenizer.json (a fast tokenizer)"
        )
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(out["input_ids"]), [(int(start), int(end)) for start, end in out["offset_mapping"]]


def _places(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Offsets, edges: Sequence[int]
) -> dict[int, int | None]:
    """For each edge the number of tokens before it; None where a token lies on both sides."""
    first = [len(text)]  # where the tokens from a place on begin
    for start, _ in reversed(offsets):
        first.append(min(start, first[-1]))
    first.reverse()
    places: dict[int, int | None] = {}
    place = covered = 0
    for edge in edges:
        while covered < edge and place < len(ids) and max(covered, offsets[place][1]) <= edge:
            covered = max(covered, offsets[place][1])
            place += 1
        gap = text[covered:edge]
        clean = first[place] >= edge and (not gap or not any(map(str.isspace, gap)))
        places[edge] = place if clean else _behind_stripped(tokenizer, ids, offsets, place, edge)
    return places


def _behind_stripped(
    tokenizer: Any, ids: Sequence[int], offsets: Offsets, place: int, edge: int
) -> int | None:
    """The place behind an added token that takes the white space beside it, which then nothing else can hold."""
    inside = place < len(ids) and offsets[place][0] < edge < offsets[place][1]
    return place + 1 if inside and _takes_space(tokenizer, ids[place]) else None


def _takes_space(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and bool(added.lstrip or added.rstrip)


def _check_text(tokenizer: Any, ids: Sequence[int], span: tuple[int, int], text: str) -> None:
    """Raises `BadRecord` if the tokens of a span do not read as a text, as far as this tokenizer can write it at all.

    They are read behind some tokens before them: some decoders drop a space at the start of what they are given, and
    read bytes only with the bytes before them.
    """
    start, end = span
    for size in range(min(start, CONTEXT) + 1):
        before = list(ids[start - size : start])
        read = decoded(tokenizer, [*before, *ids[start:end]]).removeprefix(decoded(tokenizer, before))
        if read == text:
            return
    beside = [*ids[max(0, start - 1) : start], *ids[end - 1 : end]]
    taken = any(_takes_space(tokenizer, token) for token in beside)
    if taken and read.strip() == text.strip():
        return
    alone = decoded(tokenizer, _encode(tokenizer, text)[0])
    if alone == text or _bare(read) not in (_bare(text), _bare(alone)):
        raise BadRecord(f"the tokens of a turn read {shown(read)}, but its text is {shown(text)}")


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _alike(one: str, other: str) -> bool:
    return one == other or unicodedata.normalize("NFKC", one) == unicodedata.normalize("NFKC", other)


def _bare(text: str) -> str:
    """Without white space and forms of characters, in which tokenizers that normalise differ from the text."""
    return "".join(unicodedata.normalize("NFKC", text).split())
