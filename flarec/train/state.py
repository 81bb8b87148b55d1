"""The training state on disk: OUT.partial/ with the run's identity, its metrics, and the last good save.

    run.json         the run's record: what decides its result (recipe, seed, data, source), with which a resumed run
                     must agree, and the arguments it was called with
    metrics.jsonl    one line per step and evaluation
    state-00000200/  a save (`flarec.train.saves`); the one before it is kept too, for the case that this one is damaged
    latest           the name of the last complete state directory

A save writes a new directory, flushes it to the disk and only then renames `latest`, so that an interruption at any
moment leaves a complete save behind. Every file of a save is compared with its hash before a run continues from it.

Only a folder with a record that a run wrote is ever removed, and only the entries that a run writes: whatever else is
found in it belongs to somebody.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..base.files import flush, flush_tree, is_mount, replace_file, why_no_file
from ..checkpoint.location import RUN
from ..errors import CheckpointError, TrainingError, UsageError, first_line
from .saves import SavedState, read_save, write_save

LATEST, METRICS = "latest", "metrics.jsonl"
RECORD, RECORD_VERSION = "flarec conversion run", 1
_UNMARKED = {"recipe": dict, "seed": int, "kernels": str, "source": dict, "data": dict}
"""Keys and types of a record from before records had a name."""
_SAVE = re.compile(r"state-[0-9]{8,18}")
_OWN = re.compile(rf"{_SAVE.pattern}(\.writing)?|(run\.json|latest)(\.writing)?|metrics\.(jsonl|writing)")
"""Names of everything that a run writes."""
_BEGINNING = b'{\n "format_version": '
"""Of every record."""


@contextlib.contextmanager
def writing(path: Path, go_on: Callable[[], str] = lambda: "continue with --resume") -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into a `TrainingError` that says where and what to do.

    go_on: how to, once there is room.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"cannot write {path}: {reason}; free space (or permissions) and {go_on()}"
        ) from error


MICRO_ROWS = "micro_rows"
"""Of an identity: rows of a forward pass, where memory was too short for those of the recipe. Results depend on them by
rounding."""


class StateDirectory:
    """OUT.partial/ of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._good: str | None = None  # the newest save that this process wrote, or read and found whole

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def in_use(self) -> bool:
        """Whether there is something under the name, if only a link; an empty folder is as good as none, and so is one
        whose run was killed while it wrote its record."""
        if self.path.is_symlink() or not self.path.is_dir():
            return os.path.lexists(self.path)
        found = list(self.path.iterdir())
        return bool(found) and not (len(found) == 1 and _is_begun_record(found[0]))

    def check_own(self, *, whole: bool = True) -> None:
        """Raise `UsageError` if what is under the name is no run's folder: it is never touched.

        whole: if the folder is to be removed; it then must hold nothing but what a run writes.
        """
        try:
            reason = self._why_not_own(whole) if self.in_use else ""
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        if reason:
            raise UsageError(f"{self.path} {reason}; nothing is removed: move it away or choose another --out")

    def _why_not_own(self, whole: bool) -> str:
        if self.path.is_symlink():
            return "is a link, where a run keeps its training state in a directory of its own"
        if not self.path.is_dir():
            return "is not a directory"
        if self._identity(self._table()) is None:
            return f"has no record of a run of flarec that this version can read ({RUN})"
        others = self._others() if whole else []
        return f"holds {others[0].name}, which no run of flarec wrote" if others else ""

    def create(
        self,
        identity: Mapping[str, Any],
        arguments: Mapping[str, Any] | None = None,
        tracking: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the directory, empty; `identity` is what a resumed run is compared with, `arguments` what `flarec
        finish` calls it with. An earlier run's is replaced. An empty one is written into: it may be a mount point.

        Raises `UsageError` if something else is in the way.
        """
        self.check_own()
        try:
            self.remove()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {self.path}: {error.strerror}; choose another --out") from error
        try:
            self._write_record(identity, arguments, tracking, lambda: "start again")
        except TrainingError:
            with contextlib.suppress(OSError):
                self.remove()  # a folder without a record would be in the way of the next run
            raise

    def rewrite(
        self,
        identity: Mapping[str, Any],
        arguments: Mapping[str, Any] | None = None,
        tracking: Mapping[str, Any] | None = None,
    ) -> None:
        """State in the record what the run is from now on."""
        self._write_record(identity, arguments, tracking, self.go_on)

    def _write_record(
        self, identity: Mapping[str, Any], arguments: Mapping[str, Any] | None, tracking: Mapping[str, Any] | None,
        go_on: Callable[[], str],
    ) -> None:
        parts = {"record": RECORD, "identity": identity, "arguments": arguments or {}, "tracking": tracking or {}}
        ordered = json.loads(json.dumps(parts, sort_keys=True))
        with writing(self.path / RUN, go_on):
            # the version first: by its beginning a record is known whose writing was killed (`_is_begun_record`)
            self._replace(RUN, json.dumps({"format_version": RECORD_VERSION, **ordered}, indent=1))

    @property
    def identity(self) -> dict[str, Any]:
        """What the run was started with. Raises `UsageError` if there is no run."""
        self.check_own(whole=False)
        return self._identity(self._table()) or {}

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was called with; empty in records from before they held it."""
        return self._part("arguments")

    @property
    def tracking(self) -> dict[str, Any]:
        """Which trackers it has, and how far they are (`flarec.train.trackers.tracking`); empty without any."""
        return self._part("tracking")

    def _part(self, name: str) -> dict[str, Any]:
        table = self._table()
        found = table.get(name) if isinstance(table, dict) and table.get("record") == RECORD else None
        return found if isinstance(found, dict) else {}

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` naming what differs from the run that made this directory."""
        if changed := differences(self.identity, json.loads(json.dumps(identity))):
            raise CheckpointError(
                f"{self.path} belongs to another run: {'; '.join(changed[:3])}"
                f"{f' and {len(changed) - 3} more' if len(changed) > 3 else ''}; resume with what the run was started "
                "with (--steps may change the number of its steps), or start again with --overwrite"
            )

    def latest(self, note: Callable[[str], None] = lambda line: None) -> SavedState | None:
        """The last save that is as it was written, None if the run was interrupted before its first.

        note: gets a line if damaged saves are passed over. Raises `CheckpointError` if all are damaged.
        """
        names, problems = self._saves()
        for name in names:
            try:
                state = read_save(self.path / name, _step_of(name))
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                note(f"damaged: {'; '.join(problems[:3])}; continuing from the save before, {name}")
            self._good = name
            return state
        if problems:
            raise CheckpointError(f"no save can be used: {'; '.join(problems[:3])}; start again with --overwrite")
        return None

    def _saves(self) -> tuple[list[str], list[str]]:
        """(names of saves to try: the one that `latest` names, then the others, newest first; what is wrong)."""
        others = [path.name for path in self._own() if _SAVE.fullmatch(path.name) and path.is_dir()]
        others.sort(key=_step_of, reverse=True)
        path = self.path / LATEST
        try:
            if reason := why_no_file(path):
                return others, [f"{path} {reason}"]
            name = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return others, []
        except (OSError, UnicodeDecodeError) as error:
            return others, [f"{path} cannot be read ({first_line(error)})"]
        if not _SAVE.fullmatch(name):
            return others, [f"{path} names no save of a run"]
        return [name, *(other for other in others if other != name)], []

    def save(
        self, step: int, state: SavedState, keep: int = 2, between: Callable[[], object] = lambda: None
    ) -> None:
        """Write a save for `step` and make it the latest; all but the newest `keep` are removed, this one and the good
        one before apart. between: called before each file and before the save is there; what it raises leaves the
        latest save as it is."""
        final = self.path / f"state-{step:08d}"
        before = self._good
        assert before != final.name, "a step is saved once; replacing the latest save would risk it"
        temporary = final.with_suffix(".writing")
        try:
            with writing(temporary, self.go_on):
                self._remove(temporary)
                temporary.mkdir()
                write_save(temporary, state, between)
                flush_tree(temporary)
                between()
                if final.exists():  # a run that was resumed at an older save passes this step again
                    shutil.rmtree(final)
                os.rename(temporary, final)
                flush(self.path)  # the save's name comes before the name of it
                self._replace(LATEST, final.name)
        except TrainingError:
            self._remove(temporary)
            raise
        self._good = final.name
        saves = [old.name for old in self._own() if _SAVE.fullmatch(old.name)]
        older = [name for name in saves if before is not None and _step_of(name) < _step_of(before)]
        kept = {final.name, before, *sorted(older, key=_step_of, reverse=True)[: keep - 2]}
        for old in self._own():
            if old.is_dir() and old.name not in kept:
                self._remove(old)

    def _replace(self, name: str, text: str) -> None:
        """The file appears with its whole text, or stays as it was; what a kill leaves has a name of a run's own."""
        replace_file(self.path / name, text, self.path / f"{name}.writing")

    def remove(self) -> None:
        """Remove what a run wrote, its record last, and the folder unless something is in it or it is a mount point.

        Raises `OSError`.
        """
        if self.path.is_symlink() or not self.path.is_dir():
            return
        for path in sorted(self._own(), key=lambda path: (path.name == RUN, path.name == LATEST)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not any(self.path.iterdir()) and not is_mount(self.path):
            self.path.rmdir()

    @property
    def saved_step(self) -> int | None:
        """The step that `latest` names, None if it names none; the save itself is not looked at."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if why_no_file(self.path / LATEST):
                return None
            name = (self.path / LATEST).read_text(encoding="utf-8").strip()
            return _step_of(name) if _SAVE.fullmatch(name) else None
        return None

    def go_on(self) -> str:
        """How a run goes on that stops now."""
        step = self.saved_step
        if step is None:
            return "start again with --resume (there is no save yet)"
        return f"continue with --resume from the save of step {step}"

    def _own(self) -> list[Path]:
        """Entries that a run wrote. A link is none, whatever its name."""
        return [path for path in self.path.iterdir() if _OWN.fullmatch(path.name) and not path.is_symlink()]

    def _others(self) -> list[Path]:
        own = set(self._own())
        return sorted(path for path in self.path.iterdir() if path not in own)

    def _table(self) -> Any:
        """What run.json holds; None if it is no JSON file."""
        path = self.path / RUN
        try:
            return None if path.is_symlink() or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    @staticmethod
    def _identity(table: Any) -> dict[str, Any] | None:
        """The identity in a record; None for a table that is no record of a run."""
        if not isinstance(table, dict):
            return None
        if table.get("record") == RECORD:
            identity = table.get("identity")
            readable = table.get("format_version") in range(1, RECORD_VERSION + 1)
            return identity if readable and isinstance(identity, dict) else None
        unmarked = table.keys() == _UNMARKED.keys() and all(isinstance(table[k], t) for k, t in _UNMARKED.items())
        return table if unmarked else None

    @staticmethod
    def _remove(folder: Path) -> None:
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _is_begun_record(path: Path) -> bool:
    """Whether a file is the beginning of a run's record, under the name that it has while it is written."""
    if path.name != f"{RUN}.writing" or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        text = file.read(len(_BEGINNING))
    return _BEGINNING.startswith(text)


def _step_of(name: str) -> int:
    return int(name.removeprefix("state-"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested tables, in words; an absent key and a null one both say "not set"."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), prefix + key
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name} was {_short(before)} and is now {_short(after)}")
    return found


def _short(value: Any) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
