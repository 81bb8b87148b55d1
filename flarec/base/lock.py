"""One process at a time writes an output: `.OUT.lock` beside it says which one, and what it may leave behind.

The system's lock on the file (`flock`) decides where the file system has it: it ends with its process, however that
ends. What stands in the file names the holder to others, and decides where there is no such lock: a process is known by
its number, the boot of its machine and its start, so that a number that was given out again is no holder. The last line
also names temporary folders, so that whoever takes the lock over can remove or finish them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import UsageError
from .files import flush

RECORD = "flarec lock"
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
"""What file systems without `flock` say."""


@dataclass(frozen=True)
class Process:
    """A process for good: `boot` is the machine's boot id, `started` the kernel's start time of the process in clock
    ticks; empty and 0 where the system does not tell."""

    pid: int
    host: str
    boot: str
    started: int

    @staticmethod
    def current() -> Process:
        boot = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return Process(os.getpid(), socket.gethostname(), boot, _start_of(os.getpid()))

    def runs(self) -> bool | None:
        """Whether it still runs; None if it is of another machine."""
        here = Process.current()
        if self.boot != here.boot:
            return False if self.host == here.host else None
        if self.started:
            return _start_of(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # it is somebody else's
        return True

    def describe(self) -> str:
        return f"process {self.pid}" + ("" if self.host == socket.gethostname() else f" on {self.host}")


def _start_of(pid: int) -> int:
    """Start of a process in clock ticks since boot; 0 if there is none, if it has ended and its parent did not notice
    yet, or if there is no way to know."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *values = text.rpartition(")")[2].split()
        return 0 if state in "ZX" else int(values[18])
    except (OSError, ValueError, IndexError):
        return 0


@dataclass(frozen=True)
class _Line:
    token: str
    process: Process
    left: dict[str, Any]


class OutputLock:
    """The lock on `out`, a context. Raises `UsageError` if another process (or thread) holds it, and `OSError`.

    left: what the process that held it before, and was killed, noted last; then what `note` was given.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = lock_path(out)
        self.left: dict[str, Any] = {}
        self._token = secrets.token_hex(8)
        self._handle = -1

    def __enter__(self) -> OutputLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle, locked = _take(self.path, self.out)
        try:
            self._begin(locked)
        except BaseException:
            self._close()
            raise
        return self

    def _begin(self, locked: bool) -> None:
        """Say who holds the lock from now on; what is left of the process before stays noted."""
        before, own = _lines(self._handle, self.path), Process.current()
        for line in before:
            if _holds(line, own, locked):
                raise _held(self.out, self.path, line)
        self.left = before[-1].left if before else {}
        try:
            self._write()
        except BaseException:
            if not before:
                self.path.unlink(missing_ok=True)
            raise
        # of two that came at the same time where there is no system's lock, the first line decides
        for line in _lines(self._handle, self.path):
            if line.token == self._token:
                return
            if _holds(line, own, locked):
                raise _held(self.out, self.path, line)

    def note(self, left: Mapping[str, Any]) -> None:
        """Write down what a kill from now on leaves behind. Raises `OSError`."""
        self.left = dict(left)
        self._write()

    def _write(self) -> None:
        process = asdict(Process.current())
        text = json.dumps({"record": RECORD, "token": self._token, "process": process, "left": self.left})
        data = f"\n{text}\n".encode()  # a line that was cut short ends here
        os.lseek(self._handle, 0, os.SEEK_END)
        while data:
            data = data[os.write(self._handle, data) :]
        if self.left:  # a power cut may cost a lock, never what it says of left-overs
            os.fsync(self._handle)
            flush(self.path.parent)

    def _close(self) -> None:
        os.close(self._handle)
        self._handle = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.left:  # else the next run has something to remove
            with contextlib.suppress(OSError):  # a lock without a process is recognised
                self.path.unlink(missing_ok=True)
        self._close()


def lock_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


@contextlib.contextmanager
def held(out: Path, lock: OutputLock | None) -> Iterator[OutputLock]:
    """The lock that the caller holds already, else one for the time of the context."""
    if lock is not None:
        yield lock
        return
    with OutputLock(out) as own:
        yield own


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[OutputLock]:
    """As `OutputLock`, with a `UsageError` in every case."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(OutputLock(out))
        except OSError as error:
            raise UsageError(f"cannot make {lock_path(out)}: {error.strerror}; choose another --out") from error
        yield lock


def check_free(out: Path) -> dict[str, Any]:
    """What a killed process noted in the lock on `out`. Raises `UsageError` if one holds it. Changes nothing."""
    path = lock_path(out)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; choose another --out") from error
    try:
        lines, locked = _lines(handle, path), True
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(out, path, lines[-1] if lines else None) from None
        except OSError:
            locked = False
        own = Process.current()
        for line in lines:
            if _holds(line, own, locked):
                raise _held(out, path, line)
        return lines[-1].left if lines else {}
    finally:
        os.close(handle)


def _take(path: Path, out: Path) -> tuple[int, bool]:
    """(handle of the lock's file, whether the system's lock is on it)."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lines = _lines(handle, path)
            os.close(handle)
            raise _held(out, path, lines[-1] if lines else None) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            locked = False
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle, locked
        except FileNotFoundError:
            pass
        os.close(handle)  # whoever held it was done just then, and removed the file


def _holds(line: _Line, own: Process, locked: bool) -> bool:
    """Whether the process of a line still holds the lock. locked: the system's lock says that it does not, so only a
    process that surely runs counts (a file system may know locks of one machine only)."""
    if locked:
        return line.process != own and line.process.runs() is True
    return line.process.runs() is not False


def _held(out: Path, path: Path, line: _Line | None) -> UsageError:
    who = "another process" if line is None else line.process.describe()
    hint = ""
    if line is not None and line.process.runs() is None:
        hint = f" (if that process is gone, remove {path})"
    return UsageError(f"{out} is being written by {who}{hint}; wait for it, or choose another --out")


def _lines(handle: int, path: Path) -> list[_Line]:
    """What the lock's file says. Raises `UsageError` if it is something else's."""
    foreign = UsageError(f"{path} is no lock of flarec; move it away or choose another --out")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise foreign
    texts = [text for text in os.pread(handle, 1 << 20, 0).split(b"\n") if text.strip()]
    found = [line for line in map(_line, texts) if line is not None]
    if texts and not found and not texts[0].startswith(b'{"record": "flarec lock"'[: len(texts[0])]):
        raise foreign
    return found


def _line(text: bytes) -> _Line | None:
    """None for a line that was cut short, or is something else."""
    types = {"pid": int, "host": str, "boot": str, "started": int}
    try:
        table = json.loads(text)
        process, left = table["process"], table["left"]
        good = table["record"] == RECORD and isinstance(left, dict) and isinstance(table["token"], str)
        if not good or {key: type(value) for key, value in process.items()} != types:
            return None
        if not 0 < process["pid"] < 1 << 31:
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return _Line(table["token"], Process(**process), left)
