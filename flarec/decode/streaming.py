"""Text that is safe to show while tokens are still coming, and where a stop string cuts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import TextStream

Decode = Callable[[Sequence[int]], str]


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the stop string that is complete first; all of it if there is none.

    "Complete first", not "begins first": that is where a generation stops, however its text is split into tokens. Of
    two that end together the longer one counts.
    """
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


class ShownText:
    """Pieces of one request's text as its tokens come: joined, they are `cut(decode(all tokens), stops)`.

    Characters whose bytes are not complete are held back, and so is an end that may still become a stop string.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._stream = TextStream(decode)
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these new tokens add, as far as it is settled."""
        return self._show(self._stream.push(tokens), final=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return self._show(self._stream.finish(), final=True)

    def _show(self, piece: str, final: bool) -> str:
        if self._stopped:
            return ""
        text = self._held + piece
        shown = cut(text, self._stops)
        self._stopped = shown != text
        self._held = ""
        if not self._stopped and not final:
            # the longest end of the text with which a stop string begins
            sizes = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            if sizes:
                shown, self._held = text[: -max(sizes)], text[-max(sizes) :]
        return shown
