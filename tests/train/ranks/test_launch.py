"""Which rank a process is, from the environment of a launcher: one clear sentence for what cannot be."""

from __future__ import annotations

import pytest
import torch

from flarec.errors import UsageError
from flarec.train.feed import micro_rows_of
from flarec.train.ranks.launch import Launch
from tests.train.small_run import recipe

GIVEN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_process_without_a_launcher_is_alone() -> None:
    assert Launch.of_environment({}) is None
    assert Launch.of_environment({"LOCAL_RANK": "0", "MASTER_ADDR": "x"}) is None
    assert Launch.of_environment({"RANK": "", "WORLD_SIZE": ""}) is None


def test_one_of_one_needs_no_place_to_meet() -> None:
    assert Launch.of_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Launch(0, 1, 0, "", 0)
    assert Launch.of_environment({"WORLD_SIZE": "1"}) == Launch(0, 1, 0, "", 0), "left over from something else"
    assert Launch.of_environment(GIVEN) == Launch(1, 4, 1, "node0", 29500)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    there = "WORLD_SIZE" if name == "RANK" else "RANK"
    with pytest.raises(UsageError, match=rf"^{there} is set and {name} is not: start with torchrun or accelerate"):
        Launch.of_environment({key: value for key, value in GIVEN.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("RANK", "4", "0 to 3"), ("RANK", "-1", "0 to 3"), ("RANK", "one", "0 to 3"), ("RANK", "²", "0 to 3"),
        ("WORLD_SIZE", "0", "a number from 1"), ("WORLD_SIZE", "9" * 5000, "a number from 1"),
        ("LOCAL_RANK", "2", "0 to 1"), ("MASTER_PORT", "0", "1 to 65535"), ("MASTER_PORT", "65536", "1 to 65535"),
    ],
)
def test_a_variable_out_of_range_is_named(name: str, value: str, allowed: str) -> None:
    with pytest.raises(UsageError) as caught:
        Launch.of_environment({**GIVEN, name: value})
    assert str(caught.value) == f"{name} is '{value}' in the environment; it has to be {allowed}"


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(1, 2, 1, "node0", 29500)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.device("auto") == launch.device("cuda") == "cuda:1" and launch.device("cpu") == "cpu"
    with pytest.raises(UsageError, match="--device cuda:0 is one GPU, and each of 2 ranks takes the one of its LOCAL"):
        launch.device("cuda:0")
    assert Launch(0, 1, 0, "", 0).device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="rank 1 has no GPU: its LOCAL_RANK is 1 and 1 is visible; start one process"):
        launch.device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.device("auto") == "cpu"


@pytest.mark.parametrize(("rows", "micro", "ranks", "found"), [
    (8, 1, 4, 1), (8, 8, 2, 4), (8, 4, 2, 4), (6, 2, 1, 2), (8, 16, 2, 4), (8, 16, 1, 8), (6, 9, 1, 6),
])
def test_rows_of_a_pass_on_every_rank(rows: int, micro: int, ranks: int, found: int) -> None:
    """A pass of more rows than a rank has is one of all its rows, on one rank as on several."""
    chosen = recipe("draft", f"optimizer.batch_rows={rows}", f"optimizer.micro_rows={micro}")
    assert micro_rows_of(chosen, ranks) == found


def test_rows_that_cannot_be_split() -> None:
    chosen = recipe("draft", "optimizer.batch_rows=12", "optimizer.micro_rows=4")
    with pytest.raises(UsageError, match="batch_rows = 12 cannot be split over 5 ranks; choose a multiple of 5"):
        micro_rows_of(chosen, 5)
    with pytest.raises(UsageError, match=r"2 ranks is 6 rows for each, which .*micro_rows = 4 does not divide; "):
        micro_rows_of(chosen, 2)
