"""The answers on disk: a file of lines that grows, is cut back to its last complete batch, and appears whole.

    DATA.jsonl              the answers, once they are all there
    DATA.jsonl.partial      the answers so far
    DATA.jsonl.record.json  what the run was started with, how far it is, and in the end the file's hash

A batch is appended and on the disk before the record counts it, so that an interruption at any moment loses only the
running batch. Nothing is replaced but what a record names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...base.files import flush, replace_file
from ...base.hashes import sha256_of
from ...errors import CheckpointError, UsageError
from ..state import differences, writing

RECORD, RECORD_VERSION = "flarec answers", 2


@dataclass(frozen=True)
class Progress:
    """What a record says.

    identity  what decides the answers: a resumed run must agree
    done      answers asked for so far, `total` of them in all; bytes: what they take in the file
    counts    what became of them
    sha256    of the file once it is complete, else None
    replaces  the hash of an earlier file of this command that makes room in the end
    """

    identity: dict[str, Any]
    total: int
    done: int = 0
    bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    sha256: str | None = None
    replaces: str | None = None


class AnswerLog:
    """The files of one run of `flarec answers`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.part = out.with_name(f"{out.name}.partial")
        self.record = out.with_name(f"{out.name}.record.json")

    @property
    def paths(self) -> list[Path]:
        return [self.out, self.part, self.record]

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise `UsageError` if a run cannot begin (or go on, with `resume`); changes nothing."""
        progress = self.read()
        if progress is None:
            if resume:
                raise UsageError(f"there is nothing to resume: {self.record} does not exist; start without --resume")
            return
        if resume:
            return
        if not overwrite:
            what = f"{self.part} holds an interrupted run: continue it with --resume"
            what = what if progress.sha256 is None else f"{self.out} exists; choose another --out"
            raise UsageError(f"{what}, or start again with --overwrite")

    def read(self) -> Progress | None:
        """What the record says; None if there is no run under this name. Raises `UsageError` for files of others."""
        there = [path for path in self.paths if os.path.lexists(path)]
        if not there:
            return None
        for path in there:
            if path.is_symlink() or not path.is_file():
                raise UsageError(f"{path} is not a file that `flarec answers` wrote; choose another --out")
        progress = self._parsed()
        if progress is None:
            raise UsageError(
                f"{there[0]} has no record of `flarec answers` that this version can read ({self.record.name}); "
                "nothing is replaced: move it away or choose another --out"
            )
        known = progress.replaces if progress.sha256 is None or self.part in there else progress.sha256
        if self.out in there and known != sha256_of(self.out):
            raise UsageError(f"{self.out} is not as `flarec answers` wrote it; move it away or choose another --out")
        return progress

    def begin(self, identity: Mapping[str, Any], total: int, *, resume: bool) -> Progress:
        """Start, or go on where the last complete batch ends. `identity` is of JSON's values.

        Raises `CheckpointError` if another run is under way.
        """
        progress = self.read()
        if resume and progress is not None:
            changed = differences(progress.identity, identity)
            if changed:
                raise CheckpointError(
                    f"{self.record} belongs to another run: {'; '.join(changed[:3])}; resume with what the run was "
                    "started with, or start again with --overwrite"
                )
            if progress.sha256 is not None:
                self._settle()
                return progress
            with writing(self.part):
                if progress.bytes > (self.part.stat().st_size if self.part.exists() else 0):
                    raise CheckpointError(f"{self.part} is missing or cut short; start again with --overwrite")
                with open(self.part, "ab") as file:
                    file.truncate(progress.bytes)
            return progress
        replaces = sha256_of(self.out) if self.out.exists() else None
        fresh = Progress(dict(identity), total, replaces=replaces)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {self.out.parent}: {error.strerror}; choose another --out") from error
        self._note(fresh)
        with writing(self.part), open(self.part, "wb"):
            pass
        return fresh

    def append(self, text: str, progress: Progress) -> None:
        """Add the lines of a batch; `progress` counts them."""
        with writing(self.part):
            with open(self.part, "ab") as file:
                file.write(text.encode())
            flush(self.part)
        self._note(progress)

    def finish(self, progress: Progress) -> Progress:
        """The file appears under its own name."""
        complete = replace(progress, sha256=sha256_of(self.part))
        self._note(complete)
        self._settle()
        return complete

    def _settle(self) -> None:
        with writing(self.out):
            if self.part.exists():
                os.replace(self.part, self.out)
                flush(self.out.parent)

    def _note(self, progress: Progress) -> None:
        table = {"record": RECORD, "format_version": RECORD_VERSION, **asdict(progress)}
        with writing(self.record):
            part = self.record.with_name(f"{self.record.name}.writing")
            replace_file(self.record, json.dumps(table, indent=1, ensure_ascii=False) + "\n", part)

    def _parsed(self) -> Progress | None:
        try:
            table = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(table, dict) or (table.pop("record", None), table.pop("format_version", None)) != (
            RECORD, RECORD_VERSION,
        ):
            return None
        numbers = all(type(table.get(name)) is int for name in ("total", "done", "bytes"))
        tables = all(isinstance(table.get(name), dict) for name in ("identity", "counts"))
        known = table.keys() == {item.name for item in fields(Progress)}
        return Progress(**table) if numbers and tables and known else None
