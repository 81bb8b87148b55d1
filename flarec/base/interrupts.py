"""Ctrl-C during work that must not lose it, or that ends its running step first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """Ctrl-C within the context.

    It raises `KeyboardInterrupt` where it arrives, and `check` raises it again. Where it arrives can be code of a
    library that lets no exception through (a destructor, a callback from C): the interrupt would be lost there, and the
    work would go on.

    finish_step: the first one only sets `requested`, and the loop stops when its running step is done; a second one
    stops at once. A thread other than the main one gets no signals: there `requested` stays False.
    """

    def __init__(self, *, finish_step: bool = False) -> None:
        self.requested = False
        self.finish_step = finish_step
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupts:
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if not (self.finish_step and first):
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C came."""
        if self.requested:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._previous)
        if kind is None and not self.finish_step:  # a loop that finishes its step has seen to it
            self.check()
