"""Texts that run in circles: they are easy to draft, so tokens per forward are given without them too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

RUN, TIMES = 8, 3


def loops(tokens: Sequence[int]) -> bool:
    """Whether some run of `RUN` tokens stands `TIMES` times."""
    runs = Counter(tuple(tokens[at : at + RUN]) for at in range(len(tokens) - RUN + 1))
    return bool(runs) and max(runs.values()) >= TIMES
