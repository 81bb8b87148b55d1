"""Prompts in order, their seeds, and files that cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flarec.errors import DataError
from flarec.train.answers.questions import batches, read_questions
from tests.models import tiny_tokenizer

TURN = {"role": "user", "content": "Hello"}


def test_text_becomes_a_conversation_only_with_chat(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Hello\n\nthere\n")
    tokenizer = tiny_tokenizer()
    plain = list(read_questions(tmp_path / "p.txt", tokenizer, chat=False))
    assert [(question.line, question.prompt) for question in plain] == [(1, "Hello"), (3, "there")]
    assert plain[0].record("x") == {"prompt": "Hello", "response": "x"}
    chat = next(read_questions(tmp_path / "p.txt", tokenizer, chat=True))
    assert chat.record("x") == {"messages": [TURN, {"role": "assistant", "content": "x"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [TURN, {"role": "assistant", "content": "left out"}]}))
    assert next(read_questions(tmp_path / "p.jsonl", tokenizer, chat=False)).ids == chat.ids != plain[0].ids


def test_seeds_are_of_the_prompt_and_the_sample(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\none\n")
    one, two, again = read_questions(tmp_path / "p.txt", tiny_tokenizer(), chat=False)
    seeds = [question.seed(seed, sample) for question in (one, two) for seed in (0, 1) for sample in (0, 1)]
    assert len(set(seeds)) == 8 and all(0 <= seed < 1 << 62 for seed in seeds)
    assert again.seed(1, 1) == one.seed(1, 1)


@pytest.mark.parametrize("skip", [0, 1, 4, 6])
def test_batches_go_on_anywhere(tmp_path: Path, skip: int) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")

    def asked(skip: int, size: int) -> list[list[tuple[int, int]]]:
        questions = read_questions(tmp_path / "p.txt", tiny_tokenizer(), chat=False)
        return [[(question.line, sample) for question, sample in batch] for batch in batches(questions, 2, size, skip)]

    order = [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert asked(skip, 4) == [part for part in (order[skip : skip + 4], order[skip + 4 :]) if part]


@pytest.mark.parametrize(
    ("lines", "chat", "message"),
    [
        ([{"prompt": "a"}, {"messages": [TURN]}], False, "line 2: text and conversations are mixed; give --chat"),
        ([{"prompt": "a"}, {"prompt": ""}], False, "line 2: the prompt is empty"),
        ([{"prompt": "a"}, {"prompt": ""}], True, "line 2: the prompt is empty"),
        ([{"messages": [{"role": "user", "content": 3}]}], False, "line 1: message 1 (user) has no text content"),
        ([{"prompt": "a"}, 3], True, "line 2: a JSON int, not an object"),
        ([{"prompt": "\ud800"}], False, "line 1: the prompt holds bytes that are not UTF-8"),
    ],
)
def test_what_cannot_be_asked_is_named_by_its_line(
    lines: list[Any], chat: bool, message: str, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError) as caught:
        list(read_questions(tmp_path / "p.jsonl", tiny_tokenizer(), chat=chat))
    assert message in str(caught.value) and "p.jsonl" in str(caught.value)
