"""Text that comes with its tokens: joined pieces are the text of all tokens, and nothing shown is ever taken back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flarec.decode import TextStream
from flarec.decode.text import WINDOW, DecodedTokens, cut
from flarec.decode.tokenizing import ByteFallback, decode_tokens
from tests.models import tiny_tokenizer

alphabet = st.sampled_from("abcä€😀\n")
stop_strings = st.lists(st.text(alphabet, min_size=1, max_size=4), max_size=3)
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "model"


def from_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def stream(data: bytes, sizes: list[int], stops: list[str]) -> list[str]:
    shown = TextStream(from_bytes, stops)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(shown.push(list(data[start : start + size])))
        start += size
    return [*pieces, shown.push(list(data[start:])), shown.finish()]


# --- stop strings


@given(st.text(alphabet, max_size=30), st.lists(st.integers(0, 5), max_size=20), stop_strings)
def test_pieces_join_to_the_cut_text(text: str, sizes: list[int], stops: list[str]) -> None:
    pieces = stream(text.encode(), sizes, stops)
    assert "".join(pieces) == cut(text, stops)
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(alphabet, max_size=30), stop_strings)
def test_cut(text: str, stops: list[str]) -> None:
    result = cut(text, stops)
    assert text.startswith(result)
    assert not any(stop in result for stop in stops)
    # one more character than the result, and the start of some stop string, or nothing was cut
    assert result == text or any(text.startswith(stop, len(result)) for stop in stops)


def test_the_stop_that_is_complete_first_cuts() -> None:
    assert cut("xabc", ["abc", "b"]) == "xa", "`b` is complete before `abc` is"
    assert cut("xabc", ["bc", "abc"]) == "x", "both end together: the longer one"
    assert "".join(stream(b"xabc", [1], ["abc", "b"])) == "".join(stream(b"xabc", [4], ["abc", "b"])) == "xa"


def test_a_possible_stop_is_held_back_and_then_shown() -> None:
    shown = TextStream(from_bytes, ["STOP"])
    assert shown.push(list(b"go ST")) == "go "
    assert shown.push(list(b"ART S")) == "START "
    assert shown.push(list(b"TOP and on")) == ""
    assert shown.push(list(b"more")) == ""
    assert shown.finish() == ""


@given(st.text(alphabet="ab<>ä", max_size=40), st.integers(1, 5))
def test_a_request_stops_with_the_completing_token(text: str, chunk: int) -> None:
    """The engine asks after every token, and tells tokens afterwards, several at a time."""
    stops, data = ["<>", "bab", "ä"], list(text.encode())
    kept = next((n for n in range(1, len(data) + 1) if any(stop in from_bytes(data[:n]) for stop in stops)), None)
    shown, asked, pieces = TextStream(from_bytes, stops), 0, []
    while asked < len(data) and asked != kept:
        start = asked
        for asked in range(start + 1, min(start + chunk, len(data)) + 1):
            answer = shown.stop_check(data[:asked])
            assert answer == (asked if asked == kept else None)
            if answer is not None:
                break
        pieces.append(shown.push(data[start:asked]))
    assert "".join([*pieces, shown.finish()]) == cut(from_bytes(data), stops)


# --- decoding from the last settled place


def test_an_incomplete_character_is_held_back_until_the_end() -> None:
    shown = TextStream(from_bytes)
    euro = list("€".encode())
    assert shown.push(euro[:2]) == ""
    assert shown.push(euro[2:]) == "€"
    assert shown.push(euro[:1]) == ""
    assert shown.finish() == "\ufffd"


def of_pieces(model: Any, decoder: Any) -> PreTrainedTokenizerFast:
    raw = Tokenizer(model)
    raw.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's: pieces with a mark for the space before them, and a token for every byte."""
    pieces = ["<unk>", "</s>", "▁", "▁the", "▁a", "s", "ä", "▁€", ",", "▁▁"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return of_pieces(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]), decoder)


def words() -> PreTrainedTokenizerFast:
    """As BERT's: a space before every piece that does not go on."""
    pieces = ["<unk>", "</s>", "the", "##s", "a", "##ä", "€", ",", "##"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return of_pieces(models.WordPiece(vocabulary, unk_token="<unk>"), decoders.WordPiece(cleanup=False))


def suffixes() -> PreTrainedTokenizerFast:
    """As CLIP's: a piece may end a word, and the text's last piece has no space behind it."""
    pieces = ["<unk>", "</s>", "the</w>", "s", "a", "ä</w>", "</w>", ",</w>"]
    return of_pieces(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]), decoders.BPEDecoder())


TOKENIZERS = {
    "tiny": tiny_tokenizer, "example": lambda: AutoTokenizer.from_pretrained(EXAMPLE), "byte fallback": byte_fallback,
    "words": words, "suffixes": suffixes,
}


@functools.cache
def tokenizer(name: str) -> Any:
    return TOKENIZERS[name]()


@functools.cache
def favourites(name: str) -> tuple[list[int], list[int]]:
    """All ids, and those of special tokens and of the bytes of a few characters, which random ids seldom combine."""
    its = tokenizer(name)
    ids = sorted(its.get_vocab().values())
    parts = [its.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "€ä😀a".encode()]
    known = {i for i in parts if i is not None} | set(its.all_special_ids)
    return ids, sorted(known | set(its("€ä😀 a")["input_ids"]))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text_of_all_tokens(name: str, data: st.DataObject) -> None:
    its = tokenizer(name)
    everything, few = favourites(name)
    tokens = data.draw(st.lists(st.sampled_from(few) | st.sampled_from(everything), max_size=4 * WINDOW))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    shown = TextStream(lambda part: decode_tokens(its, part), (), ByteFallback(its).settled)
    pieces: list[str] = []
    at = 0
    while at < len(tokens):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(shown.push(tokens[at : at + size]))
        at += size
        assert decode_tokens(its, tokens).startswith("".join(pieces)), "nothing is taken back"
    assert "".join([*pieces, shown.finish()]) == decode_tokens(its, tokens)


@pytest.mark.parametrize("name", ["tiny", "example", "byte fallback"])
def test_text_is_shown_with_its_tokens(name: str) -> None:
    """Not only in the end: all that is held back is a character that is not complete, or the bytes of a row."""
    its = tokenizer(name)
    ids, _ = favourites(name)
    letters = [i for i in ids if decode_tokens(its, [i]).isalpha()][:5] * 20
    shown = TextStream(lambda part: decode_tokens(its, part), (), ByteFallback(its).settled)
    held = [len(decode_tokens(its, letters[: n + 1])) for n in range(len(letters))]
    seen = 0
    for n, token in enumerate(letters):
        seen += len(shown.push([token]))
        assert held[n] - seen == 0 or token in ByteFallback(its).bytes


def test_only_a_window_is_decoded() -> None:
    calls: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        calls.append(len(tokens))
        return from_bytes(tokens)

    count = 1000
    decoded = DecodedTokens(decode)
    text = "".join(decoded.push([byte])[0] for byte in b"a" * count)
    assert text == "a" * count
    assert max(calls) <= WINDOW and sum(calls) <= count * WINDOW
