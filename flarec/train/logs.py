"""What a run tells a Python program: the logger `flarec`, and a callable for those who draw their own bars."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from .pace import in_words
from .progress import Reporter, describe_evaluation, describe_losses

ProgressCallback = Callable[[str, Mapping[str, Any]], object]
"""Called with what happens ("note", "warning", "working", "begin", "step", "evaluation", "answers", "stopping", "end")
and its values."""


class LoggingReporter(Reporter):
    """Notes, steps and evaluations as INFO of the logger `flarec`, advice as WARNING. progress: see `ProgressCallback`;
    what it raises ends the run."""

    def __init__(self, progress: ProgressCallback | None = None) -> None:
        self.logger = logging.getLogger("flarec")
        self.progress = progress
        self._end = 0

    def _tell(self, event: str, **values: Any) -> None:
        if self.progress is not None:
            self.progress(event, values)

    def note(self, text: str) -> None:
        self.logger.info("%s", text)
        self._tell("note", text=text)

    def warn(self, text: str) -> None:
        self.logger.warning("%s", text)
        self._tell("warning", text=text)

    def working(self, text: str, done: int = 0, total: int = 0) -> None:
        if not done:
            self.logger.info("%s", text)
        self._tell("working", text=text, done=done, total=total)

    def begin(self, done: int, steps: int) -> None:
        self._end = steps
        self._tell("begin", done=done, total=steps)

    def step(self, values: Mapping[str, Any]) -> None:
        left = values.get("seconds_left")
        self.logger.info(
            "step %d of %d: %s  %.0f tok/s%s", values["step"], self._end, describe_losses(values),
            values["tokens_per_second"], "" if left is None else f", {in_words(left)} left",
        )
        self._tell("step", total=self._end, **values)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        self.logger.info("held-out at step %d: %s", step, describe_evaluation(values))
        self._tell("evaluation", step=step, **values)

    def answers(self, done: int, total: int, text: str) -> None:
        self.logger.info("answer %d of %d: %s", done, total, text)
        self._tell("answers", done=done, total=total, text=text)

    def stopping(self, text: str) -> None:
        self.logger.warning("%s", text)
        self._tell("stopping", text=text)

    def end(self) -> None:
        self._tell("end")
