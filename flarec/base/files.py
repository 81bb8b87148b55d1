"""Files that commands write and remove: an input is never one of them, and a file appears whole or not at all.

Paths are compared as what they lead to: links are followed, `..` is resolved, and files that exist are compared by
device and inode, so that no other spelling of a folder hides it. Folders count with everything above and below them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import UsageError

LONGEST_NAME = 230
"""Bytes of an output's name: file systems take 255, and temporary names are longer."""
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def check_apart(outputs: Sequence[Path], inputs: Iterable[Path], option: str = "--out") -> None:
    """Raise `UsageError` if one of `outputs` (files or folders, there or not) is, holds, or lies in one of `inputs`.

    Inputs that do not exist have nothing to lose. Of a folder that is read, the links in it count too: weights that
    are linked from elsewhere are an input.
    """
    for shown, place in [found for path in inputs for found in _places(path)]:
        for output in outputs:
            if _inside(place, _real(output)):
                where = f"is the output {output}" if output.is_file() else f"lies in the output directory {output}"
                raise UsageError(f"{shown} {where}, which is written or replaced; choose another {option}")
            if _inside(_real(output), place):
                raise UsageError(f"{output} lies in {shown}, which is read; choose another {option}")


def why_no_file(path: Path) -> str:
    """Why what is under a path cannot be read as a file, in words; empty if it can, or if nothing is there.

    A pipe whose other end nobody opens would be waited for without end. Those that a shell opens for a command
    (`/dev/stdin`, `/dev/fd/63`) are read.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    opened = str(path).startswith(("/dev/stdin", "/dev/fd/", "/proc/self/fd/"))
    return "" if opened and stat.S_ISFIFO(mode) else "is a pipe, a socket or a device, not a file"


def check_name(path: Path, option: str = "--out") -> None:
    """Raise `UsageError` for the path of an output that has no name, or one to which nothing can be added."""
    name = path.name
    if name in ("", ".", ".."):
        raise UsageError(f"the output {path} has no name; choose another {option}")
    if not name.isprintable():
        raise UsageError(f"the name {name!a} of the output has unprintable characters; choose another {option}")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise UsageError(
            f"the name {name[:40]}... of the output is longer than {LONGEST_NAME} bytes; choose a shorter {option}"
        )


def write_file(path: Path, data: str | bytes, option: str = "--out") -> None:
    """Write a file in one piece: a failure leaves what was there. Raises `UsageError` if it cannot be written.

    A link is followed. What is no regular file (a terminal, a pipe) is written as it is.
    """
    try:
        target = _real(path)
        if target.exists() and not target.is_file():
            target.write_bytes(_bytes(data))
        else:
            replace_file(target, data, unused(target, "writing"))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another {option}") from error


def replace_file(path: Path, data: str | bytes, part: Path) -> None:
    """The file appears with all of `data`, or stays as it was, also after a power cut. Raises `OSError`.

    part: a name beside it under which the data is written first; a failure leaves nothing there. Text is UTF-8. The
    mode of a file that is replaced stays.
    """
    try:
        part.write_bytes(_bytes(data))
        if path.exists():
            part.chmod(path.stat().st_mode)
        flush(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Bring a file's contents, or the entries of a folder, onto the disk. Raises `OSError`.

    Some file systems cannot do that for a folder; nothing is wrong then, a power cut may undo a rename.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """`flush` everything in a folder, and the folder: what a later rename makes visible is there after a power cut."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def unused(path: Path, purpose: str) -> Path:
    """A hidden name beside `path` that nothing has: what is found under it later is our own."""
    while True:
        name = path.with_name(f".{path.name}.{purpose}-{secrets.token_hex(4)}")
        if not os.path.lexists(name):
            return name


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system change places, at no moment without one of them. False where the system or the
    file system cannot do that; raises `OSError` for what else is in the way."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def is_mount(folder: Path) -> bool:
    """Whether a file system begins there, or a folder of one was put there: such a folder cannot be renamed."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    real = os.fsencode(_real(folder))
    return any(_unescaped(line.split(b" ")[4]) == real for line in lines if line.count(b" ") > 4)


def _unescaped(name: bytes) -> bytes:
    """The kernel writes blanks and the like in a path as octal numbers."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 255]), name)


def _bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data


def _places(path: Path) -> Iterator[tuple[Path, Path]]:
    """What is read with an input: (as shown to people, real path) of the path, and of the links in a folder."""
    if not os.path.exists(path):
        return
    yield path, _real(path)
    for folder, directories, files in os.walk(path):  # nothing for a file
        for name in (*directories, *files):
            link = Path(folder, name)
            if link.is_symlink() and os.path.exists(link):
                yield link, _real(link)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, without an error for a loop of links


def _inside(place: Path, folder: Path) -> bool:
    """Whether `place` is `folder` or lies in it; both are real paths."""
    if place.is_relative_to(folder):
        return True
    try:
        known = os.stat(folder)
    except OSError:
        return False
    return any(os.path.exists(outer) and os.path.samestat(os.stat(outer), known) for outer in (place, *place.parents))
