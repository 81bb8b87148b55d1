"""A command in a process of its own, for tests of signals and exit codes: a child of this one, which has imported what
commands need (a process that starts from nothing takes seconds for that; `tests/cli/test_generate.py` has such ones).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from flarec.cli import main


class Command:
    """`flarec WORDS...` in a child, in a session of its own, so that a signal for this group does not reach it.

    watch: called in the child before the command begins. errors: the file that standard error goes into.
    """

    def __init__(self, words: list[str], errors: Path, watch: Callable[[], None]) -> None:
        self.errors = errors
        self.child = os.fork()
        if not self.child:
            self._run(words, watch)

    def _run(self, words: list[str], watch: Callable[[], None]) -> None:
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process that a shell starts
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            watch()
            main.main(words, prog_name="flarec")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> tuple[int, str]:
        """Waits for the end: the exit code, negative for a signal, and standard error."""
        _, status = os.waitpid(self.child, 0)
        self.child = 0
        return os.waitstatus_to_exitcode(status), self.errors.read_text(encoding="utf-8")

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        if self.child:  # the test was stopped
            os.kill(self.child, signal.SIGKILL)
            self.ended()
