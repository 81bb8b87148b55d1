"""What two ranks and one compute from the same start: `python -m tests.train.ranks.scenarios FOLDER`.

Each line of `CASES` is trained by one process and by two, and their results are saved for the tests to compare.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flarec.errors import DataError, FlarecError
from flarec.passes import lower
from flarec.recipe import Recipe
from flarec.train import sharding
from flarec.train.gathering import GatheredWeights
from flarec.train.loop import Trainer
from flarec.train.ranks.group import Ranks, joined
from flarec.train.sharding import ShardedWeights
from flarec.train.state import StateDirectory
from tests.models import tiny_tokenizer
from tests.train.ranks.processes import on_ranks
from tests.train.small_run import Small, adapter_recipe, recipe

STEPS, SAVED = 3, 1
FOUR = ["optimizer.batch_rows=4", f"optimizer.steps={STEPS}"]
CASES = {
    "flare": recipe("flare", *FOUR, "train.memory=recompute"),
    "draft": recipe("draft", *FOUR, "optimizer.micro_rows=4"),
    "adapter": adapter_recipe(*FOUR, "optimizer.micro_rows=2"),
    "codes": recipe("draft", *FOUR, "optimizer.moments=8bit"),
}

RESUMED = ("flare", "adapter", "codes")
SHARD = "train.shard=parameters"
CUT = {
    "flare-cut": ("flare", CASES["flare"].override([SHARD])),
    "adapter-cut": ("adapter", CASES["adapter"].override([SHARD])),
    "codes-cut": ("codes", CASES["codes"].override([SHARD])),
    "dense": ("dense", recipe("draft", *FOUR, "optimizer.micro_rows=2")),
    "dense-cut": ("dense", recipe("draft", *FOUR, "optimizer.micro_rows=2", SHARD)),
}
"""On two ranks alone: the set-up, and its recipe with parameters that are cut as well (of `dense` without, too)."""


def set_ups() -> dict[str, Small]:
    """By case; a model with experts, captured once. Without `adapt-noisy-stream` its adapter gets no gradient."""
    adapter = Small("qwen3_5_moe_text", "vector", torch.float64, CASES["adapter"])
    whole = copy.copy(adapter)
    whole.program = lower(adapter.captured, "train", mask_vector=True)
    dense, codes = Small("qwen3_5_text", dtype=torch.bfloat16), Small("qwen3_5_text")
    return {"flare": whole, "draft": whole, "adapter": adapter, "dense": dense, "codes": codes}


def results(trainer: Trainer, log: list[dict[str, Any]]) -> dict[str, Any]:
    """All that training has made, whole tensors on the first rank; "bytes": what this rank holds between two steps."""
    state, every = trainer.state(), trainer.program.parameters()
    held = bytes_of(trainer) if trainer.ranks.size > 1 else {}
    with trainer.whole():
        there = trainer.parameters if trainer.ranks.first or not isinstance(trainer.weights, GatheredWeights) else {}
        computed = {name: value.detach().clone() for name, value in there.items()}
        assert all(value.untyped_storage().nbytes() for value in every.values()) or not there
    return {"log": log, "model": state.model, "optimizer": state.optimizer, "computed": computed, "bytes": held}


def bytes_of(trainer: Trainer) -> dict[str, int]:
    """whole: of all parameters, as their shapes say; there: in memory; frozen: parts of those that are not trained;
    beside: masters, gradients, moments and what sums and gathering need; stated: what the trainer says of all."""
    every, weights = trainer.program.parameters().values(), trainer.weights
    assert isinstance(weights, ShardedWeights)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    own = [tensor for bucket in weights.buckets for tensor in (bucket.master, bucket.grad)]
    parts = [part for _, part in weights.parts] if isinstance(weights, GatheredWeights) else []
    spaces = [*weights._spaces, *([weights.space] if isinstance(weights, GatheredWeights) else [])]
    return {
        "whole": sum(value.nbytes for value in every),
        "there": sum(value.untyped_storage().nbytes() for value in every),
        "frozen": sum(part.nbytes for part in parts),
        "beside": sum(value.nbytes for value in (*moments, *own, *spaces)),
        "stated": trainer.weight_bytes,
    }


def train(trainer: Trainer, steps: int) -> list[dict[str, Any]]:
    return [trainer.advance().read(tiny_tokenizer()) for _ in range(steps)]


def save(trainer: Trainer, folder: Path) -> None:
    state = trainer.state()
    if trainer.ranks.first:
        directory = StateDirectory(folder)
        if not directory.in_use:
            directory.create({})
        directory.save(trainer.step, state)


def load(trainer: Trainer, folder: Path) -> None:
    trainer.load(StateDirectory(folder).latest() if trainer.ranks.first else None)


def whole(set_up: Small, chosen: Recipe, ranks: Ranks | None, folder: Path) -> dict[str, Any]:
    """All steps; what the first one leaves is saved."""
    trainer = set_up.trainer(chosen, ranks=ranks)
    log = train(trainer, SAVED)
    save(trainer, folder)
    return results(trainer, log + train(trainer, STEPS - SAVED))


def continued(set_up: Small, chosen: Recipe, ranks: Ranks | None, folder: Path, steps: int) -> tuple[Trainer, Any]:
    """`steps` more from a save, for a trainer that starts with other numbers."""
    trainer = set_up.trainer(chosen, ranks=ranks)
    with torch.no_grad():
        for value in trainer.parameters.values():
            value.fill_(7.0)
    load(trainer, folder)
    return trainer, train(trainer, steps)


def first_pair(made: Mapping[str, Small], folder: Path) -> None:
    """Every case on two ranks, some from their own save once more."""
    with joined("cpu") as ranks:
        for name, chosen in CASES.items():
            store(folder, f"{name}-two-{ranks.rank}", whole(made[name], chosen, ranks, folder / f"{name}-two"))
            if name in RESUMED:
                trainer, log = continued(made[name], chosen, ranks, folder / f"{name}-two", STEPS - SAVED)
                store(folder, f"{name}-again-{ranks.rank}", results(trainer, log))
        for name, (base, chosen) in CUT.items():
            store(folder, f"{name}-two-{ranks.rank}", whole(made[base], chosen, ranks, folder / f"{name}-two"))
            if base in RESUMED:  # from the save of the other way, there and back
                other = {f"{base}-two": chosen, f"{name}-two": CASES[base]}
                for place, then in other.items():
                    trainer, log = continued(made[base], then, ranks, folder / place, STEPS - SAVED)
                    store(folder, f"{place}-other-{ranks.rank}", results(trainer, log))


def second_pair(made: Mapping[str, Small], folder: Path) -> None:
    """The last step, from what one process made of the save of two."""
    with joined("cpu") as ranks:
        for name in RESUMED:
            trainer, log = continued(made[name], CASES[name], ranks, folder / f"{name}-mixed", 1)
            store(folder, f"{name}-mixed-{ranks.rank}", results(trainer, log))


def failing(made: Mapping[str, Small], folder: Path, name: str) -> Sequence[int]:
    """Two ranks, of which one comes to a bad end in its second step; what each raised is saved."""

    def work(rank: int) -> None:
        try:
            with joined("cpu") as ranks:
                chosen = CASES["draft"].override([SHARD] if name in WITH_CUT else [])
                trainer = made["draft"].trainer(chosen, ranks=ranks)
                train(trainer, 1)
                FAILURES[name](trainer)
                train(trainer, 1)
        except FlarecError as error:
            store(folder, f"{name}-{rank}", (type(error).__name__, str(error)))

    return on_ranks(work)


def stop_second(trainer: Trainer) -> None:
    if trainer.ranks.rank == 1:
        raise DataError("record 7 cannot be read")


def spoil_second(trainer: Trainer) -> None:
    """On the second rank alone, whose rows then have no finite loss."""
    if trainer.ranks.rank == 1:
        with torch.no_grad():
            next(iter(trainer.parameters.values())).fill_(float("nan"))


def kill(rank: int) -> Callable[[Trainer], None]:
    def work(trainer: Trainer) -> None:
        if trainer.ranks.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    return work


FAILURES: dict[str, Callable[[Trainer], None]] = {
    "error": stop_second,
    "broken": spoil_second,
    "killed": kill(1),
    "first-killed": kill(0),
}
WITH_CUT = ("broken", "killed")
"""Failures of ranks that have their parameters in parts."""


def store(folder: Path, name: str, values: object) -> None:
    torch.save(values, folder / f"{name}.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sharding.BUCKET_ELEMENTS = 10_007  # many buckets, none of which ends where a parameter does
    made, codes = set_ups(), {}
    for name, chosen in CASES.items():
        store(folder, f"{name}-one", whole(made[name], chosen, None, folder / f"{name}-one"))
    codes["first"] = on_ranks(lambda rank: first_pair(made, folder))
    for name in RESUMED:
        trainer, _ = continued(made[name], CASES[name], None, folder / f"{name}-two", 1)
        save(trainer, folder / f"{name}-mixed")
    codes["second"] = on_ranks(lambda rank: second_pair(made, folder))
    for name in FAILURES:
        codes[name] = failing(made, folder, name)
    store(folder, "codes", codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
