"""Ctrl-C during a command."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """Within the context Ctrl-C raises `KeyboardInterrupt` where it arrives, and `check` raises it again.

    Where it arrives can be code of a library that lets no exception through (a destructor, a callback from C): the
    interrupt would be lost there, and the command would go on.
    """

    def __init__(self) -> None:
        self._came = False
        self._main = threading.current_thread() is threading.main_thread()  # others cannot handle signals

    def __enter__(self) -> Interrupts:
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C came and was lost."""
        if self._came:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._previous)
        if kind is None:
            self.check()
