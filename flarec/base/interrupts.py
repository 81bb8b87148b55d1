"""Ctrl-C, and a scheduler's notice (SIGTERM), during work that must not lose them or ends its step first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Ctrl-C within the context.

    It raises `KeyboardInterrupt` where it arrives, and `check` raises it again. Where it arrives can be code of a
    library that lets no exception through (a destructor, a callback from C): the interrupt would be lost there, and the
    work would go on.

    finish_step: the first one, or SIGTERM, only sets `requested`, and the loop stops when its running step is done; a
    second Ctrl-C stops at once, while schedulers may send SIGTERM more than once. `signal` is the first one's number,
    and `told` is called when it comes.
    A thread other than the main one gets no signals: there `requested` stays False.
    """

    def __init__(self, *, finish_step: bool = False, told: Callable[[], object] = lambda: None) -> None:
        self.told = told
        self.requested = False
        self.signal = int(signal.SIGINT)
        self.finish_step = finish_step
        self._main = threading.current_thread() is threading.main_thread()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if self._main:
            taken = [signal.SIGINT]
            if self.finish_step and signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
                taken.append(signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._handle) for number in taken}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if first:
            self.signal = number
            if self.finish_step:
                self.told()
        if not self.finish_step or (number == signal.SIGINT and not first):
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C came."""
        if self.requested:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None and not self.finish_step:  # a loop that finishes its step has seen to it
            self.check()
