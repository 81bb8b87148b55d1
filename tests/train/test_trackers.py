"""Trackers: each step once, however often a run was stopped; a missing package is said before anything is done."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flarec.errors import UsageError
from flarec.train.loop import Trainer
from flarec.train.metrics import read_metrics
from flarec.train.trackers.tracking import State, Tracking, chosen_trackers, scalars
from tests.cli.conversions import QUICK, flarec, place_of_conversions


class Service(types.ModuleType):
    """Stands for a service that keeps what it is told, over processes, under a run's id or name. What it takes is what
    wandb 0.31 and trackio 0.43 take."""

    init: Any
    log: Any
    finish: Any

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.configs: list[dict[str, Any]] = []
        self.open: Any = None


class WandbRun:
    def __init__(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        self.rows = rows
        self.metrics: dict[str, str | None] = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert step is None and self.metrics == {"step": None, "train/*": "step", "eval/*": "step"}
        self.rows.append((data.pop("step"), data))

    def finish(self, exit_code: int | None = None) -> None:
        self.rows = []


def fake_wandb() -> Service:
    module = Service("wandb")

    def init(*, project: str, id: str, name: str, config: dict[str, Any], resume: str) -> WandbRun:
        assert (project, resume) == ("flarec", "allow")
        module.configs.append(config)
        return WandbRun(module.runs.setdefault(id, []))

    module.init = init
    return module


def fake_trackio() -> Service:
    module = Service("trackio")

    def init(
        project: str, name: str | None = None, *, config: dict[str, Any] | None = None, resume: str = "never",
        embed: bool = True,
    ) -> None:
        assert (project, resume, embed) == ("flarec", "allow", False) and name is not None and config is not None
        print("* Trackio project initialized")
        module.configs.append(config)
        module.open = module.runs.setdefault(name, [])

    def log(metrics: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        module.open.append((step, metrics))

    def finish() -> None:
        module.open = None

    module.init, module.log, module.finish = init, log, finish
    return module


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, Service]:
    made = {"wandb": fake_wandb(), "trackio": fake_trackio()}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: made.get(name) or find(name, *more))
    return made


class Ended(BaseException):
    """An end that nothing of flarec catches."""


def test_each_step_once_over_an_error_and_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, services: dict[str, Service]
) -> None:
    """Ended by an error behind a save, so that a step is taken twice; trackio joins at the last resume and gets all."""
    place_of_conversions(tmp_path, monkeypatch)
    command = ["convert", "source", "--data", "data.jsonl", "--out", "out", *QUICK, "--steps", "5"]
    both = ["--report-to", "tensorboard,wandb"]
    advance = Trainer.advance

    def killed(trainer: Trainer) -> Any:
        if trainer.step == 3:  # step 2 is saved, step 3 is logged
            raise Ended
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", killed)
    with pytest.raises(Ended):
        flarec(*command, *both)
    monkeypatch.setattr(Trainer, "advance", advance)
    assert flarec(*command, *both, "--resume", "--stop-after", "4").exit_code == 0
    last = flarec(*command, "--report-to", "tensorboard,wandb,trackio", "--resume")
    assert (last.exit_code, last.stdout) == (0, ""), last.output
    assert "reporting to: tensorboard --logdir out.tensorboard" in last.stderr

    lines = list(read_metrics(tmp_path / "out" / "metrics.jsonl"))
    expected = {
        prefix: [(line["step"], scalars(line.get("evaluation", line), prefix)) for line in lines
                 if ("evaluation" in line) == (prefix == "eval/")]
        for prefix in ("train/", "eval/")
    }
    assert [step for step, _ in expected["train/"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in expected["eval/"]] == [0, 4, 5]
    for module in services.values():
        (rows,) = module.runs.values()
        for prefix, values in expected.items():
            found = [(step, row["train/loss" if prefix == "train/" else "eval/ar_loss"]) for step, row in rows
                     if any(name.startswith(prefix) for name in row)]
            wanted = "train/loss" if prefix == "train/" else "eval/ar_loss"
            assert found == [(step, row[wanted]) for step, row in values], (module.__name__, prefix)
        assert all(config["recipe"]["optimizer"]["steps"] == 5 for config in module.configs)

    (folder,) = (tmp_path / "out.tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for values in expected.values():
        for name in values[0][1]:
            read = [(event.step, event.value) for event in events.Scalars(name)]
            assert read == [(step, pytest.approx(row[name], rel=1e-6)) for step, row in values], name
    assert "config/text_summary" in events.Tags()["tensors"]


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path: Path, services: dict[str, Service]) -> None:
    warned: list[str] = []
    report = Tracking(("wandb", "trackio"), tmp_path / "out", {}, {}, warned.append)
    report.log({"step": 1, "loss": 2.0})
    services["trackio"].log = lambda metrics, step=None: 1 / 0
    report.log({"step": 2, "loss": 1.0})
    report.log({"step": 3, "loss": 0.5})
    assert warned == ["trackio failed and is left out: division by zero"]
    report.close()
    states = report.record["trackers"]
    assert states["wandb"] == {"open": False, "attempt": 0, "sent": (3, -1)}
    assert (states["trackio"]["open"], states["trackio"]["sent"]) == (True, (1, -1)), "nobody knows what arrived"


def test_a_killed_process_leaves_its_trackers_open(tmp_path: Path, services: dict[str, Service]) -> None:
    """What arrived is not known: the next process has a run of its own that gets all. After a clean end it goes on."""

    def process(record: Any, lines: list[dict[str, Any]], close: bool) -> Any:
        tracking = Tracking(("wandb",), tmp_path / "out", {}, json.loads(json.dumps(record)), print)
        begun = tracking.record
        for line in lines:
            tracking.log(line)
        if close:
            tracking.close()
        return tracking.record if close else begun

    lines: list[dict[str, Any]] = [{"step": 0, "evaluation": {"ar_loss": 9.0}}]
    lines += [{"step": step, "loss": 1.0 / step} for step in range(1, 7)]
    record = process({}, lines[:4], close=False)
    record = process(record, lines[:5], close=True)
    process(record, [*lines[:3], *lines[3:]], close=True)  # resumed at an earlier save
    first, second = services["wandb"].runs
    assert second == f"{first}-1"
    assert [step for step, _ in services["wandb"].runs[second]] == [0, 1, 2, 3, 4, 5, 6]


def test_a_tracker_that_cannot_be_opened(tmp_path: Path, services: dict[str, Service]) -> None:
    def init(**keywords: Any) -> None:
        raise RuntimeError("nobody is logged in\nmore")

    services["wandb"].init = init
    with pytest.raises(UsageError, match=r"^--report-to wandb cannot be used: nobody is logged in$"):
        Tracking(("trackio", "wandb"), tmp_path / "out", {}, {}, print)
    assert services["trackio"].open is None, "closed again"


def test_what_is_not_there(tmp_path: Path) -> None:
    assert chosen_trackers("none") == ()
    assert chosen_trackers("tensorboard, tensorboard") == ("tensorboard",)
    with pytest.raises(UsageError, match="give none, or one or more of tensorboard, wandb, trackio"):
        chosen_trackers("none,wandb")
    result = flarec("convert", "nowhere", "--report-to", "tensorboard,wandb")
    assert result.exit_code == 2
    assert "--report-to wandb: the package is not installed; pip install 'flarec[wandb]'" in result.stderr


def test_numbers_of_a_line() -> None:
    line = {"step": 3, "loss": 1, "slots": [0.5, None, 2.0], "router": {"clean": {"a": [1.0]}}, "names": ["x"],
            "nan": float("nan"), "flag": True}
    assert scalars(line, "train/") == {
        "train/loss": 1, "train/slots/0": 0.5, "train/slots/2": 2.0, "train/router/clean/a/0": 1.0,
    }


def test_records_changed_by_hand(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"trackers": 3}, {"trackers": {"wandb": "x"}},
        {"trackers": {"wandb": {"open": 1, "attempt": 0, "sent": [1, 2]}}},
        {"run": 7, "trackers": {"wandb": {"open": True, "attempt": 0, "sent": [1]}}},
    ]
    for record in wrong:
        assert Tracking((), tmp_path / "out", {}, record, print).states["wandb"] == State()
