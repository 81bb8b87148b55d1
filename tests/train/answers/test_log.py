"""The answers on disk: an interruption at any moment costs one batch, and only files of the command are replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flarec.errors import CheckpointError, TrainingError, UsageError
from flarec.train.answers.log import AnswerLog, Progress
from tests.checkpoints import tree

BATCHES = ["one\n", "two\nzwei ä\n", "", "three\n"]
MOMENTS = 24
"""Syncs and new names of a whole run: three of each record, one of each batch, two in the end."""
IDENTITY = {"seed": 0, "stop": ["a", "b"], "source": {"name": "m", "sha256": "1"}}


@pytest.fixture
def log(tmp_path: Path) -> AnswerLog:
    return AnswerLog(tmp_path / "made" / "data.jsonl")


def go_on(log: AnswerLog, *, resume: bool, batches: int = len(BATCHES)) -> Progress:
    """Write up to `batches` batches of one answer each; finishes after the last."""
    progress = log.begin(IDENTITY, len(BATCHES), resume=resume)
    for text in BATCHES[progress.done : batches]:
        size = progress.bytes + len(text.encode())
        progress = replace(progress, done=progress.done + 1, bytes=size, counts={"written": progress.done + 1})
        log.append(text, progress)
    return log.finish(progress) if progress.done == len(BATCHES) and progress.sha256 is None else progress


def test_whole(log: AnswerLog) -> None:
    progress = go_on(log, resume=False)
    assert log.out.read_text() == "".join(BATCHES)
    assert log.read() == progress and progress.counts == {"written": 4}
    assert sorted(path.name for path in log.out.parent.iterdir()) == ["data.jsonl", "data.jsonl.record.json"]
    assert go_on(log, resume=True) == progress, "a complete file is not written again"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(MOMENTS + 1))
def test_a_kill_at_any_moment(log: AnswerLog, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sync and every new name is a moment; what was appended and not counted is cut off again."""
    moments = 0

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal moments
            moments += 1
            if moments == at + 1:
                raise Killed
            return call(*arguments)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", before(os.fsync))
        patch.setattr(os, "replace", before(os.replace))
        try:
            go_on(log, resume=False)
            assert moments == at == MOMENTS
        except Killed:
            assert not log.out.exists() or log.out.read_text() == "".join(BATCHES)
    go_on(log, resume=log.record.exists())
    assert log.out.read_text() == "".join(BATCHES)
    assert not log.part.exists()


def test_another_run_is_not_continued(log: AnswerLog) -> None:
    go_on(log, resume=False, batches=2)
    with pytest.raises(CheckpointError, match="belongs to another run: seed was 0 and is now 1; resume with"):
        log.begin({**IDENTITY, "seed": 1}, 4, resume=True)
    with pytest.raises(UsageError, match="holds an interrupted run: continue it with --resume, or start again"):
        log.check(resume=False, overwrite=False)
    log.check(resume=True, overwrite=False)
    log.part.write_text("one")
    with pytest.raises(CheckpointError, match="cut short; start again with --overwrite"):
        log.begin(IDENTITY, 4, resume=True)


def test_an_old_file_stays_until_the_new_one_is_complete(log: AnswerLog) -> None:
    go_on(log, resume=False)
    with pytest.raises(UsageError, match=r"data.jsonl exists; choose another --out, or start again with --overwrite"):
        log.check(resume=False, overwrite=False)
    log.check(resume=False, overwrite=True)
    go_on(log, resume=False, batches=2)
    assert log.out.read_text() == "".join(BATCHES)
    go_on(log, resume=True)
    assert log.out.read_text() == "".join(BATCHES)


def written(name: str, text: str) -> Callable[[AnswerLog], None]:
    def damage(log: AnswerLog) -> None:
        (log.out.parent / name).write_text(text)

    return damage


def linked(log: AnswerLog) -> None:
    log.out.rename(log.out.with_name("elsewhere"))
    log.out.symlink_to(log.out.with_name("elsewhere"))


@pytest.mark.parametrize(
    "damage",
    [
        written("data.jsonl", "mine"), written("data.jsonl.record.json", '{"record": "flarec answers"}'),
        written("data.jsonl.record.json", "[1]"), linked, lambda log: log.record.unlink(),
        lambda log: (log.out.unlink(), log.out.mkdir()),
    ],
)
def test_files_of_others_are_never_replaced(log: AnswerLog, damage: Callable[[AnswerLog], Any]) -> None:
    go_on(log, resume=False)
    damage(log)
    before = tree(log.out.parent)
    for resume in (False, True):
        with pytest.raises(UsageError, match="choose another --out"):
            log.check(resume=resume, overwrite=True)
    assert tree(log.out.parent) == before


def test_nothing_to_resume(log: AnswerLog) -> None:
    with pytest.raises(UsageError, match="there is nothing to resume"):
        log.check(resume=True, overwrite=False)


def test_a_full_disk(log: AnswerLog, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = go_on(log, resume=False, batches=1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrainingError, match=r"cannot write .*No space left on device; free space .* --resume"):
            log.append("lost\n", progress)
    go_on(log, resume=True)
    assert log.out.read_text() == "".join(BATCHES)
