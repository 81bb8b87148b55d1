"""The demo script end to end, with a few steps and tasks: the report has what the README promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_demo_writes_its_report(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo.py", "--out", str(tmp_path), "--steps", "2", "--tasks", "1"]
    command += ["--set", "evaluation.prompts=1", "--set", "evaluation.max_new_tokens=8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("source", "causal", "ar-trust", "diffusion-trust"):
        row = report[name]
        assert row.keys() == {"accuracy", "loss", "tokens_per_forward", "seconds"}
        assert 0 <= row["accuracy"] <= 1 and row["loss"] > 0 and row["seconds"] > 0
        assert row["tokens_per_forward"] >= 1
    assert report["source"]["tokens_per_forward"] == report["causal"]["tokens_per_forward"] == 1
    assert report["ar-trust"]["accuracy"] == report["causal"]["accuracy"], "AR-Trust is exact"
    assert report["run"].keys() >= {"device", "versions", "commit", "command"}
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoint" / "flarec.json").is_file()
    assert "held-out tasks, greedy" in run.stdout and "a sample" in run.stdout
