"""Saves that are written while training goes on.

The state is copied to main memory, which training waits for, and a thread writes, hashes and publishes the copy as
`StateDirectory.save` does: the same files, the same rename at the end, so that a kill at any moment leaves a complete
save behind. One save is written at a time: the next one waits for it, and so does the end of a run. A write that fails
stops the run at its next step.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor

from ..device import free_memory
from .loop import Trainer
from .moments import moment_bytes
from .saves import SavedState
from .state import StateDirectory

ROOM = 0.5
"""Of the free main memory a copy may take so much; writing takes up to as much again, for the bytes of a file."""


class _Stopped(Exception):
    """The run ends at once; nobody waits for this save."""


class SaveWriter:
    """Writes the saves of a run into `directory`, of which `keep` are kept.

    background: in a thread of its own. fresh: the states are copies in main memory already. saved: the step of the last
    save that is complete, None before the first.
    """

    def __init__(
        self, directory: StateDirectory, keep: int, *, background: bool, fresh: bool, saved: int | None = None
    ) -> None:
        self.directory, self.keep, self.background, self.fresh = directory, keep, background, fresh
        self.saved = self.begun = saved
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._copies: dict[str, Tensor] = {}

    def save(self, step: int, state: SavedState) -> None:
        """Write a save, or begin to; nothing is being written (`wait`). Raises `TrainingError` where it cannot be
        written, at once or from the next call of `check` or `wait` on."""
        assert self._thread is None, "one save at a time"
        self.begun = step
        if not self.background:
            self.directory.save(step, state, self.keep)
            self.saved = step
            return
        copied = self._copied(state)
        self._thread = threading.Thread(target=self._write, args=(step, copied), daemon=True)
        self._thread.start()

    def _write(self, step: int, state: SavedState) -> None:
        try:
            self.directory.save(step, state, self.keep, self._go_on)
            self.saved = step
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def check(self) -> None:
        """Raise what a write met, without waiting for one that goes on."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises what the write met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> SaveWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A save that is being written is finished, also where the run fails; a second Ctrl-C gives it up."""
        if isinstance(error, KeyboardInterrupt):
            self._stopped.set()
        if kind is None:
            self.wait()
        with contextlib.suppress(Exception):  # the error that comes through says more
            self.wait()

    def _copied(self, state: SavedState) -> SavedState:
        """The state in memory that training does not change; its place is used again by the next save."""
        values = copy.deepcopy(state.values)
        if self.fresh:
            return SavedState(state.model, state.optimizer, values)
        model, optimizer = self._on_host("model", state.model), self._on_host("optimizer", state.optimizer)
        return SavedState(model, optimizer, values)

    @torch.no_grad()
    def _on_host(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            key = f"{kind}.{name}"
            place = self._copies.get(key)
            if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                place = self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
            found[name] = place.copy_(tensor)
        return found


def state_size(trainer: Trainer) -> int:
    """Bytes of a save's tensors."""
    weights = trainer.weights
    masters = weights.kinds
    moments = sum(moment_bytes(m.numel(), m.dtype, name in weights.coded) for name, m in masters.items())
    return moments + sum(value.nbytes for value in masters.values())


def in_background(choice: str, trainer: Trainer) -> tuple[bool, str]:
    """What `save.background` means for a run, and a line that says so, "" where nothing is chosen."""
    if choice != "auto":
        return choice == "on", ""
    if trainer.program.device.type != "cuda":
        return False, ""
    needed, free = state_size(trainer), free_memory(torch.device("cpu"))
    size, there = f"{needed / 1e9:.1f} GB", "nothing says how much" if free is None else f"{free / 1e9:.1f} GB"
    if free is not None and needed <= ROOM * free:
        return True, f"saves: written while training goes on, from a copy in main memory ({size}; {there} are free)"
    return False, f"saves: training waits for them: a copy would need {size} of main memory, and {there} are free"
