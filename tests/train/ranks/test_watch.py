"""Ranks that watch each other, round by round, on a clock of the test's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch.distributed as dist

from flarec.train.ranks.watch import GRACE_SECONDS, SILENT_SECONDS, Failure, RankWatch

AGAIN = "; start all ranks again, with --resume if there is a save"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Pair:
    """Two ranks in this process, with one store; `ended` are the ranks that were ended from outside."""

    def __init__(self) -> None:
        self.clock, self.ended = Clock(), list[int]()
        self.store = dist.HashStore()  # type: ignore[attr-defined]
        self.watches = [RankWatch(self.store, rank, 2, clock=self.clock, end=self.ender(rank)) for rank in range(2)]

    def ender(self, rank: int) -> Callable[[int], object]:
        return lambda code: self.ended.append(rank)

    def look(self, *ranks: int) -> list[Failure | None]:
        return [self.watches[rank].look() for rank in ranks]

    def pass_by(self, seconds: float) -> list[Failure | None]:
        """What the first rank finds in the end, when it looks every second."""
        for _ in range(int(seconds)):
            self.clock.now += 1
            found = self.look(0)
        return found


def test_ranks_that_beat_have_not_failed() -> None:
    pair = Pair()
    for _ in range(5):
        assert pair.pass_by(SILENT_SECONDS - 1) == [None]
        assert pair.look(1, 0) == [None, None]


def test_the_first_failure_is_what_all_ranks_know() -> None:
    pair = Pair()
    pair.look(0, 1)
    own = pair.watches[1].report("the disk is full")
    assert own == Failure(1, "the disk is full") and str(own) == "rank 1 stopped: the disk is full"
    assert pair.watches[0].report("rank 1 does not answer") == own
    assert pair.look(0, 1) == [own, own]


def test_a_rank_without_a_beat_is_lost() -> None:
    """One of another machine, of whose processes nothing is known here."""
    pair = Pair()
    other = replace(pair.watches[1].own, process=replace(pair.watches[1].own.process, host="node1", pid=1))
    pair.store.set("member/1", json.dumps(asdict(other)))
    assert pair.look(0, 1, 0) == [None, None, None]
    assert pair.pass_by(SILENT_SECONDS) == [None]
    (failure,) = pair.pass_by(1)
    assert str(failure) == f"rank 1 (process 1 on node1) has not answered for 40 seconds{AGAIN}"
    assert pair.look(1) == [failure], "the lost one hears of it, should it still be there"


def test_ranks_that_were_suspended_together_go_on() -> None:
    """A scheduler stops all processes for an hour; the one that goes on first does not take the others for lost."""
    pair = Pair()
    pair.look(0, 1, 0)
    pair.clock.now += 3600
    assert pair.look(0, 0, 1, 0) == [None] * 4


@pytest.mark.parametrize("change", [{"pid": 2**31 - 2}, {"started": 1}])
def test_a_process_of_this_machine_that_is_gone_is_lost_at_once(change: dict[str, Any]) -> None:
    pair = Pair()
    gone = replace(pair.watches[1].own, process=replace(pair.watches[1].own.process, **change))
    pair.store.set("member/1", json.dumps(asdict(gone)))
    (failure,) = pair.look(0)
    assert failure is not None and failure.killed
    assert str(failure).endswith(f"has ended without a word: it was killed, or memory ran out{AGAIN}")


def test_a_process_of_another_container_is_judged_by_its_beat() -> None:
    pair = Pair()
    away = replace(pair.watches[1].own, process=replace(pair.watches[1].own.process, pid=2**31 - 2), space="pid:[1]")
    pair.store.set("member/1", json.dumps(asdict(away)))
    assert pair.look(0) == [None]


class Gone:
    """A store whose process was killed."""

    def __getattr__(self, name: str) -> object:
        def fail(*_: object) -> None:
            raise dist.DistNetworkError("Broken pipe")

        return fail


def test_without_a_store_the_first_rank_is_gone_and_this_one_tells() -> None:
    pair = Pair()
    watch = pair.watches[1]
    watch.store = Gone()
    assert str(watch.look()) == f"rank 0 cannot be reached any more: it was killed, or the network is down{AGAIN}"
    assert watch.tells() and watch.report("Connection closed by peer") == watch.failure


def test_a_rank_that_hangs_is_ended_a_while_after_the_news(capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair()
    first, second = pair.watches
    second.report("the disk is full")
    first.round()
    pair.clock.now += GRACE_SECONDS
    first.round()
    assert pair.ended == []
    pair.clock.now += 1
    pair.store.add("left", 1)  # the second one is on its way out
    first.round()
    assert pair.ended == [0] and capsys.readouterr().err == "Error: rank 1 stopped: the disk is full\n"
    second.round()
    assert pair.ended == [0, 1] and capsys.readouterr().err == "", "the first one has told"


def test_one_of_two_ranks_tells() -> None:
    pair = Pair()
    pair.watches[1].report("x")
    pair.store.add("left", 1)
    assert pair.watches[0].tells()
    assert not pair.watches[1].tells()


def test_a_rank_tells_of_the_first_one_that_was_killed() -> None:
    pair = Pair()
    pair.watches[1].failure = Failure(0, "has ended", killed=True)
    assert pair.watches[1].tells()


def test_beats_together_are_less_than_a_minute() -> None:
    assert SILENT_SECONDS + GRACE_SECONDS < 60
