"""Crash points: every call of the file system of a piece of work, to stop there, or to fail there."""

from __future__ import annotations

import errno
import io
import itertools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "write", "open", "chmod")
FAILURES = [(errno.ENOSPC, True), (errno.EIO, False), (errno.EINTR, False)]
"""(what a call says, whether all later calls say so too)."""


class Watch:
    """Calls of `os`, `io.open` and further functions (module, name), counted within the context; `at` gets the number
    of each right before it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: Callable[[int], object], *further: tuple[ModuleType, str]
    ) -> None:
        self.count, self.at, self.on = 0, at, False
        places: list[tuple[Any, str]] = [*((os, name) for name in CALLS), (io, "open"), *further]
        for owner, name in places:
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **options: Any) -> Any:
            if self.on:
                self.on, self.count = False, self.count + 1
                try:
                    self.at(self.count - 1)
                finally:
                    self.on = True
            return call(*args, **options)

        return watching

    def __enter__(self) -> Watch:
        self.on = True
        return self

    def __exit__(self, *_: object) -> None:
        self.on = False


def failing(
    monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool, *further: tuple[ModuleType, str]
) -> Iterator[Watch]:
    """One watch after the other, whose first, second, ... call fails, until there are no more calls."""
    for number in itertools.count():

        def fail(call: int, at: int = number) -> None:
            if call == at or (lasting and call > at):
                raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            watch = Watch(patch, fail, *further)
            yield watch
        if watch.count <= number:
            assert number > 5, "nothing was watched"
            return
