"""A run that is stopped, shortened, extended and written out early: what was trained stays, and the record says so."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flarec.base.lock import OutputLock
from flarec.checkpoint.manifest import Manifest
from flarec.errors import CheckpointError
from flarec.recipe import load_recipe
from flarec.train.advice import about_repeats, after_training, before_training
from flarec.train.identity import check_identity, continued
from flarec.train.metrics import read_metrics
from flarec.train.state import StateDirectory
from tests.checkpoints import tree
from tests.cli.conversions import QUICK, flarec, place_of_conversions

COMMAND = ["convert", "source", "--data", "data.jsonl", *QUICK, "--set", "save.every=5"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return place_of_conversions(tmp_path, monkeypatch)


def manifest_of(out: Path) -> Manifest:
    manifest = Manifest.read(out)
    assert manifest is not None
    manifest.check_files(out)
    return manifest


def test_stopped_written_out_and_shortened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a constant rate a run that is shortened has the weights of one that was as short from its start."""
    assert flarec(*COMMAND, "--steps", "4", "--out", "whole").exit_code == 0
    stopped = flarec(*COMMAND, "--steps", "9", "--out", "out", "--stop-after", "2")
    assert stopped.exit_code == 0, stopped.output
    assert "Stopped: step 2 is saved, as asked. Continue with" in stopped.stderr
    command = shlex.split(stopped.stderr.splitlines()[-1])[1:]
    assert command[-1] == "--resume" and "--stop-after" not in command
    assert not (place / "out").exists()

    with OutputLock(place / "out"):
        busy = flarec("finish", place / "out.partial")
        assert (busy.exit_code, "is being written by process" in busy.stderr) == (2, True), busy.stderr
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    early = flarec("finish", place / "out.partial", "--keep")
    assert early.exit_code == 0, early.output
    assert "trained" in early.stderr and "in 2 of 9 steps" in early.stderr
    assert "out.partial is kept. Go on with" in early.stderr
    kept = shlex.split(early.stderr.splitlines()[-1])[1:]
    assert {"--resume", "--overwrite"} <= {*kept}
    again = flarec("finish", place / "out.partial", "--keep")  # as after a kill behind the last rename
    assert (again.exit_code, "nothing is left to do" in again.stderr) == (0, True), again.stderr
    monkeypatch.chdir(place)
    manifest = manifest_of(place / "out")
    assert (manifest.data["steps"], manifest.data["planned_steps"]) == (2, 9)
    assert sorted(manifest.metrics["held_out"]) == ["step 0", "step 2"]
    assert "| steps | 2 |" in (place / "out" / "README.md").read_text()

    before = tree(place)
    for more, words in (
        (["--steps", "1"], "step 2 is saved, so the run cannot end at step 1; give --steps 2 or more"),
        (["--seed", "3"], "seed was 0 and is now 3"),
        (["--stop-after", "2"], "step 2 is saved already"),
        (["--stop-after", "9"], "--stop-after 9 is not before the last step, 9"),
        (["--steps", "4"], "out is not empty"),
    ):
        result = flarec(*command, *more)
        assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
        assert tree(place) == before

    short = flarec(*kept, "--steps", "4")
    assert short.exit_code == 0, short.output
    assert "optimizer.steps was 9 and is now 4: steps 1 to 2 stay as they are; from step 3" in short.stderr
    manifest = manifest_of(place / "out")
    assert (manifest.data["steps"], "planned_steps" in manifest.data) == (4, False)
    assert manifest.data["schedule_steps"] == {"from step 1": 9, "from step 3": 4}
    assert "| schedule_steps, from step 3 | 4 |" in (place / "out" / "README.md").read_text()
    weights = "model.safetensors"
    assert (place / "out" / weights).read_bytes() == (place / "whole" / weights).read_bytes()
    logged = [(line["step"], "evaluation" in line) for line in read_metrics(place / "out" / "metrics.jsonl")]
    assert logged == [(0, True), (1, False), (2, False), (3, False), (4, False), (4, True)]
    assert not (place / "out.partial").exists()

    long = flarec(*command, "--steps", "12")
    assert (long.exit_code, "out is complete with 4 steps" in long.stderr) == (2, True), long.stderr


