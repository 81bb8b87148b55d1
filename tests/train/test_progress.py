"""What a run tells while it works: the estimate of the time that is left, the logger, the callback, Ctrl-C at once."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flarec as package
from flarec.base.interrupts import Interrupts
from flarec.train.heldout import HeldOut
from flarec.train.metrics import read_metrics
from flarec.train.pace import Pace, in_words
from flarec.train.progress import ConsoleReporter, describe_losses
from tests.cli.conversions import QUICK, flarec, place_of_conversions


def test_the_estimate_leaves_the_first_step_out() -> None:
    pace = Pace(end=10, evaluate_every=0, save_every=0)
    assert pace.left(0) is None
    pace.stepped(90.0)  # compiles
    assert pace.left(1) is None
    pace.stepped(2.0)
    assert pace.left(2) == 16.0
    pace.stepped(2.0)
    pace.stepped(40.0)  # waited for a disk: counts twice the median
    assert pace.left(4) == pytest.approx(6 * (2 + 2 + 4) / 3)


def test_the_estimate_counts_evaluations_saves_and_the_checkpoint() -> None:
    pace = Pace(end=10, evaluate_every=4, save_every=3)
    pace.evaluated(5.0)
    pace.evaluated(7.0)
    pace.stepped(9.0)
    pace.stepped(1.0)
    assert pace.left(2) == 8 + 3 * 6.0  # behind steps 4, 8 and 10; no save took time yet
    pace.saved(2.0)
    assert pace.left(2) == 8 + 3 * 6.0 + (4 + 1) * 2.0  # behind 3, 6, 9 and 10, and the checkpoint
    assert pace.left(8) == 2 + 6.0 + (2 + 1) * 2.0
    assert pace.left(10) == 2.0


def test_a_loss_is_shown_with_its_name() -> None:
    values = {"ar_loss": 1.25, "diffusion_loss": -0.4, "diffusion_losses": ["kl", "el"]}
    assert describe_losses(values) == "ar 1.250  diffusion (kl+el) -0.400"
    assert describe_losses({**values, "diffusion_losses": []}) == "ar 1.250  diffusion -0.400"


@given(st.lists(st.floats(0.5, 1.5), min_size=8, max_size=40), st.integers(3, 7), st.floats(10, 1000))
def test_one_slow_step_moves_the_estimate_little(seconds: list[float], at: int, slow: float) -> None:
    """However long a step took, the next estimate is at most as if it had taken twice the median."""
    without, with_one = (Pace(100, 0, 0) for _ in range(2))
    for number, value in enumerate([1.0, *seconds]):
        without.stepped(value)
        with_one.stepped(slow if number == at else value)
    plain, moved = without.left(50), with_one.left(50)
    assert plain is not None and moved is not None
    assert abs(moved - plain) <= plain * 3.5 / len(seconds)


def test_durations() -> None:
    assert [in_words(seconds) for seconds in (0.4, 89, 91, 3600, 5400, 9000)] == [
        "0 s", "89 s", "2 min", "60 min", "1 h 30 min", "2 h 30 min",
    ]


def test_progress_of_work_beside_the_steps(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Its beginning at once, then a line every ten seconds."""
    now = [100.0]
    monkeypatch.setattr("flarec.train.progress.time.monotonic", lambda: now[0])
    reporter = ConsoleReporter()
    reporter.working("evaluating")
    for done in range(1, 30):
        now[0] += 1.0
        reporter.working("evaluating", done, 30)
    assert capsys.readouterr().err.splitlines() == ["evaluating", "evaluating: 10 of 30", "evaluating: 20 of 30"]


def test_ctrl_c_is_answered_at_once() -> None:
    told: list[str] = []
    with Interrupts(finish_step=True, told=lambda: told.append("stopping")) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert (told, interrupts.requested) == (["stopping"], True)
        signal.raise_signal(signal.SIGTERM)
        assert told == ["stopping"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return place_of_conversions(tmp_path, monkeypatch)


def test_ctrl_c_ends_an_evaluation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made up for when the run goes on."""
    command = ["convert", "source", "--data", "data.jsonl", "--out", "out", *QUICK, "--steps", "2"]
    probe = HeldOut._probe
    signals = [signal.SIGINT]

    def stopped(held_out: HeldOut, tick: Any) -> Any:
        if signals:
            signal.raise_signal(signals.pop())
        return probe(held_out, tick)

    monkeypatch.setattr(HeldOut, "_probe", stopped)
    first = flarec(*command)
    lines = first.stderr.splitlines()
    assert (first.exit_code, "step 0 is saved" in lines[-2]) == (130, True), first.stderr
    begun = lines.index("evaluating on 2 held-out documents")
    assert lines[begun + 1].startswith("stopping: the running step ends and the state is saved")
    again = flarec(*command, "--resume")
    assert again.exit_code == 0, again.output
    logged = [(line["step"], "evaluation" in line) for line in read_metrics(place / "out" / "metrics.jsonl")]
    assert logged == [(0, True), (1, False), (2, False), (2, True)]
    lines = again.stderr.splitlines()
    assert lines.index("writing out") > [line.startswith("held-out at step 2") for line in lines].index(True)
    assert not (place / "out.partial").exists()


def test_python_hears_of_everything(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    events: list[tuple[str, Mapping[str, Any]]] = []
    with caplog.at_level(logging.INFO, logger="flarec"):
        package.convert(
            "source", "data.jsonl", out="out", steps=2, max_length=96, device="cpu",
            overrides=["optimizer.batch_rows=2", "evaluation.prompts=2", "evaluation.max_new_tokens=4"],
            progress=lambda event, values: events.append((event, values)),
        )
    names = [event for event, _ in events]
    assert [values["step"] for event, values in events if event == "step"] == [1, 2]
    assert [values["step"] for event, values in events if event == "evaluation"] == [0, 2]
    work = [(values["done"], values["total"]) for event, values in events if event == "working" and values["total"]]
    assert work[0] == (1, 4) and work[-1][1] == 4 and sorted(work[: len(work) // 2]) == work[: len(work) // 2]
    assert names.index("evaluation") < names.index("begin") < names.index("step") < names.index("end")
    records = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "flarec"]
    assert any(level == "INFO" and text.startswith("step 2 of 2: ar ") for level, text in records)
    assert any(level == "INFO" and text.startswith("held-out at step 0") for level, text in records)
    warned = [text for level, text in records if level == "WARNING"]
    assert len(warned) >= 2 and warned[0].startswith("a warmup of 20 steps")
    assert os.path.exists("out/flarec.json")
