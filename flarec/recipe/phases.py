"""Values that hold for a part of a run: `value:fraction` texts, each up to that fraction of the optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..base.fields import shown
from ..errors import RecipeError

T = TypeVar("T")


def phases(path: str, texts: Sequence[str], read: Callable[[str], T]) -> list[tuple[T, float]]:
    """(value, fraction) of every text. Raises `RecipeError` naming `path` for a text that cannot be read, and for
    fractions that do not rise between 0 and 1."""
    found: list[tuple[T, float]] = []
    for text in texts:
        value, colon, end = text.partition(":")
        try:
            fraction = float(end)
        except ValueError:
            fraction = 0.0
        if not colon or not (found[-1][1] if found else 0.0) < fraction < 1:
            raise RecipeError(
                f"{path} holds {shown(text)}; write VALUE:FRACTION with fractions that rise between 0 and 1"
            )
        found.append((read(value.strip()), fraction))
    return found


def value_at(found: Sequence[tuple[T, float]], last: T, step: int, steps: int) -> T:
    """The value of optimizer step `step`, counted from 0, of `steps`; `last` behind all phases."""
    return next((value for value, fraction in found if step / steps < fraction), last)
