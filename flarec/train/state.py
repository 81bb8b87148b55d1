"""The training state on disk: OUT.partial/ with the run's identity, its metrics, and the last good save.

    run.json         what the run was started with (recipe, seed, data, source); a resumed run must agree with it
    metrics.jsonl    one line per step and evaluation
    state-00000200/  model.safetensors, optimizer.safetensors, state.json
    latest           the name of the last complete state directory

A save writes a new directory, flushes it to the disk and only then renames `latest`, so that an interruption at any
moment leaves a complete save behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, TrainingError, UsageError

MODEL, OPTIMIZER, STATE, RUN, LATEST, METRICS = (
    "model.safetensors", "optimizer.safetensors", "state.json", "run.json", "latest", "metrics.jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class SavedState:
    """Parameters and optimizer tensors by name, and plain values (step, data position, counters)."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    values: dict[str, Any]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into a `TrainingError` that says where and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"cannot write {path}: {reason}; free space (or permissions) and continue with --resume from the last "
            "good save"
        ) from error


class StateDirectory:
    """OUT.partial/ of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def create(self, identity: Mapping[str, Any]) -> None:
        """Make the directory, empty; `identity` is what a resumed run is compared with."""
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"cannot make {self.path}: {error.strerror}; choose another --out") from error
        with writing(self.path / RUN):
            _write_text(self.path / RUN, json.dumps(identity, indent=1, sort_keys=True))

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` naming what differs from the run that made this directory."""
        stored = self._read_json(self.path / RUN)
        changed = _differences(stored, json.loads(json.dumps(identity)))
        if changed:
            raise CheckpointError(
                f"{self.path} belongs to another run: {'; '.join(changed[:3])}"
                f"{f' and {len(changed) - 3} more' if len(changed) > 3 else ''}; resume with what the run was started "
                "with, or start again with --overwrite"
            )

    def latest(self) -> SavedState | None:
        """The last complete save, None if the run was interrupted before its first. Raises `CheckpointError`."""
        name = self._latest_name()
        if name is None:
            return None
        folder = self.path / name
        try:
            return SavedState(
                load_file(folder / MODEL), load_file(folder / OPTIMIZER), self._read_json(folder / STATE)
            )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the training state {folder} cannot be read ({error}); start again with --overwrite"
            ) from error

    def save(self, step: int, state: SavedState) -> None:
        """Write a save for `step` and make it the latest; older saves are removed afterwards."""
        final = self.path / f"state-{step:08d}"
        assert self._latest_name() != final.name, "a step is saved once; replacing the latest save would risk it"
        temporary = final.with_suffix(".writing")
        try:
            with writing(temporary):
                self._remove(temporary)
                temporary.mkdir()
                for name, tensors in ((MODEL, state.model), (OPTIMIZER, state.optimizer)):
                    host = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                    save_file(host, temporary / name)
                    _flush(temporary / name)
                _write_text(temporary / STATE, json.dumps(state.values))
                _flush(temporary)
                if final.exists():  # a run that was resumed at an older save passes this step again
                    shutil.rmtree(final)
                os.rename(temporary, final)
                _write_text(self.path / f"{LATEST}.writing", final.name)
                os.replace(self.path / f"{LATEST}.writing", self.path / LATEST)
                _flush(self.path)
        except TrainingError:
            self._remove(temporary)
            raise
        for old in self.path.glob("state-*"):
            if old.name != final.name:
                self._remove(old)

    def _latest_name(self) -> str | None:
        try:
            return (self.path / LATEST).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        self._remove(self.path)

    @staticmethod
    def _remove(folder: Path) -> None:
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _read_json(path: Path) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); start again with --overwrite") from error
        assert isinstance(values, dict)
        return values


def _flush(path: Path) -> None:
    """Make a file or a directory's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), prefix + key
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name} was {_short(before)} and is now {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
