"""A conversion by two ranks that is killed, resumed, interrupted and resumed again, beside one by one process, where
two ranks have their parameters in parts at the beginning and at the end:
`python -m tests.train.ranks.conversions FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import torch

from flarec.errors import FlarecError
from flarec.train.convert import Interrupted, convert
from flarec.train.loop import Trainer
from tests.cli.conversions import write_data
from tests.models import few_checkpoint
from tests.train.ranks.processes import on_ranks
from tests.train.ranks.scenarios import store

STEPS = 6
CHOSEN = [
    "optimizer.lr=1e-3", "optimizer.warmup_steps=0", "optimizer.batch_rows=4", "evaluation.every=2",
    "evaluation.prompts=2", "evaluation.max_new_tokens=8", "save.every=2",
]


def conversion(folder: Path, out: str, *, resume: bool = False, shard: str = "auto") -> Path:
    return convert(
        folder / "qwen3_5_text", folder / "data.jsonl", recipe="dual", out=folder / out, steps=STEPS, max_length=96,
        overrides=[*CHOSEN, f"train.shard={shard}"], device="cpu", resume=resume,
    )


def at_step(step: int, work: Callable[[int], object]) -> AbstractContextManager[object]:
    """Within it `work(rank)` is called where this process is about to take the step behind `step`."""
    advance = Trainer.advance

    def watched(trainer: Trainer) -> object:
        if trainer.step == step:
            work(trainer.ranks.rank)
        return advance(trainer)

    return mock.patch.object(Trainer, "advance", watched)


def pair(
    folder: Path, name: str, step: int, work: Callable[[int], object], *, resume: bool, shard: str = "parameters"
) -> None:
    """Two ranks with `work` at a step; what they leave is noted, and what they raise."""

    def convert_on(rank: int) -> None:
        try:
            with at_step(step, work):
                found: object = str(conversion(folder, "two", resume=resume, shard=shard))
        except FlarecError as error:
            found = (type(error).__name__, str(error))
        except Interrupted as error:
            found = ("Interrupted", error.step, error.exit_code)
        store(folder, f"{name}-{rank}", found)

    codes = on_ranks(convert_on)
    left = sorted(path.relative_to(folder).as_posix() for path in (folder / "two.partial").rglob("*"))
    store(folder, name, (codes, left))


def kill_second(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    few_checkpoint(folder, "qwen3_5_text")
    write_data(folder / "data.jsonl")
    conversion(folder, "one")
    pair(folder, "killed", 3, kill_second, resume=False)
    pair(folder, "interrupted", 2, lambda rank: os.kill(os.getpid(), signal.SIGTERM), resume=True, shard="optimizer")
    pair(folder, "finished", STEPS, lambda rank: None, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
