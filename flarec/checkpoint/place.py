"""Where a checkpoint is built, and how it gets its place: at once, whatever happens meanwhile.

OUT does not exist     built beside it, then renamed
OUT is a checkpoint    built beside it, then the two change places (in two renames where the system cannot do it in one)
OUT is empty           built in a folder in it, then its entries are moved up, the manifest last: such a folder may be a
                       mount point, which cannot be renamed

The lock names the folders before they are made, so that the next run removes or finishes what a kill leaves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..base.files import exchange, flush, unused
from ..base.lock import OutputLock
from ..errors import CheckpointError
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .own import why_not_own


class Place:
    """The place of a checkpoint that is being written. folder: where it is built, made by `make`."""

    def __init__(self, out: Path, lock: OutputLock) -> None:
        self.out = out
        self.lock = lock
        self.inside = out.is_dir() and not any(out.iterdir())
        self.folder = unused(out / "checkpoint" if self.inside else out, "writing")
        self.old = unused(out, "replaced")

    def make(self) -> None:
        """Raises `OSError`."""
        self._note(complete=False)
        self.folder.mkdir()

    def take(self) -> None:
        """Put the folder, which is complete and on the disk, into the place. Raises `OSError`: all is as before."""
        self._note(complete=True)
        if self.inside:
            _move_up(self.folder, self.out)
        elif not self.out.exists():
            os.rename(self.folder, self.out)
        elif not exchange(self.folder, self.out):
            self._take_in_two()
        with contextlib.suppress(OSError):  # the checkpoint is in its place, whatever the disk says
            flush(self.out.parent)

    def _take_in_two(self) -> None:
        os.rename(self.out, self.old)
        os.rename(self.folder, self.out)

    def clear(self) -> None:
        """Remove what is left: an unfinished folder, or the checkpoint that was replaced."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            if self.old.is_dir() and not self.out.exists():
                os.rename(self.old, self.out)
        if self.out.exists():
            shutil.rmtree(self.old, ignore_errors=True)
        if not any(map(os.path.lexists, (self.folder, self.old))):
            with contextlib.suppress(OSError):  # names that nothing has do no harm
                self.lock.note({})

    def _note(self, *, complete: bool) -> None:
        self.lock.note(
            {"folder": self.folder.name, "old": self.old.name, "inside": self.inside, "complete": complete}
        )


def recover(out: Path, lock: OutputLock) -> None:
    """Remove or finish what a killed process left of a checkpoint, as it noted in the lock. Raises `OSError`, and
    `CheckpointError` if there is something else in such a folder."""
    left = lock.left
    inside, complete = left.get("inside") is True, left.get("complete") is True
    folder = _noted(out / "checkpoint" if inside else out, "writing", left.get("folder"))
    old = _noted(out, "replaced", left.get("old"))
    if folder is not None and complete and _may_be_finished(folder, out, inside):
        if inside:
            _move_up(folder, out)
        else:
            os.rename(folder, out)
    elif old is not None and not out.exists():
        os.rename(old, out)
    for path in (folder, old):
        if path is not None and path.is_dir():
            reason = why_not_own(path) if (path / MANIFEST).is_file() else ""
            if reason:
                raise CheckpointError(f"{path} is left of a run that was killed, and {reason}; move it away")
            shutil.rmtree(path)
    if left:
        lock.note({})


def _noted(beside: Path, purpose: str, name: Any) -> Path | None:
    """The folder of a noted name, if it is one that `unused` gives and there is such a folder."""
    if not isinstance(name, str) or not re.fullmatch(rf"\.{re.escape(beside.name)}\.{purpose}-[0-9a-f]{{8}}", name):
        return None
    path = beside.with_name(name)
    return path if path.is_dir() and not path.is_symlink() else None


def _may_be_finished(folder: Path, out: Path, inside: bool) -> bool:
    """Whether a folder holds what was to be put into the place, and the place is free for it."""
    if not inside and out.exists():
        return False  # before the two changed places, or after it: then this is the old one
    try:
        manifest = Manifest.read(folder)
        if manifest is None:
            return False
        for name, entry in manifest.files.items():
            moved = inside and not (folder / Path(name).parts[0]).exists()
            if entry.difference(out / name if moved else folder / name):
                return False
    except (CheckpointError, OSError):
        return False
    return True


def _move_up(folder: Path, out: Path) -> None:
    """Move the entries of a folder in `out` to `out`, the manifest last. Raises `OSError`; then none has moved."""
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == MANIFEST, name))
    for name in names:
        if os.path.lexists(out / name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out / name))
    try:
        for name in names:
            if name == MANIFEST:
                flush(out)  # what it lists comes before it
            os.rename(folder / name, out / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(folder / name):
                os.rename(out / name, folder / name)
        raise
    with contextlib.suppress(OSError):
        flush(out)
        folder.rmdir()
