"""Whether an answer is right: by a pattern that finds it in the text, or by tests that its Python code must pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import regex

from ..base.fields import shown
from ..base.messages import BadRecord
from ..errors import FlarecWarning
from .python_answers import code_of, run_answer

PATTERN_SECONDS = 5.0
"""How long a record's pattern may take on an answer: some take years."""


@dataclass(frozen=True)
class PatternQuestion:
    """The last match of the pattern's first group must equal the answer. pattern: compiled by `regex`."""

    answer: str
    pattern: Any

    def grade(self, text: str) -> bool:
        return found_answer(self.pattern, text) == self.answer.strip()


@dataclass(frozen=True)
class PythonQuestion:
    """The answer's code, after `prefix`, and then `tests` must run to their end (`python_answers`)."""

    tests: str
    prefix: str = ""

    def grade(self, text: str) -> bool:
        return run_answer(self.prefix + code_of(text), self.tests).passed


Question = PatternQuestion | PythonQuestion


def question_of(record: Mapping[str, Any]) -> Question | None:
    """What a record asks: `answer` and `pattern`, or `tests` (and `prefix`). Raises `BadRecord`."""
    tests, prefix = record.get("tests"), record.get("prefix")
    answer, pattern = record.get("answer"), record.get("pattern")
    if tests is not None:
        if not isinstance(tests, str) or not isinstance(prefix, str | None):
            raise BadRecord("tests and prefix are Python code as text")
        if pattern is not None:
            raise BadRecord("has both tests and a pattern; give one of them")
        return PythonQuestion(tests, prefix or "")
    if answer is None or pattern is None:
        return None
    try:
        compiled = regex.compile(str(pattern))
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise BadRecord(f"pattern {shown(pattern)} is not a regular expression ({error})") from None
    if compiled.groups < 1:
        raise BadRecord(f"pattern {shown(pattern)} has no group; put parentheses around the answer")
    return PatternQuestion(str(answer), compiled)


def found_answer(pattern: Any, text: str) -> str | None:
    """The last match of the pattern's first group (`regex`), stripped; None without a match.

    A pattern that takes longer than `PATTERN_SECONDS` counts as one without a match, with a `FlarecWarning`.
    """
    try:
        found = [match[1] for match in pattern.finditer(text, timeout=PATTERN_SECONDS)]
    except TimeoutError:
        warnings.warn(
            f"the pattern {shown(pattern.pattern)} took longer than {PATTERN_SECONDS:g} s on an answer, which counts "
            "as wrong; write it without nested repetitions",
            FlarecWarning,
            stacklevel=2,
        )
        return None
    return found[-1].strip() if found and found[-1] is not None else None
