"""Ctrl-C and kill -9: a real process is stopped twice, and the resumed result equals that of an uninterrupted run."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from flarec.train.loop import Trainer
from flarec.train.metrics import read_metrics
from tests.cli.conversions import QUICK, flarec, write_data
from tests.cli.processes import Command
from tests.models import few_checkpoint

STEPS = 12
@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl")
    few_checkpoint(tmp_path, "qwen3_5_text")
    return tmp_path


def arguments(out: str, precision: str, rank: int) -> list[str]:
    trained = ["--set", f"adapter.rank={rank}", "--set", "objective.ar_weight=0"] if rank else []
    return ["convert", "qwen3_5_text", "--data", "data.jsonl", "--out", out, *QUICK, "--recipe", "dual",
            "--steps", str(STEPS), "--set", "save.every=1", "--set", "evaluation.every=6",
            "--set", f"optimizer.precision={precision}", *trained]


def saved_step(place: Path) -> int:
    try:
        return int((place / "out.partial" / "latest").read_text().removeprefix("state-"))
    except (FileNotFoundError, ValueError):
        return 0


def stop_after(place: Path, command: list[str], step: int, signal_number: signal.Signals) -> tuple[int, str]:
    """Start a process, send it a signal once `step` is saved, at most 3 steps later; its exit code and stderr."""
    reads, writes = os.pipe()

    def watch() -> None:
        """The process says when the step is saved, and takes no step after a later one before a signal came."""
        os.close(reads)
        advance = Trainer.advance

        def watched(trainer: Trainer) -> Any:
            if trainer.step == step:
                os.write(writes, b"saved")
            if trainer.step == step + 3:
                signal.pause()  # a test that is late must not find the run complete
            return advance(trainer)

        pytest.MonkeyPatch().setattr(Trainer, "advance", watched)  # for good: in the process alone

    with Command(command, place / "errors.txt", watch) as process:
        os.close(writes)
        with open(reads, "rb") as told:
            if told.read(5) == b"saved":
                os.kill(process.child, signal_number)
        return process.ended()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rank"), [("float32", 0), ("bf16", 4)])
def test_interrupted_twice_and_resumed_equals_uninterrupted(place: Path, precision: str, rank: int) -> None:
    """Full fine-tuning, and an adapter over a frozen model in bfloat16."""
    whole = flarec(*arguments("whole", precision, rank))
    assert whole.exit_code == 0, whole.output

    code, errors = stop_after(place, arguments("out", precision, rank), 2, signal.SIGINT)
    assert code == 130, errors
    assert "Traceback" not in errors
    interrupted_at = saved_step(place)
    assert 2 <= interrupted_at < STEPS
    assert f"step {interrupted_at} is saved" in errors
    command = shlex.split(errors.strip().splitlines()[-1])
    assert command[:2] == ["flarec", "convert"]
    assert "--resume" in command

    code, errors = stop_after(place, command[1:], interrupted_at + 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert f"continuing after step {interrupted_at} of {STEPS}" in errors
    assert interrupted_at + 2 <= saved_step(place) < STEPS
    assert not (place / "out").exists()

    resumed = flarec(*command[1:])
    assert resumed.exit_code == 0, resumed.output
    weights = [str(path.relative_to(place / "whole")) for path in (place / "whole").rglob("*.safetensors")]
    assert len(weights) > bool(rank)
    for name in (*weights, "tokenizer.json", "config.json", "generation_config.json"):
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes(), name
    timing = ("seconds", "tokens_per_second")
    logs = [
        [{key: value for key, value in line.items() if key not in timing and key != "evaluation"}
         for line in read_metrics(place / out / "metrics.jsonl")]
        for out in ("whole", "out")
    ]
    assert logs[0] == logs[1]
    assert not (place / "out.partial").exists()
