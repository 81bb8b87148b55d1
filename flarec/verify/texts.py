"""Tokens to compare on: pieces of a small bundled text, ordinary for a trained model as random ids are not."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("texts.txt")
"""Prose, code, numbers, a table and other languages; pieces may begin anywhere."""


@dataclass(frozen=True)
class Texts:
    """The bundled text as token ids of one tokenizer.

    start   ids that the tokenizer puts before every text (a BOS token, on which trained models rest)
    tokens  the text behind them
    """

    tokenizer: Any
    start: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> Texts | None:
        """None for a tokenizer that gives ids which the model does not have."""
        start = tuple(tokenizer("")["input_ids"])
        tokens = tuple(tokenizer(FILE.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
        fits = tokens and all(0 <= token < vocabulary for token in (*start, *tokens))
        return cls(tokenizer, start, tokens) if fits else None

    def piece(self, rng: random.Random, count: int) -> list[int]:
        """`count` token ids: the start of a text, then tokens that follow each other somewhere in it."""
        row = list(self.start[:count])
        offset = rng.randrange(len(self.tokens))
        return row + [self.tokens[(offset + i) % len(self.tokens)] for i in range(count - len(row))]

    def shown(self, tokens: list[int]) -> str:
        return repr(self.tokenizer.decode(tokens))
