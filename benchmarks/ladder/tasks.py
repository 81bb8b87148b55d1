"""Structured tasks with exact answers: JSON records, closing brackets, long additions."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable

WORDS = (
    "amber", "birch", "cedar", "delta", "ember", "flint", "grove", "hazel", "ivory", "jasper", "karma", "lemon",
    "maple", "north", "ocean", "pearl", "quartz", "river", "stone", "tulip", "ultra", "violet", "willow",
    "xenon", "yellow", "zebra",
)
FIELDS = ("name", "city", "age", "size", "color", "price", "code", "team", "tags", "year", "state", "level")
PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
SPLITS = {"train": 90, "choose": 5, "report": 5}
"""Per cent of all prompts, by their hash: no prompt is in two splits."""


def json_record(draw: random.Random) -> tuple[str, str]:
    """Fields as text, and the JSON of them."""
    record: dict[str, object] = {}
    for field in draw.sample(FIELDS, draw.randint(3, 6)):
        kind = draw.randrange(3)
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 3))]
        record[field] = draw.randint(0, 999) if kind == 0 else words if kind == 1 else words[0]
    said = "; ".join(
        f"{key} = {', '.join(map(str, value))}" if isinstance(value, list) else f"{key} = {value}"
        for key, value in record.items()
    )
    return f"record: {said}\njson: ", json.dumps(record)


def brackets(draw: random.Random) -> tuple[str, str]:
    """Open brackets, and those that close them."""
    opened = [draw.choice([*PAIRS]) for _ in range(draw.randint(8, 20))]
    return f"open: {''.join(opened)}\nclose: ", "".join(PAIRS[one] for one in reversed(opened))


def addition(draw: random.Random) -> tuple[str, str]:
    """Two long numbers, and the digits of their sum from the right."""
    digits = draw.randint(8, 14)
    one, other = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    return f"add: {one} + {other}\nfrom the right: ", str(one + other)[::-1]


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "json": json_record, "brackets": brackets, "addition": addition,
}


def split_of(prompt: str) -> str:
    """The split of a prompt."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % 100
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("shares are of 100")


def draw_tasks(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` records (prompt, response, kind) of a split, the kinds in turn."""
    draw, names, seen, found = random.Random(seed), [*KINDS], set[str](), list[dict[str, str]]()
    while len(found) < count:
        kind = names[len(found) % len(names)]
        prompt, response = KINDS[kind](draw)
        if split_of(prompt) == split and prompt not in seen:
            seen.add(prompt)
            found.append({"prompt": prompt, "response": response, "kind": kind})
    return found
