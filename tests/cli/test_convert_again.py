"""Runs that meet others: a second one, one that is complete, one that was stopped early or by SIGTERM."""

from __future__ import annotations

import errno
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flarec as package
from flarec.base.lock import OutputLock, lock_path
from flarec.checkpoint import place as placing
from flarec.checkpoint.manifest import Manifest
from flarec.errors import UsageError
from flarec.train.identity import FREE
from flarec.train.loop import Trainer
from flarec.train.metrics import MetricsLog, read_metrics
from flarec.train.prepare import prepare
from flarec.train.state import METRICS, StateDirectory
from tests.checkpoints import tree
from tests.cli.conversions import QUICK, flarec, place_of_conversions

COMMAND = ["convert", "source", "--data", "data.jsonl", "--out", "out", *QUICK, "--steps", "3"]


class Killed(BaseException):
    """Stands for a kill: nothing of flarec catches it."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return place_of_conversions(tmp_path, monkeypatch)


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def logged(path: Path) -> list[tuple[int, bool]]:
    return [(line["step"], "evaluation" in line) for line in read_metrics(path)]


WHOLE_LOG = [(0, True), (1, False), (2, False), (3, False), (3, True)]


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Callable[[], None]:
    """Make a function kill; returns what undoes that."""
    real = getattr(owner, name)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(owner, name, kill)
    return lambda: monkeypatch.setattr(owner, name, real)


def test_complete_runs_say_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the checkpoint got its place, with the whole training state, the half or none of it left."""
    remove = StateDirectory.remove

    def kill(directory: StateDirectory) -> None:
        if directory.saved_step is not None:
            raise Killed
        remove(directory)

    monkeypatch.setattr(StateDirectory, "remove", kill)
    with pytest.raises(Killed):
        package.convert(
            "source", "data.jsonl", out="out", steps=3, max_length=96, device="cpu", overrides=["evaluation.every=0"],
        )
    monkeypatch.setattr(StateDirectory, "remove", remove)
    command = ["convert", "source", "--data", "data.jsonl", "--out", "out", "--steps", "3", "--max-length", "96",
               "--device", "cpu", "--set", "evaluation.every=0", "--resume"]
    assert names(place) == ["data.jsonl", "out", "out.partial", "source"]
    before = tree(place / "out")
    state = place / "out.partial"
    record = (state / "run.json").read_text()
    free = [("save.background", "on"), ("train.shard", "optimizer"), None]  # those change no bit: it is the same run
    assert {setting[0] for setting in free if setting} == {".".join(key) for key in FREE}
    for step, setting in zip(("nothing is gone", "half is gone", "all is gone"), free, strict=True):
        if step == "half is gone":
            state.mkdir()
            (state / "run.json").write_text(record)
        result = flarec(*command, *(["--set", "=".join(setting)] if setting else []))
        assert result.exit_code == 0, (step, result.output)
        assert "out is complete: this run ended before, nothing is left to do" in result.stderr
        assert names(place) == ["data.jsonl", "out", "source"]
    assert tree(place / "out") == before

    other = flarec(*command, "--seed", "4")  # another run's checkpoint is no end of this one
    assert (other.exit_code, "out is not empty" in other.stderr) == (2, True), other.stderr
    other = flarec(*command, "--seed", "4", "--overwrite")
    assert (other.exit_code, "there is nothing to resume" in other.stderr) == (2, True), other.stderr
    (place / "out" / "model.safetensors").write_bytes(b"")
    damaged = flarec(*command)
    assert damaged.exit_code == 2
    assert tree(place / "out").keys() == before.keys()


