"""Python answers run with limits, and pass only if their tests ran."""

from __future__ import annotations

import pytest

from flarec.base.messages import BadRecord
from flarec.evaluation.grading import PatternQuestion, PythonQuestion, question_of
from flarec.evaluation.python_answers import Verdict, code_of, run_answer


@pytest.mark.parametrize(
    ("code", "tests", "verdict"),
    [
        ("def f(x):\n    return x + 1", "assert f(1) == 2", Verdict(True, "")),
        ("print('noise', end='')", "", Verdict(True, "")),
        ("def f(x):\n    return x", "assert f(1) == 2", Verdict(False, "AssertionError")),
        ("def f(:", "", Verdict(False, "SyntaxError")),
        ("import json.nothing", "", Verdict(False, "ModuleNotFoundError")),
        ("import sys\nsys.exit(0)", "assert False", Verdict(False, "ended early")),
        ("import os\nos._exit(0)", "assert False", Verdict(False, "ended early")),
        ("rows = bytearray(3 << 30)", "", Verdict(False, "memory")),
        ("open('large', 'wb').write(bytes(40 << 20))", "", Verdict(False, "OSError")),
        ("import os", "assert set(os.environ) <= {'LC_CTYPE'} and os.listdir() == ['answer.py']", Verdict(True, "")),
        ("x = '\ud800'", "", Verdict(True, "")),
    ],
)
def test_verdicts(code: str, tests: str, verdict: Verdict) -> None:
    assert run_answer(code, tests) == verdict


def test_endless_answers_end() -> None:
    assert run_answer("while True:\n    pass", "", seconds=0.5) == Verdict(False, "time")
    assert run_answer("import time\ntime.sleep(60)", "", seconds=0.5) == Verdict(False, "time")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"), ("Sure:\n```python\nx = 1\n```\nDone", "x = 1\n"),
        ("```\nx\n```\nor\n```py\ny\n```", "y\n"),
        ("```python\nx = 1", "x = 1"), ("a ```b``` c", "a ```b``` c"),
    ],
)
def test_code_of_an_answer(text: str, code: str) -> None:
    assert code_of(text) == code


def test_questions() -> None:
    assert question_of({"prompt": "x"}) is None and question_of({"answer": "3"}) is None
    pattern = question_of({"answer": " 3", "pattern": "= (.+)"})
    assert isinstance(pattern, PatternQuestion) and pattern.grade("1 + 2 = 3 ") and not pattern.grade("= 4")
    python = question_of({"tests": "assert f() == 2", "prefix": "def f():\n"})
    assert isinstance(python, PythonQuestion) and python.grade("    return 2") and not python.grade("    return 3")
    for record in ({"tests": 3}, {"tests": "", "pattern": "(x)"}, {"tests": "", "prefix": 1}):
        with pytest.raises(BadRecord):
            question_of(record)
