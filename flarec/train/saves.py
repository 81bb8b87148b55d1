"""A save of the training state: a folder whose files are listed with size and hash, so that no damage is trained on.

    model.safetensors, optimizer.safetensors, state.json    what `SavedState` holds
    files.json                                              every file of the folder but itself
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.fields import LARGEST
from ..base.hashes import FileEntry
from ..errors import CheckpointError, first_line
from .moments import STEP, kinds
from .progress import describe_evaluation
from .router import describe as describe_router

MODEL, OPTIMIZER, STATE, FILES = "model.safetensors", "optimizer.safetensors", "state.json", "files.json"
_NO_LOAD: dict[str, Any] = {"max_over_mean": [], "entropy": []}


@dataclass(frozen=True)
class SavedState:
    """Parameters and optimizer tensors by name, and plain values (step, data position, counters)."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    values: dict[str, Any]


def write_save(folder: Path, state: SavedState, between: Callable[[], object] = lambda: None) -> None:
    """Fill an empty folder. between: called before each file; what it raises ends the writing. Raises `OSError` and
    `SafetensorError`."""
    for name, tensors in ((MODEL, state.model), (OPTIMIZER, state.optimizer)):
        between()
        host = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(host, folder / name)
    (folder / STATE).write_text(json.dumps(state.values), encoding="utf-8")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    table = {}
    for name in names:
        between()
        table[name] = asdict(FileEntry.of(folder / name))
    (folder / FILES).write_text(json.dumps(table, indent=1), encoding="utf-8")


def read_save(folder: Path, step: int) -> SavedState:
    """What `write_save` was given for `step`, once every file was compared with its hash.

    Raises `CheckpointError` naming the first file that is not as it was written.
    """
    try:
        for name, entry in _listed(folder).items():
            if difference := entry.difference(folder / name):
                raise CheckpointError(f"{folder / name} {difference}")
        state = SavedState(load_file(folder / MODEL), load_file(folder / OPTIMIZER), _table(folder / STATE))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({first_line(error)})") from error
    stated = state.values.get("step")
    if type(stated) is not int or stated != step:
        raise CheckpointError(f"{folder / STATE} states an impossible step, where {step} was saved")
    return state


def check_tensors(state: SavedState, masters: Mapping[str, Tensor], coded: Collection[str] = ()) -> None:
    """Raise `CheckpointError` for tensors that are not these parameters' (shapes and dtypes) and AdamW's for them.

    coded: names of those whose moments are codes.
    """

    def kind_of(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.shape, tensor.dtype

    expected = {name: kind_of(master) for name, master in masters.items()}
    fits = expected == {name: kind_of(tensor) for name, tensor in state.model.items()}
    moved = {key.rpartition(".")[0] for key in state.optimizer}
    found = {key: kind_of(tensor) for key, tensor in state.optimizer.items()}
    moments: dict[str, tuple[Any, ...]] = {}
    for name in moved & expected.keys():
        moments[f"{name}.{STEP}"] = (torch.Size(()), torch.float32)
        for moment, kind in kinds(masters[name].dtype, name in coded).items():
            moments[f"{name}.{moment}"] = (kind.shape(masters[name]), kind.dtype)
    if not fits or found != moments:
        raise CheckpointError("the training state belongs to another model; start again with --overwrite")


def check_values(values: Mapping[str, Any], steps: int) -> None:
    """Raise `CheckpointError` for a step, counters or measurements that a run of so many steps cannot have saved."""
    step, totals, last = values.get("step"), values.get("totals"), values.get("last")
    evaluations = values.get("evaluations")
    possible = (
        isinstance(step, int)
        and _is_count(step, steps)
        and isinstance(totals, dict)
        and totals.keys() == {"clean_tokens", "noisy_tokens"}
        and all(_is_count(total, LARGEST) for total in totals.values())
        and isinstance(evaluations, dict)
        and all(re.fullmatch("[0-9]{1,18}", at) and int(at) <= step for at in evaluations)
    )
    try:  # measurements are what those who show them can read
        for measured in evaluations.values() if possible and isinstance(evaluations, dict) else ():
            describe_evaluation(measured)
        if possible and step:
            assert isinstance(last, dict)
            possible = all(isinstance(last[name], (int, float)) for name in ("ar_loss", "diffusion_loss"))
            describe_router(last.get("router", {"clean": _NO_LOAD, "noisy": _NO_LOAD}))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        possible = False
    if not possible:
        raise CheckpointError(
            "the training state holds a step, counters or measurements that this run cannot have; start again with "
            "--overwrite"
        )


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _listed(folder: Path) -> dict[str, FileEntry]:
    """The files of a save as they were written; the three that hold the state must be among them."""
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is missing")
    table = _table(folder / FILES)
    listed = {name: _entry(folder, name, values) for name, values in table.items()}
    for name in (MODEL, OPTIMIZER, STATE):
        if name not in listed:
            raise CheckpointError(f"{folder / FILES} does not list {name}")
    return listed


def _entry(folder: Path, name: str, values: Any) -> FileEntry:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    types = {"bytes": int, "sha256": str}
    if not inside or not isinstance(values, Mapping) or {key: type(item) for key, item in values.items()} != types:
        raise CheckpointError(f"{folder / FILES} is no list of files")
    return FileEntry(**values)


def _table(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is {'no table of values' if path.exists() else 'missing'}")
    return values
