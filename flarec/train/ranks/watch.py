"""Ranks that watch each other: the end of one is known to all within a minute, whatever they wait for.

Every rank keeps a beat in the store that all of them share, and reads those of the others. One that fails writes why;
one that was killed is noticed by its process on the same machine, elsewhere by its beat. A rank that then hangs in a
call that nothing interrupts (a collective on a GPU, whose partner is gone) is ended from here: what it may leave
behind is what kill -9 leaves, and the next run copes with that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ...base.lock import Process

BEAT_SECONDS, SILENT_SECONDS, GRACE_SECONDS = 1.0, 40.0, 10.0
"""Between two beats; without a beat until a rank counts as lost; from the news of a failure to the end of a rank that
does not end by itself. Together they are less than a minute."""
LONGEST_ROUND = 5.0
"""Seconds that a round counts for at most: a machine that was suspended has not waited for the others meanwhile."""
_FAILURE, _TOLD, _LEFT = "failure", "told", "left"


@dataclass(frozen=True)
class Failure:
    """Why a rank ended. killed: without a word of its own."""

    rank: int
    text: str
    killed: bool = False

    def __str__(self) -> str:
        if not self.killed:
            return f"rank {self.rank} stopped: {self.text}"
        return f"rank {self.rank} {self.text}; start all ranks again, with --resume if there is a save"


@dataclass(frozen=True)
class _Member:
    """A rank's process, and in which space of process numbers it is one."""

    process: Process
    space: str

    @staticmethod
    def current() -> _Member:
        space = ""
        with contextlib.suppress(OSError):
            space = os.readlink("/proc/self/ns/pid")
        return _Member(Process.current(), space)

    @staticmethod
    def read(text: bytes) -> _Member:
        table = json.loads(text)
        return _Member(Process(**table["process"]), table["space"])

    def has_ended(self, own: _Member) -> bool:
        """Whether it surely has: it is of this machine, and there is no such process."""
        near = (self.process.host, self.process.boot, self.space) == (own.process.host, own.process.boot, own.space)
        return near and self.process.runs() is False


class RankWatch:
    """The beats of `size` ranks in a `torch.distributed.Store` that nobody else of this process uses.

    `start` makes a thread that takes a `round` every second.
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.clock, self.end = clock, end
        self.failure: Failure | None = None
        self.alone = False
        """Whether the store is gone."""
        self.found_at = 0.0
        self.looked, self.awake = clock(), 0.0
        self.own = _Member.current()
        self.members: dict[int, _Member] = {}
        self.beats: dict[int, tuple[bytes, float]] = {}
        self.rounds = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        store.set(f"member/{rank}", json.dumps(asdict(self.own)))
        store.set(f"beat/{rank}", "0")

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def start(self) -> None:
        """Look every second from now on. Every rank must have made its `RankWatch`."""
        self._thread = threading.Thread(target=self._run, name="flarec-ranks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self.round()

    def round(self) -> None:
        """`look`, and the end of this process if it has known of a failure for too long."""
        self.look()
        if self.failure is not None and self.clock() - self.found_at > GRACE_SECONDS and not self._stop.is_set():
            self._end_here()

    def _end_here(self) -> None:
        """The end of a process whose main thread does not come back."""
        if self.tells():
            with contextlib.suppress(OSError, ValueError):
                print(f"Error: {self.failure}", file=sys.stderr, flush=True)
        self.end(1)

    def look(self) -> Failure | None:
        """One beat, and what became of the others: the first failure of any rank."""
        with self._lock:
            now = self.clock()
            self.awake += min(now - self.looked, LONGEST_ROUND)
            self.looked = now
            try:
                self.rounds += 1
                self.store.set(f"beat/{self.rank}", str(self.rounds))
                if self.failure is None and self.store.check([_FAILURE]):
                    self._note(Failure(**json.loads(self.store.get(_FAILURE))))
                lost = next(self._lost(), None) if self.failure is None else None
            except RuntimeError:  # torch's errors of a store: it lives in the first rank, or in its launcher
                lost, self.alone = None, True
                if self.failure is None:
                    self._note(Failure(0, "cannot be reached any more: it was killed, or the network is down", True))
            if lost is not None:
                self._publish(lost)
            return self.failure

    def _lost(self) -> Iterator[Failure]:
        now, others = self.awake, self.others
        if not self.members:
            found = self.store.multi_get([f"member/{rank}" for rank in others])
            self.members = {rank: _Member.read(text) for rank, text in zip(others, found, strict=True)}
        found = self.store.multi_get([f"beat/{rank}" for rank in others])
        for rank, beat in zip(others, found, strict=True):
            before, since = self.beats.get(rank, (b"", now))
            self.beats[rank] = beat, since if beat == before else now
            name = self.members[rank].process.describe()
            if self.members[rank].has_ended(self.own):
                yield Failure(rank, f"({name}) has ended without a word: it was killed, or memory ran out", True)
            elif now - self.beats[rank][1] > SILENT_SECONDS:
                yield Failure(rank, f"({name}) has not answered for {SILENT_SECONDS:.0f} seconds", True)

    def report(self, text: str) -> Failure:
        """Tell the others that this rank stops. Returns the failure that came first, of whatever rank."""
        own = Failure(self.rank, text)
        with self._lock:
            if self.failure is None:
                try:
                    self._publish(own)
                except RuntimeError:
                    self._note(own)
            return self.failure or own

    def _publish(self, failure: Failure) -> None:
        """The first one stays in the store, and is what all ranks know."""
        self._note(Failure(**json.loads(self.store.compare_set(_FAILURE, "", json.dumps(asdict(failure))))))

    def _note(self, failure: Failure) -> None:
        self.failure, self.found_at = failure, self.clock()

    def wait_for(self, found: Callable[[], bool], seconds: float) -> bool:
        """Whether it comes true within so many seconds; asked ten times a second."""
        until = self.clock() + seconds
        while not found():
            if self.clock() >= until:
                return False
            time.sleep(0.1)
        return True

    def tells(self) -> bool:
        """Whether this rank is the one that says why all of them stop: the first one, another if that does not.

        The first rank then waits for the others to have heard of it, since the store may end with it.
        """
        killed = self.failure.rank if self.failure is not None and self.failure.killed else None
        if self.alone:
            return True
        try:
            if self.rank == 0:
                self.store.set(_TOLD, "1")
                alive = self.size - 1 - (killed is not None)
                self.wait_for(lambda: self.store.add(_LEFT, 0) >= alive, GRACE_SECONDS / 2)
                return True
            told = killed != 0 and self.wait_for(lambda: self.store.check([_TOLD]), 1.5 * GRACE_SECONDS)
            self.store.add(_LEFT, 1)
            return not told
        except RuntimeError:
            return True

    def leave(self) -> None:
        """The orderly end, behind a last barrier of all ranks. The first rank leaves last."""
        self.stop()
        with contextlib.suppress(RuntimeError):
            if self.rank:
                self.store.add(_LEFT, 1)
            else:
                self.wait_for(lambda: self.store.add(_LEFT, 0) >= self.size - 1, GRACE_SECONDS)
