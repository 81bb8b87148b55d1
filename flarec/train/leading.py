"""One rank conducts the run, the others take the same steps: whatever the first rank's trainer is told to do, all do.

The first rank has OUT, its lock, the training state, the log, the evaluations and the terminal; it decides when a step
is taken, a save is made, and when the run ends. The others hold their part of the optimizer's state and compute their
part of every step.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch

from .loop import Step, Trainer, out_of_memory
from .prepare import Run
from .saves import SavedState

END, ADVANCE, STATE, LOAD, WIDEN, GATHER = range(6)


class LeadingTrainer(Trainer):
    """The trainer of the first of several ranks, which the others `follow`."""

    def advance(self) -> Step:
        self.ranks.instruct(ADVANCE)
        return super().advance()

    def state(self, **values: Any) -> SavedState:
        self.ranks.instruct(STATE)
        return super().state(**values)

    def load(self, state: SavedState | None) -> None:
        self.ranks.instruct(LOAD)
        super().load(state)

    def gather(self) -> None:
        self.ranks.instruct(GATHER)
        super().gather()

    def widen(self) -> None:
        self.ranks.instruct(WIDEN)
        super().widen()


def follow(trainer: Trainer) -> None:
    """Do what the first rank's trainer does, until it ends."""
    with _signals_of_the_first():
        while True:
            told = trainer.ranks.instruct(END)
            if told == END:
                return
            if told == ADVANCE:
                try:
                    trainer.advance()
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(trainer.step) from error
            elif told == STATE:
                trainer.state()
            elif told == LOAD:
                trainer.load(None)
            elif told == GATHER:
                with trainer.whole():
                    pass
            else:
                assert told == WIDEN, told
                trainer.widen()


@contextlib.contextmanager
def _signals_of_the_first() -> Iterator[None]:
    """Ctrl-C and SIGTERM, which a launcher sends to every rank, are the first rank's: it ends the step and saves."""
    try:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which gets no signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_same_run(run: Run) -> None:
    """Raise `UsageError` naming what another rank has read differently: each has opened the model and the data."""
    if run.trainer.ranks.size == 1:
        return
    run.trainer.ranks.check_same({
        "the recipe": run.recipe.to_dict(),
        "the seed": run.options.seed,
        "the implementation of the mixers": run.options.kernels,
        "the precision": run.precision,
        "the data": [source.fingerprint() for source in run.sources],
        "the model": _sums(run),
        "the version of torch": torch.__version__,
    })


@torch.no_grad()
def _sums(run: Run) -> dict[str, int]:
    """By parameter the sum of its bits, as whole numbers: the same in whatever order."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    program = run.trainer.program
    codes = {f"{name}_{part}": value for name, held in program.quantized.items() for part, value in held.parts.items()}
    parameters = program.parameters() | codes
    sums = [value.view(integers[value.dtype.itemsize]).sum(dtype=torch.int64) for value in parameters.values()]
    return dict(zip(parameters, torch.stack(sums).tolist(), strict=True))


def share_text(run: Run) -> str:
    """How a step is split, for the run's user."""
    ranks, rows = run.trainer.ranks, run.recipe.optimizer.batch_rows
    parts = "parameters of decoder layers, " if run.memory.cut else ""
    return (
        f"{ranks.size} ranks: {rows // ranks.size} of the {rows} rows of a step on each, {run.trainer.feed.micro_rows} "
        f"at a time; {parts}masters, gradients and moments in parts; rank 0 evaluates and writes"
    )
