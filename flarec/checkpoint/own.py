"""What flarec may replace: a folder that holds a checkpoint that it wrote, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from ..base.files import is_mount
from ..errors import CheckpointError
from .manifest import NAME as MANIFEST
from .manifest import Manifest


def check_destination(out: Path, overwrite: bool, *, building: Path | None = None) -> None:
    """Raises `CheckpointError` if a checkpoint cannot be written to `out`; writes nothing.

    Only a checkpoint of flarec is ever replaced: a folder with a manifest, and with no other files than it lists.
    building: the folder in an empty `out` in which the checkpoint is being built.
    """
    around = next((folder for folder in Path(os.path.abspath(out)).parents if (folder / MANIFEST).is_file()), None)
    if around is not None:  # it would not be flarec's own any more
        raise CheckpointError(f"{out} lies in the checkpoint {around}; choose another output directory")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out} exists and is not a directory; choose another output directory")
    if not out.is_dir():
        return
    try:
        found = [path for path in out.iterdir() if path != building]
        reason = why_not_own(out) if found else None
    except OSError as error:
        raise CheckpointError(f"{out} cannot be read ({error.strerror}); choose another output directory") from error
    if reason is None:
        if not os.access(out, os.W_OK | os.X_OK):
            raise CheckpointError(f"{out} cannot be written to; choose another output directory")
        return
    if reason and overwrite:
        raise CheckpointError(
            f"{out} is not replaced by --overwrite: {reason}; move it away or choose another output directory"
        )
    if not overwrite:
        hint = "" if reason else " or replace it with --overwrite"
        raise CheckpointError(f"{out} is not empty; choose another output directory{hint}")
    if is_mount(out):
        raise CheckpointError(
            f"{out} is not replaced by --overwrite: it is a mount point, which cannot change places with a new "
            "checkpoint; empty it, or choose a directory in it"
        )


def is_own(out: Path) -> bool:
    """Whether there is a checkpoint that flarec wrote, and nothing else."""
    try:
        return out.is_dir() and not out.is_symlink() and not why_not_own(out)
    except OSError:
        return False


def why_not_own(directory: Path) -> str:
    """Why a directory is no checkpoint that flarec wrote, and nothing else; empty if it is one."""
    path = directory / MANIFEST
    try:
        manifest = None if path.is_symlink() else Manifest.read(directory)
    except CheckpointError as error:
        return str(error)
    if manifest is None:
        return f"it is no checkpoint of flarec (no {MANIFEST})"
    own = {MANIFEST, *manifest.files}
    folders = {parent.as_posix() for name in own for parent in Path(name).parents}
    for found in sorted(directory.rglob("*")):
        name = found.relative_to(directory).as_posix()
        if found.is_symlink() or name not in (folders if found.is_dir() else own):
            return f"{name} in it was not written by flarec"
    return ""
