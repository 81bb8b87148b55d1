"""Tables that keep what was used last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def last_used(table: dict[K, V], key: K, make: Callable[[], V], most: int | None) -> V:
    """What is in a table under a key, or is made now and put there; no value is None.

    Of the others those that were used last stay, `most` with this one; None: all of them.
    """
    found = table.pop(key, None)
    if found is None:
        if most is not None and len(table) >= most:
            del table[next(iter(table))]
        found = make()
    table[key] = found
    return found
