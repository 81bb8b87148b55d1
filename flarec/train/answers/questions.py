"""Prompts as they are asked and as they stand in the training data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...base.prompts import read_prompts
from ...decode.tokenizing import encode_prompt
from ...errors import DataError, GenerationError


@dataclass(frozen=True)
class Question:
    """A prompt: its line, its token ids, and its part of the record, to which the answer is added."""

    line: int
    ids: tuple[int, ...]
    prompt: str | list[dict[str, Any]]

    def record(self, answer: str) -> dict[str, Any]:
        """A record of training data."""
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, "response": answer}
        return {"messages": [*self.prompt, {"role": "assistant", "content": answer}]}

    def seed(self, seed: int, sample: int) -> int:
        """The seed of an answer: of the run's seed, the prompt and the number of the sample, and of nothing else."""
        digest = hashlib.sha256(f"{seed} {sample} {' '.join(map(str, self.ids))}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 2


def read_questions(path: Path, tokenizer: Any, *, chat: bool) -> Iterator[Question]:
    """The prompts of a file, one at a time. Raises `DataError` naming file and line."""
    first: type | None = None
    for where, prompt in read_prompts(path):
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if first is not None and type(prompt) is not first:
            raise DataError(f"{where}: text and conversations are mixed; give --chat, which makes all conversations")
        first = type(prompt)
        try:
            ids = encode_prompt(tokenizer, prompt)
        except GenerationError as error:
            raise DataError(f"{where}: {error}") from None
        if not ids:
            raise DataError(f"{where}: the prompt has no token; leave the line out")
        yield Question(where.number, tuple(ids), prompt)


def batches(questions: Iterator[Question], samples: int, size: int, skip: int) -> Iterator[list[tuple[Question, int]]]:
    """(question, number of the sample), `size` at a time, without the first `skip` of them."""
    asked = chain.from_iterable(((question, sample) for sample in range(samples)) for question in questions)
    rest = islice(asked, skip, None)
    while batch := list(islice(rest, size)):
        yield batch