def test_extended_by_a_schedule_that_follows(place: Path) -> None:
    """A linear decay to the new end; finishing at once is resuming at the saved step."""
    linear = [*COMMAND, "--set", "optimizer.schedule=linear", "--set", "evaluation.every=0", "--out", "out"]
    at = linear.index("--steps")
    unsaid = linear[:at] + linear[at + 2 :]
    assert flarec(*linear, "--steps", "4", "--stop-after", "2").exit_code == 0
    long = flarec(*linear, "--steps", "8", "--resume", "--stop-after", "3")
    assert "is now 8" in long.stderr, long.stderr
    other = flarec(*unsaid, "--set", "optimizer.steps=7", "--resume")  # not by --steps
    assert (other.exit_code, "recipe.optimizer.steps was 8 and is now 7" in other.stderr) == (2, True), other.stderr
    now = flarec(*linear, "--steps", "3", "--resume")
    assert now.exit_code == 0, now.output
    rates = [line["lr"] for line in read_metrics(place / "out" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.75e-3])  # (4 - step) / 4 twice, then (8 - 2) / 8
    assert manifest_of(place / "out").data["schedule_steps"] == {"from step 1": 4, "from step 3": 8, "from step 4": 3}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "holds no run"),
        (lambda path: path.mkdir(), "holds no run"),
        (lambda path: (path.mkdir(), (path / "mine").write_text("")), "has no record of a run of flarec"),
    ],
)
def test_nothing_to_finish(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "out.partial")
    result = flarec("finish", tmp_path / "out.partial")
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    result = flarec("finish", tmp_path / "out")
    assert (result.exit_code, "is not called OUT.partial" in result.stderr) == (2, True), result.stderr


def test_horizons() -> None:
    assert continued([(0, 40)], 12, 40) == [(0, 40)]
    assert continued([(0, 40)], 12, 60) == [(0, 40), (12, 60)]
    assert continued([(0, 40), (12, 60)], 12, 50) == [(0, 40), (12, 50)]  # nothing was trained with 60
    assert continued([(0, 40), (12, 60)], 12, 40) == [(0, 40)]
    assert continued([[0, 40]], 0, 60) == [(0, 60)]


def test_keys_that_are_younger_than_a_run(tmp_path: Path) -> None:
    """At their defaults they change nothing: a run from before they were there goes on."""
    directory = StateDirectory(tmp_path / "out.partial")
    now: dict[str, Any] = {"recipe": load_recipe("flare").to_dict(), "seed": 0}
    before = copy.deepcopy(now)
    del before["recipe"]["optimizer"]["warmup_ratio"], before["recipe"]["save"]["total_limit"]
    directory.create(before)
    check_identity(directory, now)
    now["recipe"]["optimizer"]["warmup_ratio"] = 0.1
    with pytest.raises(CheckpointError, match=r"recipe\.optimizer\.warmup_ratio was not set and is now 0\.1"):
        check_identity(directory, now)


def test_what_is_rarely_wanted_is_said() -> None:
    own = load_recipe("flare")
    assert before_training(own, own) == []
    short = own.override(["optimizer.steps=60", "optimizer.lr=1e-3"])
    warmup, save, rate = before_training(short, own)
    assert warmup.startswith("a warmup of 100 steps is not shorter than the run of 60 steps")
    assert "rises to the end, to 0.0006" in warmup
    assert save.startswith("save.every = 200 saves nothing before the last of 60 steps")
    assert rate == "optimizer.lr = 0.001 is 100 times the recipe's own 1e-05"
    low = own.override(["optimizer.lr=1e-6"])
    assert before_training(low, own) == ["optimizer.lr = 1e-06 is 1/10 of the recipe's own 1e-05"]

    adapter = load_recipe("adapter-dual")
    (line,) = before_training(adapter.override(["adapter.rank=0"]), adapter)
    assert line.startswith("adapter.rank = 0 trains the model itself, here with lr = 0.003 and objective.ar_weight = 0")

    (line,) = about_repeats("data.jsonl", 12, 20.4)
    assert line.startswith("the run passes about 20 times over the 12 documents of data.jsonl: it learns them by heart")
    assert about_repeats("data.jsonl", 12, 16.0) == []

    assert after_training({}) == after_training({200: {"ar_loss": 9.0}}) == []
    assert after_training({0: {"ar_loss": 2.0}, 200: {"ar_loss": 2.1}}) == []
    (line,) = after_training({0: {"ar_loss": 2.0}, 100: {"ar_loss": 3.0}, 200: {"ar_loss": 2.46}})
    assert line.startswith("held-out AR loss rose by 23% (2.000 before, 2.460 at step 200)")
