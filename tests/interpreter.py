"""Triton's interpreter without what it does again and again: it runs most of the kernels' tests."""

from __future__ import annotations

from typing import Any


def replace_language_once() -> None:
    """A call of a device function replaces what its module sees of `triton.language`, a quarter of the tests' time.

    Within a launch that is now done once for each module: the replacements last until the launch ends.
    """
    from triton.runtime import interpreter

    launcher, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    launch, called = launcher.__call__, function.__call__
    running: list[set[int]] = []

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        running.append({id(self.fn.__globals__)})
        try:
            launch(self, *args, **kwargs)
        finally:
            running.pop()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if not running or module not in running[-1]:
            if running:
                running[-1].add(module)
            return called(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    launcher.__call__, function.__call__ = launched, call
