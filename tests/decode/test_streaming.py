"""Text that is shown while it comes: joined pieces are the cut text, and nothing shown is ever taken back."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from flarec.decode.streaming import ShownText, cut

alphabet = st.sampled_from("abcä€😀\n")


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def stream(data: bytes, sizes: list[int], stops: list[str]) -> list[str]:
    shown = ShownText(decode, stops)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(shown.push(list(data[start : start + size])))
        start += size
    return [*pieces, shown.push(list(data[start:])), shown.finish()]


@given(
    st.text(alphabet, max_size=30), st.lists(st.integers(0, 5), max_size=20),
    st.lists(st.text(alphabet, min_size=1, max_size=4), max_size=3),
)  # fmt: skip
def test_pieces_join_to_the_cut_text(text: str, sizes: list[int], stops: list[str]) -> None:
    pieces = stream(text.encode(), sizes, stops)
    assert "".join(pieces) == cut(text, stops)
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(alphabet, max_size=30), st.lists(st.text(alphabet, min_size=1, max_size=4), max_size=3))
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
    shown = ShownText(decode, ["STOP"])
    assert shown.push(list(b"go ST")) == "go "
    assert shown.push(list(b"ART S")) == "START "
    assert shown.push(list(b"TOP and on")) == ""
    assert shown.push(list(b"more")) == ""
    assert shown.finish() == ""


def test_an_incomplete_character_is_held_back_until_the_end() -> None:
    shown = ShownText(decode)
    euro = list("€".encode())
    assert shown.push(euro[:2]) == ""
    assert shown.push(euro[2:]) == "€"
    assert shown.push(euro[:1]) == ""
    assert shown.finish() == "\ufffd"