def test_one_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one ends with one line at once, whether it begins or resumes, and changes nothing."""
    advance, seen = Trainer.advance, []

    def second(trainer: Trainer) -> Any:
        if trainer.step == 1:
            before = tree(place)
            for more in ([], ["--resume"], ["--overwrite"]):
                result = flarec(*COMMAND, *more)
                seen.append((result.exit_code, result.stderr.splitlines()[-1]))
                assert tree(place) == before
            with pytest.raises(UsageError, match="is being written by process"):
                package.convert("source", "data.jsonl", out="out", max_length=96, device="cpu")
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", second)
    assert flarec(*COMMAND).exit_code == 0
    line = f"Error: out is being written by process {os.getpid()}; wait for it, or choose another --out"
    assert seen == [(2, line)] * 3
    assert logged(place / "out" / "metrics.jsonl") == WHOLE_LOG
    assert names(place) == ["data.jsonl", "out", "source"]


def test_a_lock_that_appears_while_the_source_is_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = OutputLock(place / "out")

    def slow(*arguments: Any) -> Any:
        made = prepare(*arguments)
        lock.__enter__()
        return made

    monkeypatch.setattr("flarec.train.convert.prepare", slow)
    result = flarec(*COMMAND)
    assert (result.exit_code, "is being written by process" in result.stderr) == (2, True)
    assert names(place) == [".out.lock", "data.jsonl", "source"]
    lock.__exit__(None, None, None)


def test_killed_before_the_first_save(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first evaluation is in the log once."""
    back = kill_at(monkeypatch, StateDirectory, "save")
    with pytest.raises(Killed):
        flarec(*COMMAND)
    assert logged(place / "out.partial" / "metrics.jsonl") == [(0, True), (1, False), (2, False)]
    back()
    result = flarec(*COMMAND, "--resume")
    assert result.exit_code == 0, result.output
    assert "has no save yet: starting from the first step" in result.stderr
    assert logged(place / "out" / "metrics.jsonl") == WHOLE_LOG


@pytest.mark.parametrize("second", [None, signal.SIGTERM])
def test_a_schedulers_notice(place: Path, second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, once or more often: the step is finished and saved, and the exit code is what a shell expects."""
    advance, handler = Trainer.advance, signal.getsignal(signal.SIGTERM)

    def notified(trainer: Trainer) -> Any:
        if trainer.step == 0:
            for number in filter(None, (signal.SIGTERM, second)):
                signal.raise_signal(number)
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", notified)
    result = flarec(*COMMAND, "--set", "evaluation.every=0")
    assert result.exit_code == 143, result.output
    assert "Interrupted: step 1 is saved. Continue with" in result.stderr
    assert StateDirectory(place / "out.partial").saved_step == 1
    assert names(place) == ["data.jsonl", "out.partial", "source"]
    assert signal.getsignal(signal.SIGTERM) is handler
    if second is None:
        command = shlex.split(result.stderr.strip().splitlines()[-1])
        assert flarec(*command[1:]).exit_code == 0
        assert names(place) == ["data.jsonl", "out", "source"]


def test_a_full_disk_at_the_log(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence; what stands there resumes."""
    write, code = MetricsLog.write, errno.ENOSPC

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if b'"step": 3' in data:
                raise OSError(code, os.strerror(code))
            return int(self.file.write(data[:5]))  # as much as there is room for

        def close(self) -> None:
            self.file.close()

    def full(log: MetricsLog, values: Any) -> None:
        if not isinstance(log._file, Full):
            monkeypatch.setattr(log, "_file", Full(log._file))
        write(log, values)

    monkeypatch.setattr(MetricsLog, "write", full)
    result = flarec(*COMMAND)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: cannot write out.partial/{METRICS}: {os.strerror(code)}")
    assert "Traceback" not in result.output and not isinstance(result.exception, OSError)
    monkeypatch.setattr(MetricsLog, "write", write)
    result = flarec(*COMMAND, "--resume")
    assert result.exit_code == 0, result.output
    assert logged(place / "out" / "metrics.jsonl") == WHOLE_LOG


def test_an_empty_folder_is_written_into(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a volume of a container: it stays the same folder, also when the run is killed on the last step."""
    (place / "out").mkdir()
    (place / "out.partial").mkdir()
    folder = (place / "out").stat().st_ino
    back = kill_at(monkeypatch, placing, "_move_up")
    clear = kill_at(monkeypatch, placing.Place, "clear")
    monkeypatch.setattr(OutputLock, "__exit__", lambda self, *_: self._close())
    with pytest.raises(Killed):
        flarec(*COMMAND)
    back()
    clear()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert [path.name[:20] for path in (place / "out").iterdir()] == [".checkpoint.writing-"]
    assert lock_path(place / "out").exists()
    result = flarec(*COMMAND, "--resume")
    assert result.exit_code == 0, result.output
    assert "out is complete" in result.stderr
    assert (place / "out").stat().st_ino == folder
    manifest = Manifest.read(place / "out")
    assert manifest is not None
    manifest.check_files(place / "out")
    assert names(place) == ["data.jsonl", "out", "source"]
