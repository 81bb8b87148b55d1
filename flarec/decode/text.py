"""Text on top of tokens: stop strings, and streaming text that never takes back a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flarec.errors import GenerationError

Decode = Callable[[Sequence[int]], str]
REPLACEMENT = "�"  # what decoders return for bytes that are not yet a whole character


class StopStrings:
    """A `stop_check` for the engine: ends a request with the token that completes one of `stops`.

    decode turns new token ids into text. All tokens up to the completing one are kept; `trim` cuts the text.
    """

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        if not stops or not all(stops):
            raise GenerationError("stop strings must not be empty; leave the option out to have none")
        self.decode = decode
        self.stops = tuple(stops)

    def __call__(self, tokens: Sequence[int]) -> int | None:
        text = self.decode(tokens)
        return len(tokens) if any(stop in text for stop in self.stops) else None

    def trim(self, text: str) -> str:
        """`text` up to and including the stop string that ends first; all of it if there is none."""
        ends = [text.index(stop) + len(stop) for stop in self.stops if stop in text]
        return text[: min(ends)] if ends else text


class TextStream:
    """Turns one request's tokens into pieces of text as they come.

    `push(tokens)` returns the new text; a character whose bytes are not complete is held back until they are.
    `finish()` returns what was held back. The pieces joined are `decode` of all tokens (cut by `stops` if given).
    """

    def __init__(self, decode: Decode, stops: StopStrings | None = None) -> None:
        self.decode = decode
        self.stops = stops
        self.tokens: list[int] = []
        self.sent = ""

    def push(self, tokens: Sequence[int]) -> str:
        self.tokens += tokens
        return self._advance(self._text().rstrip(REPLACEMENT))

    def finish(self) -> str:
        return self._advance(self._text())

    def _text(self) -> str:
        text = self.decode(self.tokens)
        return self.stops.trim(text) if self.stops is not None else text

    def _advance(self, text: str) -> str:
        # a decoder may still rewrite its tail (say, spaces before punctuation): then wait for text that extends it
        if not text.startswith(self.sent):
            return ""
        piece = text[len(self.sent) :]
        self.sent = text
        return piece
