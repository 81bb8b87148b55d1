"""What a run tells its user while it works. The base class is silent; the command line uses `ConsoleReporter`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
)

from .pace import in_words
from .router import describe as describe_router

PLAIN_SECONDS = 10.0
"""Seconds between lines of progress where the output is no terminal."""


class Reporter:
    """Receives notes, steps and evaluations; does nothing with them. One of your own overrides what it wants."""

    def note(self, text: str) -> None:
        """One line about what happens now."""

    def warn(self, text: str) -> None:
        """One line about what is allowed and rarely wanted."""
        self.note(f"note: {text}")

    def begin(self, done: int, steps: int) -> None:
        """Training starts, with `done` of `steps` steps done before."""

    def working(self, text: str, done: int = 0, total: int = 0) -> None:
        """Something beside the steps: it begins (`done` is 0), or `done` of `total` parts of it are done."""

    def step(self, values: Mapping[str, Any]) -> None:
        """A step's line of the log; `seconds_left` beside it is an estimate, None at first."""

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """A held-out evaluation."""

    def answers(self, done: int, total: int, text: str) -> None:
        """`done` of `total` answers of the source are written."""

    def stopping(self, text: str) -> None:
        """Ctrl-C or SIGTERM came; `text` says what happens now. Called from a signal handler: it must be short."""

    def end(self) -> None:
        """Training is over, for whatever reason."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class ConsoleReporter(Reporter):
    """Notes and a progress bar on stderr; plain lines every few seconds where stderr is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._last = 0.0

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more, or the log's disk is full: the run goes on
            self.console.print(text, markup=False)

    def begin(self, done: int, steps: int) -> None:
        self._steps = steps
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            BarColumn(bar_width=12),  # the line fits into 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self._task = self._progress.add_task("", total=steps, completed=done, text="")
        self._progress.start()

    def working(self, text: str, done: int = 0, total: int = 0) -> None:
        if done:
            text = f"{text}: {done} of {total}"
        if self._progress is not None:
            self._progress.update(self._task, text=text)
        elif not done or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.note(text)

    def step(self, values: Mapping[str, Any]) -> None:
        text = f"{describe_losses(values)}  {values['tokens_per_second']:,.0f} tok/s"
        left = values.get("seconds_left")
        text += "" if left is None else f", {in_words(left)} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=values["step"], text=text)
        elif time.monotonic() - self._last >= PLAIN_SECONDS or values["step"] == self._steps:
            self._last = time.monotonic()
            router = f", {describe_router(values['router'])}" if "router" in values else ""
            self.note(f"step {values['step']} of {self._steps}: {text}{router}")

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        self.note(f"held-out at step {step}: {describe_evaluation(values)}")

    def answers(self, done: int, total: int, text: str) -> None:
        if self._progress is None and self.console.is_terminal:
            self.begin(done, total)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, text=text)
        elif time.monotonic() - self._last >= PLAIN_SECONDS or done == total:
            self._last = time.monotonic()
            self.note(f"answer {done:,} of {total:,}: {text}")

    def stopping(self, text: str) -> None:
        try:
            self.console.print(text, markup=False)
        except RuntimeError:  # the signal came while a line was being written
            with contextlib.suppress(OSError):
                os.write(2, f"{text}\n".encode())
        except OSError:
            pass

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe_losses(values: Mapping[str, Any]) -> str:
    """Losses of a step, that of noisy blocks with its name: `el` is negative (docs/semantics.md section 3)."""
    learned = "+".join(values.get("diffusion_losses", ()))
    return f"ar {values['ar_loss']:.3f}  diffusion{f' ({learned})' if learned else ''} {values['diffusion_loss']:.3f}"


def describe_evaluation(values: Mapping[str, Any]) -> str:
    """One line: tokens per forward, all-masked accuracy and 1 - TV per slot, expected accepted length, AR loss."""

    def per_slot(numbers: Sequence[float | None]) -> str:
        return " ".join("-" if number is None else f"{number:.2f}" for number in numbers)

    length = values["expected_accepted"]
    return (
        f"{values['tokens_per_forward']:.2f} tokens per forward, all-masked accuracy "
        f"{per_slot(values['all_masked_accuracy'])}, 1-TV {per_slot(values['one_minus_tv'])}, "
        f"{per_slot([length])} drafts expected to be accepted, AR loss {values['ar_loss']:.3f}"
    )
