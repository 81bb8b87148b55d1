"""Answers as the model wrote them: token ids beside the text of a record.

Text does not say which tokens it was: what a model wrote is often read back as others (sampled answers above all),
which the model would never write in their place. `flarec answers` therefore adds to a record

    "flarec_ids": {"tokenizer": HASH, "prompt": HASH, "ids": [...]}

the ids of the answer, a hash of the vocabulary that they are of, and one of the prompt's ids. `"unfinished": true` says
that the answer was cut at a number of tokens, so that no end belongs behind it. Whoever reads the text alone finds the
record as it was without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ...base.fields import LARGEST
from ...base.messages import BadRecord
from ...decode.tokenizing import decode_tokens, encode_prompt
from ...errors import GenerationError
from .characters import Spans
from .chat import Dialogue
from .shapes import Pair, Shape

KEY = "flarec_ids"
DIGITS = 16
"""Of a hash: the records hold two each."""
USED = "answers trained as the token ids that the model wrote"
OTHER_TOKENIZER = "answers read as text (their token ids are of another tokenizer)"
OTHER_PROMPT = "answers read as text (their prompt has other token ids now: another chat template, or it was changed)"
OTHER_TEXT = "answers read as text (it is not what their token ids say)"
NO_TOKEN = "answers read as text (one of their token ids is no token of the tokenizer)"
NO_ANSWER = "records whose token ids are left out (they end with no answer that is trained)"


@dataclass(frozen=True)
class Generated:
    """What a record says of its answer: hashes of vocabulary and prompt, and the answer's ids, an end token included
    where the model wrote one. unfinished: the answer was cut, and no end is trained behind it."""

    tokenizer: str
    prompt: str
    ids: tuple[int, ...]
    unfinished: bool = False


def generated_of(record: Mapping[str, Any]) -> Generated | None:
    """The record's field; None without one. Raises `BadRecord` for anything else under this name."""
    value = record.get(KEY)
    if value is None:
        return None
    table = value if isinstance(value, Mapping) else {}
    hashes, ids = [table.get(name) for name in ("tokenizer", "prompt")], table.get("ids")
    numbers = isinstance(ids, list) and all(type(i) is int and 0 <= i <= LARGEST for i in ids)
    unfinished = table.get("unfinished", False)
    sound = numbers and isinstance(unfinished, bool) and all(isinstance(text, str) for text in hashes)
    if not ids or not isinstance(ids, list) or not sound:
        raise BadRecord(
            f'"{KEY}" is not what flarec answers writes (tokenizer, prompt, and a list of token ids); remove it, and '
            "the text alone is read"
        )
    return Generated(str(hashes[0]), str(hashes[1]), tuple(ids), unfinished)


class GeneratedIds:
    """Writes and reads the token ids of answers, with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._vocabulary = ""
        self._known: frozenset[int] = frozenset()

    def field(self, prompt: Sequence[int], answer: Sequence[int], *, unfinished: bool = False) -> dict[str, Any]:
        """What a record says of an answer (under `KEY`)."""
        said = {"tokenizer": self.vocabulary, "prompt": hash_of(prompt), "ids": list(answer)}
        return said | ({"unfinished": True} if unfinished else {})

    @property
    def vocabulary(self) -> str:
        """A hash of all tokens and their ids."""
        if not self._vocabulary:
            tokens = sorted((number, token) for token, number in self.tokenizer.get_vocab().items())
            self._vocabulary = hashlib.sha256(repr(tokens).encode(errors="surrogatepass")).hexdigest()[:DIGITS]
        return self._vocabulary

    @property
    def known(self) -> frozenset[int]:
        """The ids of all tokens."""
        self._known = self._known or frozenset(self.tokenizer.get_vocab().values())
        return self._known

    def read(
        self, shape: Shape, given: Generated, text: tuple[Sequence[int], Spans], ends: Collection[int],
        closing: Collection[int],
    ) -> tuple[tuple[list[int], Spans] | None, str]:
        """(token ids and spans with the answer as it was written, `USED`); (None, the reason) if its text must do.

        text: token ids and spans of the record read as text, from which what surrounds the answer comes: the turns
        before it, the end token where the model wrote none, and what the template writes behind it (neither behind an
        unfinished answer). ends, closing:
        tokens that end a text, and those that may end a turn.
        """
        answer = _answer(shape)
        ids, spans = text
        if answer is None or not spans:
            return None, NO_ANSWER
        if given.tokenizer != self.vocabulary:
            return None, OTHER_TOKENIZER
        if not self.known.issuperset(given.ids):  # a decoder leaves such an id out, and the text would seem right
            return None, NO_TOKEN
        stopped = not any(i in ends for i in given.ids[:-1])  # nothing is written behind an end token
        if not stopped or decode_tokens(self.tokenizer, given.ids) != answer:
            return None, OTHER_TEXT
        try:
            prompt = self._prompt(shape)
        except GenerationError:
            return None, OTHER_PROMPT
        if hash_of(prompt) != given.prompt:
            return None, OTHER_PROMPT
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, prompt, strict=False)))
        behind = spans[-1][1]
        earlier = [span for span in spans[:-1] if span[1] <= shared]
        if given.unfinished:
            return ([*prompt, *given.ids], [*earlier, (len(prompt), len(prompt) + len(given.ids))]), USED
        open_ended = given.ids[-1] not in ends and given.ids[-1] != ids[behind - 1] in closing
        said = [*given.ids, ids[behind - 1]] if open_ended else list(given.ids)
        span = (len(prompt), len(prompt) + len(said))
        return ([*prompt, *said, *ids[behind:]], [*earlier, span]), USED

    def _prompt(self, shape: Shape) -> list[int]:
        """Ids of what stands before the answer, as in decoding."""
        if isinstance(shape, Pair):
            return encode_prompt(self.tokenizer, shape.prompt)
        assert isinstance(shape, Dialogue)
        return encode_prompt(self.tokenizer, shape.messages[:-1], tools=shape.tools, options=shape.options)


def _answer(shape: Shape) -> str | None:
    """The text of the answer; None for a record that ends with none, or with one that is not trained."""
    if isinstance(shape, Pair):
        return shape.response
    if isinstance(shape, Dialogue) and len(shape.messages) - 1 in shape.trained() and len(shape.messages) > 1:
        content = shape.messages[-1].get("content")
        return content if isinstance(content, str) else None
    return None


def hash_of(ids: Sequence[int]) -> str:
    """A hash of token ids."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:DIGITS]
