"""examples/real/tasks.py: answers are right, checks take them, and no question is in two splits."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from flarec.evaluation.grading import PatternQuestion, PythonQuestion, question_of
from tests.real_scripts import real_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    return real_script(monkeypatch, "tasks")


def question(task: dict[str, Any]) -> str:
    return str(task["prompt"].splitlines()[-1] if "prompt" in task else task["messages"][-2]["content"])


def response(task: dict[str, Any]) -> str:
    return str(task["response"] if "prompt" in task else task["messages"][-1]["content"])


def shown(task: dict[str, Any]) -> list[str]:
    """Questions of a task, those of its examples too."""
    if "prompt" in task:
        return [re.sub(r"(?<=[=,]) \d+$", "", line) for line in task["prompt"].splitlines()]
    return [turn["content"] for turn in task["messages"] if turn["role"] == "user"]


def test_splits_are_large_enough_and_share_no_question(script: Any) -> None:
    splits = {split: script.tasks(split) for split in script.SPLITS}
    assert all(len(tasks) >= 400 for tasks in splits.values())
    asked = {split: {text for task in tasks for text in shown(task)} for split, tasks in splits.items()}
    assert not asked["choose"] & asked["report"]
    for tasks in splits.values():
        assert len({question(task) for task in tasks}) == len(tasks)
        assert not any(question(task) in shown(task)[:-1] for task in tasks)
        assert {task["kind"] for task in tasks[: len(script.KINDS)]} == {*script.KINDS}
    assert script.tasks("choose") == splits["choose"] != script.tasks("choose", seed=1)


def test_checks_take_the_answer_and_nothing_else(script: Any) -> None:
    for task in script.tasks("choose", count=6):
        asked = question_of(task)
        if isinstance(asked, PythonQuestion):
            continue
        assert isinstance(asked, PatternQuestion)
        text = response(task)
        assert asked.grade(text) and asked.grade(f"{text}\nand more"), task["kind"]
        assert not asked.grade(text.replace(text.strip()[:3], "xyz", 1)) and not asked.grade(""), task["kind"]


def test_a_text_that_goes_on_asks_the_same(script: Any) -> None:
    """Without a chat: the same questions and checks; examples show how an answer ends, and an answer holds no end."""
    for task, other in zip(script.tasks("choose", count=4, chat=False), script.tasks("choose", count=4), strict=True):
        asked = str(other["messages"][-2]["content"]) if "messages" in other else question(other)
        assert asked in task["prompt"] and (task["kind"], task["tokens"]) == (other["kind"], other["tokens"])
        (stop,) = task["stop"]
        before, text = task["prompt"].split(stop)[:-1], task["response"]
        assert len(before) >= script.PLAIN_SHOTS and stop not in text and text.strip() == response(other).strip()
        assert not any(asked in shot for shot in before)
        graded = question_of(task)
        assert graded is not None and graded.grade(text)
        if isinstance(graded, PatternQuestion):  # what it would go on with is cut off before it is graded
            assert not graded.grade(text.replace(text.strip()[:3], "xyz", 1)), task["kind"]


@pytest.mark.parametrize("more", [["--count", "0"], ["--count", "-3"], ["--count", "1000000"]])
def test_what_cannot_be_made_is_refused(script: Any, more: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--out", str(tmp_path / "tasks"), *more])
    assert not list(tmp_path.iterdir())


def test_python_is_run(script: Any) -> None:
    tasks = script.tasks("report", count=20, only=["function"])
    forms = {re.sub(r"\d+", "", task["tests"]): task for task in tasks}
    task = next(iter(forms.values()))
    asked = question_of(task)
    assert asked is not None and asked.grade(response(task)) and asked.grade(f"```python\n{response(task)}\n```\nSo.")
    assert not asked.grade("def f(x):\n    return None")
    for task in tasks:  # the expression gives what the words say: read by another way
        k = int(re.findall(r"\d+", question(task))[0])
        scope: dict[str, Any] = {}
        exec(response(task), scope)
        said = {"the first": lambda x, k=k: [x[i] for i in range(min(k, len(x)))], "the sum": lambda x, k=k: k + sum(x),
                "how often": lambda x, k=k: len([y for y in x if y == k]), "True if": lambda x, k=k: not x <= k,
                "the larger": lambda x, k=k: sorted((x, k))[1], "the remainder": lambda x, k=k: x - x // k * k,
                "the square": lambda x, k=k: k + x * x, "x plus": lambda x, k=k: k + x, "x times": lambda x, k=k: k * x,
                f"{k} minus": lambda x, k=k: -(x - k)}
        words = question(task).split("returns ")[1]
        (value,) = [function for start, function in said.items() if words.startswith(start)]
        given: list[Any] = [[3, 1, 4, 1, 5], [2, 2], []] if "list" in words else [0, 5, 41]
        assert [scope["f"](x) for x in given] == [value(x) for x in given], words


def test_records_and_numbers_are_right(script: Any) -> None:
    for task in script.tasks("report", count=12):
        text, asked = response(task).strip(), question(task)
        if task["kind"] == "sum":
            one, two = map(int, re.findall(r"\d+", asked))
            assert int(text) - two == one
        elif task["kind"] == "product":
            one, two = map(int, re.findall(r"\d+", asked))
            assert divmod(int(text), two) == (one, 0)
        elif task["kind"] == "sequence":
            numbers = [*map(int, re.findall(r"\d+", asked)), int(text)]
            assert len({later - earlier for earlier, later in itertools.pairwise(numbers)}) == 1
        elif task["kind"] == "copy":
            assert asked.endswith(f"\n{text}") and set(json.loads(text)) > {"name", "tags"}
        elif task["kind"] == "to JSON":
            (row,) = csv.reader([asked.splitlines()[1]])
            assert list(map(str, json.loads(text).values())) == row
        elif task["kind"] == "to CSV":
            (row,) = csv.reader([text])
            assert list(map(str, json.loads(asked.splitlines()[1]).values())) == row
        elif task["kind"] == "field":
            record, key = asked.splitlines()[0], asked.split()[-1].rstrip("?")
            assert str(json.loads(record)[key]) == text


def test_words_are_spelt_as_they_should_be(script: Any) -> None:
    assert [script.plural(noun) for noun in ("cat", "box", "church", "city", "toy", "wife", "potato", "piano")] == [
        "cats", "boxes", "churches", "cities", "toys", "wives", "potatoes", "pianos"]
    assert [script.third_person(verb) for verb in ("go", "try", "play", "wash", "see")] == [
        "goes", "tries", "plays", "washes", "sees"]
    assert [script.present_participle(verb) for verb in ("stop", "write", "see", "play", "open", "begin")] == [
        "stopping", "writing", "seeing", "playing", "opening", "beginning"]


def test_files_are_what_evaluation_reads(script: Any, tmp_path: Path) -> None:
    assert script.main(["--out", str(tmp_path), "--count", "2", "--only", "sum", "--only", "copy"]) == 0
    lines = (tmp_path / "report.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["sum", "copy"] * 2
