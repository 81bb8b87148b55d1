"""The lock on an output: one holder, however many come, and none that is dead."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flarec.base import lock as module
from flarec.base.lock import RECORD, OutputLock, Process, check_free, held, lock_path, only_writer
from flarec.errors import UsageError

HOLDER = """
import sys
from pathlib import Path
from flarec.base.lock import OutputLock
with OutputLock(Path(sys.argv[1])) as lock:
    lock.note({"folder": "x"})
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def system_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the system's locks, and on a file system without them."""
    if not request.param:
        def flock(*_: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", flock)
    return bool(request.param)


def line(process: Process, **left: Any) -> str:
    return json.dumps({"record": RECORD, "token": "t", "process": asdict(process), "left": left}) + "\n"


def stale(out: Path, process: Process, **left: Any) -> Path:
    out.parent.mkdir(parents=True)
    lock_path(out).write_text(line(process, **left))
    return lock_path(out)


def test_it_comes_and_goes(out: Path) -> None:
    assert check_free(out) == {}
    with OutputLock(out) as lock:
        assert lock.left == {} and lock_path(out).is_file()
    assert list(out.parent.iterdir()) == []


def test_a_second_one_is_told_who_holds_it(out: Path, system_locks: bool) -> None:
    """Threads of one process too, and by a look that changes nothing."""
    with OutputLock(out) as lock:
        before = lock_path(out).read_bytes()
        for attempt in (lambda: OutputLock(out).__enter__(), lambda: check_free(out)):
            with pytest.raises(UsageError, match=rf"is being written by process {os.getpid()}; wait for it, or choose"):
                attempt()
        with held(out, lock) as same:
            assert same is lock
        assert lock_path(out).read_bytes() == before
    assert check_free(out) == {}


def test_the_lock_of_another_process_and_of_a_dead_one(out: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"is being written by process {process.pid};"):
            OutputLock(out).__enter__()
        with pytest.raises(UsageError, match=rf"is being written by process {process.pid};"):
            check_free(out)
        process.kill()
    assert lock_path(out).is_file()
    assert check_free(out) == {"folder": "x"}
    with OutputLock(out) as lock:
        assert lock.left == {"folder": "x"}
        lock.note({})
    assert not lock_path(out).exists()


OTHERS = {
    "another process with its number": lambda here: replace(here, started=here.started + 1),
    "another boot of this machine": lambda here: replace(here, boot="another"),
    "no process": lambda here: replace(here, pid=2**31 - 2, started=1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_stale_locks(out: Path, name: str, system_locks: bool) -> None:
    """Also of a process whose number was given out again: here it is our own."""
    path = stale(out, OTHERS[name](Process.current()), folder="y")
    assert check_free(out) == {"folder": "y"}
    with OutputLock(out) as lock:
        assert lock.left == {"folder": "y"}
        lock.note({})
    assert not path.exists()


def test_what_is_left_stays_noted_until_it_is_gone(out: Path) -> None:
    path = stale(out, replace(Process.current(), boot="another"), folder="y")
    with OutputLock(out):
        pass
    assert check_free(out) == {"folder": "y"} and path.exists()


@pytest.mark.parametrize("pid", [1, 2**31 - 2])
def test_another_machine(out: Path, pid: int, system_locks: bool) -> None:
    """The system's lock knows; without one nobody does, and the user is told what to do."""
    path = stale(out, Process(pid, "elsewhere", "another", 5))
    if system_locks:
        with OutputLock(out):
            pass
        return
    expected = rf"by process {pid} on elsewhere \(if that process is gone, remove {path}\)"
    with pytest.raises(UsageError, match=expected):
        OutputLock(out).__enter__()
    with pytest.raises(UsageError, match=expected):
        check_free(out)


def test_a_running_process_counts_where_the_lock_of_the_system_does_not_reach(out: Path) -> None:
    """A file system may know the locks of one machine, or container, only."""
    parent = replace(Process.current(), pid=os.getppid(), started=module._start_of(os.getppid()))
    stale(out, parent)
    with pytest.raises(UsageError, match=rf"process {parent.pid};"):
        OutputLock(out).__enter__()
    with pytest.raises(UsageError, match=rf"process {parent.pid};"):
        check_free(out)


def test_systems_that_tell_little(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(Process.current(), boot="", started=0)
    monkeypatch.setattr(Process, "current", staticmethod(lambda: here))
    assert here.runs() is True
    assert replace(here, pid=2**31 - 2).runs() is False
    assert replace(here, host="elsewhere", boot="x").runs() is None


TORN = ['{"record": "flarec lo', line(Process.current(), folder="z")[:-9], ""]


@pytest.mark.parametrize("text", TORN)
def test_a_line_that_was_cut_short(out: Path, text: str) -> None:
    out.parent.mkdir(parents=True)
    lock_path(out).write_text(line(replace(Process.current(), started=1), folder="y") + text)
    with OutputLock(out) as lock:
        assert lock.left == {"folder": "y"}
        lock.note({})
    lock_path(out).write_text(text)
    with OutputLock(out) as lock:
        assert lock.left == {}
    assert not lock_path(out).exists()


FOREIGN: dict[str, Any] = {
    "text": lambda path: path.write_text("mine"),
    "bytes": lambda path: path.write_bytes(b"\xff\0\n\n"),
    "another table": lambda path: path.write_text('{"mine": 1}\n'),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_users_file(out: Path, name: str) -> None:
    out.parent.mkdir(parents=True)
    FOREIGN[name](lock_path(out))
    for attempt in (lambda: OutputLock(out).__enter__(), lambda: check_free(out)):
        with pytest.raises(UsageError, match="is no lock of flarec; move it away"):
            attempt()
    assert os.path.lexists(lock_path(out))


@pytest.mark.parametrize("change", [lambda path: path.mkdir(), lambda path: path.symlink_to("elsewhere")])
def test_what_is_no_file(out: Path, change: Any) -> None:
    out.parent.mkdir(parents=True)
    change(lock_path(out))
    with pytest.raises(UsageError, match=r"cannot make .*choose another --out"), only_writer(out):
        pass
    assert not (out.parent / "elsewhere").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_nothing(out: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(UsageError, match=os.strerror(code)), only_writer(out):
        pass
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("pid", ["0", "-1", "true", "1e400", "9" * 4000, "9" * 5000, '"1"', "null", "[1]"])
def test_impossible_processes_hold_nothing(out: Path, pid: str) -> None:
    text = line(replace(Process.current(), pid=77777))
    stale(out, Process.current()).write_text(text.replace("77777", pid))
    with contextlib.suppress(UsageError), OutputLock(out) as lock:
        assert lock.left == {}
    assert check_free(out) == {}


def test_a_process_that_ended_runs_no_more_although_its_parent_has_not_noticed() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays as it is: ended, and known to the system
    here = Process.current()
    assert replace(here, pid=child, started=here.started).runs() is False
    assert module._start_of(child) == 0
    os.waitpid(child, 0)
