"""How much Python runs: the number of function calls, the same on a busy machine as on an idle one."""

from __future__ import annotations

import cProfile
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class CallCounter:
    """Counts the calls of Python functions within its contexts, in this thread; `paused` wraps what does not count."""

    def __init__(self) -> None:
        self._profile = cProfile.Profile(timer=int, timeunit=1.0, builtins=False)  # a timer that stands still

    def __enter__(self) -> CallCounter:
        self._profile.enable()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.disable()

    @property
    def calls(self) -> int:
        return sum(entry.callcount for entry in self._profile.getstats())

    def paused(self, function: Callable[..., Result]) -> Callable[..., Result]:
        def uncounted(*args: object, **kwargs: object) -> Result:
            self._profile.disable()
            try:
                return function(*args, **kwargs)
            finally:
                self._profile.enable()

        return uncounted


def calls_of(function: Callable[..., object], *args: object) -> int:
    """The number of Python functions called by `function(*args)`."""
    with CallCounter() as counter:
        function(*args)
    return counter.calls
