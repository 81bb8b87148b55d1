"""What train.memory = auto chooses, from what is free, and that it says so; a run goes on as it began."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flarec.device import free_memory
from flarec.recipe import Recipe
from flarec.train.data.packing import full_rows
from flarec.train.loop import Trainer
from flarec.train.memory import USED, Kept, RowNeeds, choose, decide, measure_row, state_bytes
from tests.train.small_run import adapter_recipe, recipe, small

GB = 10**9
NEEDS = RowNeeds(kept=10 * GB, again=2 * GB)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("free", "recompute", "rows", "words"),
    [
        (60, False, 4, "everything is kept, 4 rows at a time: 45.0 GB of 60.0 GB that are free"),
        (40, False, 2, "2 rows at a time: 25.0 GB of 40.0 GB that are free; optimizer.micro_rows = 4 would need 45.0"),
        (17, False, 1, "everything is kept, 1 row at a time: 15.0 GB of 17.0 GB"),
        (15, True, 4, "layers are computed again, 4 rows at a time: 13.0 GB of 15.0 GB that are free; keeping "
                      "everything would need 15.0 GB for 1 row"),
        (8, True, 1, "layers are computed again, 1 row at a time: 7.0 GB of 8.0 GB"),
        (7, True, 1, "7.0 GB are needed for 1 row, layers computed again, and only 7.0 GB are free; lower"),
    ],
)
def test_fewer_rows_come_before_computing_again(free: int, recompute: bool, rows: int, words: str) -> None:
    """Weights need 5 GB; a tenth of what is free stays so."""
    found = decide(NEEDS, 5 * GB, free * GB, [4, 2, 1])
    assert (found.recompute, found.micro_rows, found.enough) == (recompute, rows, free > 7)
    assert words in found.text and found.text.startswith("memory: ") and "\n" not in found.text


def test_the_logits_of_a_chunk_are_there_once() -> None:
    """With 1 GB of a row when the losses are made, and 3 GB more for up to two rows' worth of logits."""
    needs = RowNeeds(kept=10 * GB, again=2 * GB, between=GB, head=3 * GB, head_rows=2)
    assert [needs.of(rows, recompute=True) for rows in (1, 2, 4, 8)] == [4 * GB, 8 * GB, 10 * GB, 16 * GB]
    assert [needs.of(rows, recompute=False) for rows in (1, 2, 8)] == [12 * GB, 24 * GB, 80 * GB]


def test_rows_of_a_run_that_goes_on_stay() -> None:
    assert decide(NEEDS, 5 * GB, 40 * GB, [4]).recompute and decide(NEEDS, 5 * GB, 40 * GB, [4]).micro_rows == 4


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_choice_is_for_what_is_measured(name: str) -> None:
    """Of rows that are far from the limit nothing is measured; near it each way of training gets its own."""
    adapter = name == "adapter"
    rows = ["optimizer.batch_rows=4", "optimizer.micro_rows=4"]
    chosen = adapter_recipe(*rows) if adapter else recipe("flare", *rows)
    run = small("qwen3_5_text", "vector", chosen=adapter_recipe()) if adapter else small("qwen3_5_text")
    program, mask = run.program, run.mask
    needs, state = measure_row(program, chosen, mask), state_bytes(program, chosen, 1)
    trained = sum(value.numel() for value in run.trainer(chosen).parameters.values())
    assert state == 12 * trained, "gradients and moments; the masters are the parameters"
    in_codes = chosen.override(["optimizer.moments=8bit"])
    coded = run.trainer(in_codes).weights
    assert state_bytes(program, in_codes, 1) == 4 * trained + coded.moment_bytes
    assert (coded.moment_bytes < 2.6 * trained) != adapter, "of this adapter every part is too small"
    assert coded.bytes - coded.moment_bytes == run.trainer(chosen).weights.bytes - 8 * trained
    assert 0 < needs.again < needs.kept
    assert all(value.grad is None for value in program.parameters().values())
    far = choose(program, chosen, mask, 1, free=GB)
    assert (far.recompute, far.micro_rows) == (False, 4) and "far from the 1.0 GB" in far.text
    for room, expected in ((5 * needs.kept, (False, 4)), (2 * needs.kept, (False, 2)), (needs.kept - 1, (True, None))):
        found = choose(program, chosen, mask, 1, free=round((state + room) / USED) + 1)
        assert found.enough and (found.recompute, found.micro_rows if expected[1] else None) == expected, found.text
    assert choose(program, chosen, mask, 1, free=state).enough is False
    applied = found.apply(chosen)
    assert applied.train.memory == "recompute" and applied.optimizer.micro_rows == found.micro_rows
    assert chosen.train.memory == "auto", "the recipe of the run stays"


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_what_the_recipe_says_is_taken_and_said(memory: str) -> None:
    run, chosen = small("qwen3_5_text"), recipe("flare", f"train.memory={memory}")
    found = choose(run.program, chosen, run.mask, 1, free=1)
    assert (found.recompute, found.micro_rows) == (memory == "recompute", 1)
    assert f"train.memory = {memory}" in found.text


def test_what_a_row_needs_is_about_what_autograd_keeps() -> None:
    """With everything kept: the layers and what is around them, counted once more on the program itself."""
    run, chosen = small("qwen3_5_text"), recipe("flare", "data.max_length=64")
    needs = measure_row(run.program, chosen, run.mask)
    one: Recipe = chosen.override(["optimizer.batch_rows=1", "optimizer.micro_rows=1"])
    trainer = Trainer(run.program, one, run.mask, full_rows(64, 1), 0)
    with Kept(run.program) as kept:
        trainer.accumulate(trainer.feed.take(0).batches)
    trainer.weights.forget()
    assert kept.bytes <= needs.kept <= 2 * kept.bytes


def test_free_memory_of_a_machine(tmp_path: Path) -> None:
    assert free_memory(CPU, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  1000 kB\nMemAvailable: 500 kB\n")
    assert free_memory(CPU, tmp_path) == 512_000
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100\n")
    (group / "memory.stat").write_text("anon 60\ninactive_file 40\n")
    assert free_memory(CPU, tmp_path) == 512_000
    (group / "memory.max").write_text("400\n")
    assert free_memory(CPU, tmp_path) == 340, "cached files give way"
