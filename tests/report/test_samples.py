"""Colours: the spans joined are the text, and each token has the colour of where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from flarec.decode.request import Origin
from flarec.report.samples import coloured

ORIGINS: list[Origin] = ["clean", "accepted", "corrected", "unverified"]


def decode_bytes(tokens: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes; 256 and above are special tokens without text."""
    return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 258), st.sampled_from(ORIGINS)), max_size=40))
def test_any_bytes(written: list[tuple[int, Origin]]) -> None:
    tokens, origins = [token for token, _ in written], [origin for _, origin in written]
    spans = coloured(decode_bytes, tokens, origins)
    assert "".join(text for _, text in spans) == decode_bytes(tokens)
    assert all(text for _, text in spans)
    assert all(one != other for (one, _), (other, _) in pairwise(spans)), "neighbours are joined"


@settings(max_examples=30)
@given(st.text(max_size=20), st.data())
def test_whole_characters_have_the_origin_of_their_last_byte(text: str, data: st.DataObject) -> None:
    tokens = list(text.encode("utf-8"))
    origins = data.draw(st.lists(st.sampled_from(ORIGINS), min_size=len(tokens), max_size=len(tokens)))
    ends = [len("".join(text[: count + 1]).encode("utf-8")) - 1 for count in range(len(text))]
    expected = [(origins[end], character) for end, character in zip(ends, text, strict=True)]
    found = [(origin, character) for origin, part in coloured(decode_bytes, tokens, origins) for character in part]
    assert found == expected
