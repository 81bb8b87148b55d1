"""examples/real/resumed.py: one conversion, stopped once, and what its record says of the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conversions import place_of_conversions
from tests.real_scripts import real_script

QUICK = ["optimizer.batch_rows=2", "optimizer.micro_rows=2", "data.max_length=64", "optimizer.warmup_steps=2",
         "evaluation.prompts=2", "evaluation.max_new_tokens=4", "train.compile=off", "adapter.rank=4"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    return real_script(monkeypatch, "resumed")


def log(*steps: int, probes: tuple[int, ...] = (), peak: float = 1.0) -> list[str]:
    """Lines of a run of 6 steps, 2 of them warm-up."""
    rates = {1: 0.5 * peak, 2: peak, 3: peak, 4: 0.75 * peak, 5: 0.5 * peak, 6: 0.25 * peak}
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 1.0, "lr": rates.get(step, 0.1), "seconds": 2.0} for step in steps
    ]
    lines += [{"step": step, "evaluation": {"ar_loss": 1.0, "seconds": 1.0}} for step in probes]
    return [json.dumps(line) for line in sorted(lines, key=lambda line: int(line["step"]))]


def test_what_is_wrong_with_a_log_is_named(script: Any) -> None:
    before, after = log(1, 2, 3, probes=(0, 2)), log(1, 2, 3, 4, 5, 6, probes=(0, 2, 4, 6))
    assert script.faults(before, after, 6, 2) == []
    assert script.schedule_faults(after, 3, 6, 6) == []
    for bad, text in [
        (log(1, 2, 3, 5, 6, probes=(0, 2, 4, 6)), "not 1 to 6"),
        (log(1, 2, 3, 3, 4, 5, 6, probes=(0, 2, 4, 6)), "not 1 to 6"),
        (log(1, 2, 3, 4, 5, 6, probes=(0, 2, 6)), "probes"),
        (after[1:] + after[:1], "before the stop"),
        (before, "lines were logged before"),
        ([line.replace('"loss": 1.0', '"loss": NaN') if '"step": 5' in line else line for line in after], "step 5"),
    ]:
        assert any(text in fault for fault in script.faults(before, bad, 6, 2)), text
    broken = [line.replace('"lr": 0.75', '"lr": 1.0') for line in after]
    assert script.schedule_faults(broken, 3, 6, 6)


def test_steps_that_fit(script: Any) -> None:
    lines = log(1, 2, 3, 4, probes=(0, 2))  # 2 s a step and 0.5 s of probes a step; the rest is the start
    assert script.fitting(lines, 30.0, 4, 50, 1000.0) == 50
    assert script.fitting(lines, 30.0, 4, 50, 20.0 + 1.15 * 2.5 * 10 + 0.1) == 14
    assert script.fitting(lines, 30.0, 4, 50, 0.0) == 5


def test_a_run_is_stopped_resumed_and_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_of_conversions(tmp_path, monkeypatch)
    Path("prompts.jsonl").write_text('{"prompt": "say red one"}\n{"prompt": "say two"}\n')
    words = ["source", "--data", "data.jsonl", "--prompts", "prompts.jsonl", "--steps", "5", "--every", "2", "--limit",
             "2", "--max-new-tokens", "4", "--device", "cpu", "--commit", "abc", "--out", "record.json"]
    assert script.main([*words, *(part for setting in QUICK for part in ("--set", setting))]) == 0
    record = json.loads(Path("record.json").read_text())
    assert record["problems"] == [] and record["commit"] == "abc"
    assert (record["planned_steps"], record["steps"], record["stopped_after"]) == (5, 5, 2)
    assert [probe["step"] for probe in record["probes"]] == [0, 2, 4, 5]
    assert record["probes' AR losses are equal"]
    assert {len(column) for column in record["metrics"].values()} == {5}
    assert sum(record["metrics"]["clean_tokens"]) == record["clean_tokens"] > 0
    first, second, measured = record["commands"]
    assert "--stop-after 2" in first and "--resume" in second and "measure.py" in measured
    assert "adapter.rank=4" in record["settings"] and "adapter.rank=64" not in record["settings"]
    assert record["measured"]["T=1"]["all"]["prompts"] == 2


def test_a_resumed_part_without_time_leaves_what_was_saved(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_of_conversions(tmp_path, monkeypatch)
    Path("prompts.jsonl").write_text('{"prompt": "say red one"}\n')
    run = script.commands.run

    def short(command: list[str], limit: float, **more: Any) -> Any:
        return script.commands.Ran("", None, "", limit) if "--resume" in command else run(command, limit, **more)

    monkeypatch.setattr(script.commands, "run", short)
    words = ["source", "--data", "data.jsonl", "--prompts", "prompts.jsonl", "--steps", "4", "--every", "2", "--limit",
             "1", "--max-new-tokens", "4", "--device", "cpu", "--out", "record.json"]
    assert script.main([*words, *(part for setting in QUICK for part in ("--set", setting))]) == 1
    record = json.loads(Path("record.json").read_text())
    assert record["problems"] == ["resumed part: no time left"] and record["steps"] == 2
    assert record["measured"]["T=0"]["all"]["prompts"] == 1


def test_a_part_that_fails_is_in_the_record(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_of_conversions(tmp_path, monkeypatch)
    Path("prompts.jsonl").write_text('{"prompt": "say red one"}\n')
    words = ["source", "--data", "data.jsonl", "--prompts", "prompts.jsonl", "--steps", "4", "--device", "cpu"]
    assert script.main([*words, "--out", "record.json", "--set", "adapter.rank=many"]) == 1
    (problem,) = json.loads(Path("record.json").read_text())["problems"]
    assert problem.startswith("first part: exit code") and "adapter.rank" in problem
