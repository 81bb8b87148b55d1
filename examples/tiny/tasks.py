"""Seeded tasks with checkable answers: word problems, list and string tasks, small Python tasks.

A problem's key (its kind and the numbers or words that decide the answer, not the names or the wording) is hashed, and
the hash alone decides whether it is a training or a test problem. The two are therefore disjoint by construction,
whatever the seeds, and `check_disjoint` confirms it for given records.

    python examples/tiny/tasks.py --split test --count 3
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import tasks_arithmetic
import tasks_lists
import tasks_python
from problem import Generator, Problem

TEST_SHARE = 16  # one key in so many is a test key
PATTERN = "Answer: (.+)"
FAMILIES: dict[str, dict[str, tuple[Generator, int]]] = {
    "arithmetic": tasks_arithmetic.GENERATORS,
    "lists": tasks_lists.GENERATORS,
    "python": tasks_python.GENERATORS,
}
FAMILY_OF = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}
_KINDS = [(generator, weight) for kinds in FAMILIES.values() for generator, weight in kinds.values()]


def key_hash(problem: Problem) -> str:
    """Twelve hex digits that stand for the problem's canonical key."""
    text = json.dumps([problem.kind, problem.key], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_of(key: str) -> str:
    """Whether a hashed key belongs to "train" or "test"."""
    return "test" if int(key, 16) % TEST_SHARE == 0 else "train"


def to_record(problem: Problem, key: str) -> dict[str, Any]:
    """The problem as a chat with its checkable answer."""
    solution = "\n".join((*problem.steps, f"Answer: {problem.answer}"))
    messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": solution}]
    return {"messages": messages, "answer": problem.answer, "pattern": PATTERN, "kind": problem.kind, "key": key}


def stream(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Endless records of one split; the same seed gives the same records."""
    rng = random.Random(f"{split}-{seed}")
    generators, weights = [kind[0] for kind in _KINDS], [kind[1] for kind in _KINDS]
    while True:
        problem = rng.choices(generators, weights)[0](rng)
        key = key_hash(problem)
        if split_of(key) == split:
            yield to_record(problem, key)


def unique(split: str, seed: int, count: int) -> list[dict[str, Any]]:
    """The first `count` records of a stream with no key twice."""
    seen: set[str] = set()
    records = []
    for record in stream(split, seed):
        if record["key"] not in seen:
            seen.add(record["key"])
            records.append(record)
        if len(records) == count:
            break
    return records


def extract(pattern: str, text: str) -> str | None:
    """The last match of the pattern's group, stripped; None without a match."""
    found = re.findall(pattern, text)
    return found[-1].strip() if found else None


def is_correct(record: dict[str, Any], text: str) -> bool:
    """Whether a generated text gives the record's answer."""
    return extract(record["pattern"], text) == record["answer"]


def verify(record: dict[str, Any]) -> None:
    """Check a record against itself: the equations in the solution hold, and its Python code gives the answer."""
    prompt, solution = (message["content"] for message in record["messages"])
    assert is_correct(record, solution), record
    for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)\b(?! [-+*/])", solution):
        assert eval(left) == int(right), (left, right, record)
    if FAMILY_OF[record["kind"]] != "python":
        return
    scope: dict[str, Any] = {}
    if record["kind"] == "write_and_call":
        call = re.findall(r"What does (.+) return", prompt)[0]
        exec(re.findall(r"(?s)```python\n(.+?)\n```", solution)[0], scope)
        assert str(eval(call, scope)) == record["answer"], record
    elif record["kind"] == "write_line":
        exec(record["answer"], scope)
    else:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(re.findall(r"(?s)```python\n(.+?)\n```", prompt)[0], scope)
        assert out.getvalue().strip() == record["answer"], record


def check_disjoint(train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> None:
    """Fail unless every key lies in the split its hash says, and no key or prompt lies in both."""
    train, test = list(train), list(test)
    for name, records in (("train", train), ("test", test)):
        wrong = [record for record in records if split_of(record["key"]) != name]
        if wrong:
            raise ValueError(f"{len(wrong)} {name} records belong to the other split, the first is {wrong[0]}")
    for what in ("key", "prompt"):
        sides = [{r["key"] if what == "key" else r["messages"][0]["content"] for r in side} for side in (train, test)]
        if sides[0] & sides[1]:
            raise ValueError(f"{len(sides[0] & sides[1])} {what}s are in both splits")


def main() -> None:
    """Print some records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    args = parser.parse_args()
    for record in unique(args.split, args.seed, args.count):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
