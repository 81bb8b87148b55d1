"""What a run is: what decides its result, with which a resumed run must agree, and the number of its steps, which may
change at a save."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.files import check_name
from ..base.lock import check_free
from ..checkpoint.directory import describe_source
from ..checkpoint.manifest import Manifest
from ..checkpoint.own import is_own
from ..errors import CheckpointError, UsageError
from ..recipe import Recipe
from .feed import micro_rows_of
from .options import Options
from .prepare import Run
from .state import MICRO_ROWS, StateDirectory

Horizons = list[tuple[int, int]]
"""(first step, counted from 0, that a number of steps holds for; that number), in order."""
FREE = (("train", "shard"), ("save", "background"))
"""Keys of a recipe that may differ in a run that goes on: what each rank keeps, and when a save is written, changes no
bit."""


def identity_of(run: Run) -> dict[str, Any]:
    """What decides the result: a resumed run must agree with it, the number of steps apart."""
    source, rows = describe_source(run.options.location), run.memory.micro_rows
    lowered = rows != micro_rows_of(run.recipe, run.trainer.ranks.size)
    return {
        "recipe": run.recipe.to_dict(),
        "seed": run.options.seed,
        "kernels": run.options.kernels,
        "precision": run.precision,
        "adapter_only": run.options.adapter_only,
        "source": {"name": source.name, "sha256": source.sha256},
        "data": {
            f"{number}: {Path(source.stats.source).name}": source.fingerprint()
            for number, source in enumerate(run.sources, 1)
        },
        **({MICRO_ROWS: rows} if lowered else {}),
    }


def name_of(identity: Mapping[str, Any], written_at: int | None = None) -> str:
    """How the manifest names the run that made a checkpoint, whatever the keys of `FREE` are.

    written_at: the step of one that was written early.
    """
    early = {} if written_at is None else {"written_at": written_at}
    named = {**identity, "recipe": _without_free_keys(identity.get("recipe")), **early}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _without_free_keys(recipe: Any) -> Any:
    if not isinstance(recipe, dict):
        return recipe
    return {
        section: {key: value for key, value in table.items() if (section, key) not in FREE}
        if isinstance(table, dict) else table
        for section, table in recipe.items()
    }


def with_steps(identity: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The identity of the same run with another number of steps."""
    changed = copy.deepcopy(dict(identity))
    changed["recipe"]["optimizer"]["steps"] = steps
    return changed


def steps_of(identity: Mapping[str, Any]) -> int:
    """The number of steps in an identity. Raises `CheckpointError` if it states none."""
    try:
        steps = identity["recipe"]["optimizer"]["steps"]
    except (KeyError, TypeError):
        steps = None
    if type(steps) is not int or steps < 1:
        raise CheckpointError("the run's record states no number of steps; start again with --overwrite")
    return steps


def check_resumable(options: Options, recipe: Recipe) -> None:
    """What small files tell about a run that is to be continued, before anything slow is done. Raises `UsageError`."""
    check_name(options.output)
    after, steps, directory = options.stop_after, recipe.optimizer.steps, options.state_directory
    if after is not None and after >= steps:
        raise UsageError(f"--stop-after {after} is not before the last step, {steps}; leave it out, or give less")
    if not options.resume:
        return
    check_free(options.output)
    if not directory.in_use:
        _check_not_complete(options, steps)
        return
    known = {"recipe": recipe.to_dict(), "seed": options.seed, "adapter_only": options.adapter_only}
    check_identity(directory, {**directory.identity, **known}, steps_free=options.steps is not None)
    saved = directory.saved_step or 0
    if saved > steps:
        raise UsageError(
            f"step {saved} is saved, so the run cannot end at step {steps}; give --steps {saved} or more "
            f"(--steps {saved} writes the checkpoint now)"
        )
    if after is not None and saved >= after:
        raise UsageError(f"step {saved} is saved already; give --stop-after a later step")


def _check_not_complete(options: Options, steps: int) -> None:
    """Say that a run which ended cannot get more steps."""
    out = options.output
    if options.steps is None or not is_own(out):
        return
    manifest = Manifest.read(out)
    stated = manifest.recipe.get("optimizer", {}).get("steps") if manifest is not None else None
    if stated not in (None, steps):
        raise UsageError(
            f"{out} is complete with {stated} steps, and the training state of its run is gone: it cannot have "
            f"{steps}; train again with --overwrite, without --resume"
        )


def check_identity(
    directory: StateDirectory, identity: Mapping[str, Any], *, steps_free: bool = False, written_only: bool = False
) -> None:
    """Raise `CheckpointError` naming what differs from the run in `directory`.

    steps_free: the number of steps may differ. written_only: the run is not continued; what computes it may differ.
    """
    stored, now = directory.identity, dict(identity)
    if steps_free:
        now = with_steps(now, steps_of(stored))
    if written_only:
        now |= {key: stored.get(key) for key in ("kernels", "precision")}
    now["recipe"] = _known(_with_free_keys_of(stored, now["recipe"]), stored.get("recipe"), Recipe().to_dict())
    directory.check_identity(now)


def _with_free_keys_of(stored: Mapping[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the record's values of `FREE`."""
    found = dict(recipe)
    for section, name in FREE:
        before = (stored.get("recipe") or {}).get(section)
        if isinstance(before, dict):
            table = {key: value for key, value in found[section].items() if key != name}
            found[section] = table | ({name: before[name]} if name in before else {})
    return found


def _known(now: Any, stored: Any, default: Any) -> Any:
    """A recipe without the keys that are younger than the record and have their default."""
    if not all(isinstance(table, dict) for table in (now, stored, default)):
        return now
    kept = {name: value for name, value in now.items() if name in stored or value != default.get(name)}
    return {name: _known(value, stored.get(name), default.get(name)) for name, value in kept.items()}


def continued(horizons: Sequence[Sequence[int]], step: int, steps: int) -> Horizons:
    """The horizons of a run that goes on behind `step` with this number of steps."""
    kept: Horizons = [(first, count) for first, count in horizons if first < step]
    return kept if kept and kept[-1][1] == steps else [*kept, (step, steps)]
