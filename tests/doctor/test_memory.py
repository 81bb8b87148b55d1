"""Memory of a whole conversion: a step or an evaluation, the process itself, and what to do where it is too much."""

from __future__ import annotations

from pathlib import Path

import torch

from flarec.device import memory_of, resident
from flarec.doctor.estimates import too_small, whole_memory
from flarec.doctor.report import Memory
from flarec.recipe import load_recipe

STEP = Memory({"weights": 100, "gradients": 100, "AdamW moments": 200, "activations": 5000})


def test_an_evaluation_counts_where_it_needs_more_than_a_step() -> None:
    recipe = load_recipe("draft").override(["evaluation.prompts=4", "evaluation.max_new_tokens=10"])
    small = whole_memory(STEP, (1, 1), recipe, 100, 50)
    assert small.parts == {**STEP.parts, "Python and libraries": 50} and small.total == 5450
    large = whole_memory(STEP, (1000, 10), recipe, 100, 0)
    assert large.parts["caches of an evaluation"] == 4 * (1000 + 10 * 110) and "activations" not in large.parts
    never = recipe.override(["evaluation.every=0"])
    assert whole_memory(STEP, (1000, 10), never, 100, 0).total == STEP.total


def test_a_machine_that_is_too_small_is_said_with_rows_that_fit() -> None:
    asked: list[int] = []

    def needs(length: int) -> int:
        asked.append(length)
        return length * 10**7

    assert too_small(10, 10, 2048, 4, needs) == too_small(10, None, 2048, 4, needs) == ()
    said = too_small(20_480_000_000, 6_000_000_000, 2048, 4, needs)
    assert said == (
        "this machine is too small: 20.5 GB are needed, and it has 6.0 GB", "--max-length 512 needs 5.1 GB",
    )
    assert asked == [1024, 512]
    assert "no length of rows is short enough" in too_small(10**12, 10, 16, 4, lambda length: 10**11)[-1]


def test_memory_of_a_machine(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert memory_of(cpu, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 5 kB\n")
    assert memory_of(cpu, tmp_path) == 1_024_000
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert memory_of(cpu, tmp_path) == 1_024_000
    (group / "memory.max").write_text("500\n")
    assert memory_of(cpu, tmp_path) == 500


def test_what_a_process_has(tmp_path: Path) -> None:
    status = tmp_path / "status"
    assert resident(status) == (0, 0)
    status.write_text("Name: x\nVmHWM:\t 30 kB\nVmRSS:\t 20 kB\n")
    assert resident(status) == (20 * 1024, 30 * 1024)
