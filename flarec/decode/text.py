"""Text on top of tokens: it comes piece by piece, never takes back a character, and ends before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
Settled = Callable[[Sequence[int]], bool]
REPLACEMENT = "�"  # what decoders return for bytes that are not yet a whole character
WINDOW = 16  # tokens that may be decoded again with every new one


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first; None if there is none.

    "Complete first", not "begins first": that is where a generation stops, however its text is split into tokens. Of
    two that end together the longer one counts.
    """
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the stop string that is complete first; all of it if there is none."""
    return text[: find_stop(text, stops)]


class DecodedTokens:
    """The text of tokens that come one after another, without decoding all of them every time.

    Only a window of the last tokens is decoded. When its text is settled as a whole and it has grown long, the last
    token alone begins the next one, if it has text of its own: a decoder that treats a first token differently (leading
    space) then does so in both texts whose difference is taken.

    settled(tokens) says whether tokens that follow leave the text of these as it is, apart from characters whose bytes
    are not complete. With byte fallback they may not: one wrong byte makes all bytes before it unreadable.
    """

    def __init__(self, decode: Decode, settled: Settled | None = None) -> None:
        self._decode = decode
        self._settled = settled
        self._window: list[int] = []
        self._fixed = ""  # the part of the window's text that was returned as settled

    def push(self, tokens: Sequence[int]) -> tuple[str, str]:
        """What the next tokens add: text that stays, and text behind it that is not settled yet."""
        self._window += tokens
        text = self._decode(self._window)
        if not text.startswith(self._fixed):  # a decoder that rewrites its tail: wait for text that extends it
            return "", ""
        if self._settled is not None and not self._settled(self._window):
            return "", text[len(self._fixed) :]
        fixed = max(self._fixed, text.rstrip(REPLACEMENT), key=len)
        piece, self._fixed = fixed[len(self._fixed) :], fixed
        if fixed == text and len(self._window) >= WINDOW and (last := self._decode(self._window[-1:])):
            self._window, self._fixed = self._window[-1:], last
        return piece, text[len(fixed) :]


class TextStream:
    """One request's text, up to the stop string that is complete first, as its tokens come.

    Characters that are not settled are held back (`DecodedTokens`), and so is an end that may still become a stop
    string. The pieces joined are `cut(decode(all tokens), stops)`.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), settled: Settled | None = None) -> None:
        self._tokens = DecodedTokens(decode, settled)
        self._stops = tuple(stops)
        self._read = self._told = 0
        self._ready: list[str] = []  # may be shown
        self._held = self._tail = ""  # settled text that a stop string may begin with, and text that is not settled
        self._stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that the next tokens add, as far as it can be shown."""
        self._told += len(tokens)
        if self._told > self._read:
            self._take(tokens[self._read - self._told :])
        ready, self._ready = "".join(self._ready), []
        return ready

    def finish(self) -> str:
        """What was held back, once no token follows."""
        rest = "".join([*self._ready, self._held, self._tail])
        self._ready, self._held, self._tail = [], "", ""
        return rest

    def stop_check(self, tokens: Sequence[int]) -> int | None:
        """The engine's question for a request with stop strings: how many of all its tokens to keep, None to go on.

        Tokens that it has seen may be pushed afterwards all the same; they are read once.
        """
        if len(tokens) > self._read:
            self._take(tokens[self._read :])
        return len(tokens) if self._stopped else None

    def _take(self, tokens: Sequence[int]) -> None:
        self._read += len(tokens)
        if self._stopped:
            return
        piece, self._tail = self._tokens.push(tokens)
        text = self._held + piece
        stop = find_stop(text + self._tail, self._stops)
        if stop is not None:
            self._stopped = True
            self._ready.append((text + self._tail)[:stop])
            self._held = self._tail = ""
            return
        # the longest end of the text with which a stop string begins
        sizes = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        shown = len(text) - max(sizes, default=0)
        self._ready.append(text[:shown])
        self._held = text[shown:]
