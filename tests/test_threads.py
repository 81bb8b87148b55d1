"""Threads of the commands: how many, and how they wait. Nothing here depends on the machine that runs it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flarec import threads
from flarec.threads import PASSIVE, ThreadChoice, choose, cores, others_running, quota, settle, threads_for


@pytest.mark.parametrize(("parameters", "available", "others", "expected"), [
    (200_000, 64, 0, 1),              # operators too short to be shared
    (3_600_000, 2, 0, 2),
    (3_600_000, 64, 0, 2),
    (135_000_000, 2, 0, 2),
    (135_000_000, 64, 0, 64),
    (135_000_000, 64, 60, 4),         # threads that wait in a loop take no core from others
    (135_000_000, 2, 5, 1),
])
def test_how_many(parameters: int, available: int, others: int, expected: int) -> None:
    assert threads_for(parameters, available, others) == expected


def test_threads_sleep_while_they_wait() -> None:
    environment = {"HOME": "/nowhere"}
    assert choose(environment, loaded=False) == ThreadChoice(own=None, passive=True)
    assert environment == {"HOME": "/nowhere", **PASSIVE}


@pytest.mark.parametrize("given", [
    {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "200"},
])
def test_what_the_user_set_stays(given: dict[str, str]) -> None:
    environment = given | {"OMP_NUM_THREADS": "3"}
    assert choose(environment, loaded=False) == ThreadChoice(own="OMP_NUM_THREADS", passive=False)
    assert environment == given | {"OMP_NUM_THREADS": "3"}


def test_behind_the_import_of_torch_it_is_too_late() -> None:
    environment: dict[str, str] = {}
    assert choose(environment, loaded=True) == ThreadChoice(own=None, passive=False)
    assert not environment


def test_a_command_chooses_before_torch_is_imported() -> None:
    code = (
        "import os, sys; from flarec.cli import main; main.make_context('flarec', ['passes']);"
        "print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))}
    run = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "PASSIVE"]


def test_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_settled", None)
    monkeypatch.setattr(threads, "cores", lambda: 6)
    monkeypatch.setattr(threads, "others_running", lambda: 4)
    try:
        for choice, count in (
            (None, before), (ThreadChoice("OMP_NUM_THREADS", True), before),
            (ThreadChoice(None, True), 6), (ThreadChoice(None, False), 2),
        ):
            monkeypatch.setattr(threads, "_choice", choice)
            settle(135_000_000)
            assert torch.get_num_threads() == count
            assert threads.said().startswith(f"threads: {count} on 6 cores")
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)


def test_the_quota_of_a_control_group(tmp_path: Path) -> None:
    assert quota(tmp_path) == math.inf and cores(tmp_path) >= 1
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert quota(tmp_path) == math.inf
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    assert quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert quota(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert quota(tmp_path) == 0.5 and cores(tmp_path) == 1


def test_who_else_computes(tmp_path: Path) -> None:
    statistics = tmp_path / "stat"
    statistics.write_text("cpu 1 2 3\nprocs_running 4\nprocs_blocked 0\n")
    assert others_running(statistics) == 3
    statistics.write_text("procs_running 1\n")
    assert others_running(statistics) == 0
    assert others_running(tmp_path / "nothing") >= 0
