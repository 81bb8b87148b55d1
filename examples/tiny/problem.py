"""The common shape of one generated problem, and the vocabulary the templates draw from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem: `key` holds what decides the answer (not names or wording), `steps` the worked solution."""

    kind: str
    key: tuple[object, ...]
    prompt: str
    steps: tuple[str, ...]
    answer: str


Generator = Callable[[random.Random], Problem]

PEOPLE: tuple[tuple[str, str], ...] = (
    ("Mia", "she"), ("Noah", "he"), ("Lena", "she"), ("Omar", "he"), ("Ava", "she"), ("Ben", "he"),
    ("Zoe", "she"), ("Ivan", "he"), ("Ruth", "she"), ("Carl", "he"), ("Nina", "she"), ("Tom", "he"),
    ("Ella", "she"), ("Hugo", "he"), ("Sara", "she"), ("Luca", "he"), ("Priya", "she"), ("Kofi", "he"),
)
OBJECTS: tuple[str, ...] = (
    "apples", "books", "coins", "stickers", "marbles", "pencils", "shells", "stamps", "cookies", "cards",
    "oranges", "buttons", "stones", "eggs", "ribbons", "beads", "plums", "tickets", "candles", "flowers",
)
CONTAINERS: tuple[str, ...] = ("bags", "boxes", "baskets", "packs", "jars", "trays")
WORDS: tuple[str, ...] = (
    "red", "fox", "blue", "tree", "cat", "moon", "river", "stone", "bird", "lamp", "green", "cloud", "fish", "road",
    "star", "wind", "leaf", "sand", "ship", "gold", "bear", "rain", "snow", "door", "king", "milk", "salt", "wolf",
    "hat", "cup", "desk", "key", "map", "nest", "owl", "pen", "rope", "sun", "toy", "van", "yard", "zebra", "apple",
    "bread", "chair", "dream", "earth", "flame", "grape", "house", "island", "jam", "lake", "mouse", "night", "ocean",
)
ORDINALS: tuple[str, ...] = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def numbered(lines: Sequence[str]) -> tuple[str, ...]:
    """Put "Step i: " before every line."""
    return tuple(f"Step {index}: {line}" for index, line in enumerate(lines, start=1))


def capital(text: str) -> str:
    """Make the first letter upper case and leave the rest."""
    return text[:1].upper() + text[1:]
