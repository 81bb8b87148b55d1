"""A conversion with 8-bit moments: saves hold codes, the record and the manifest say so, and it stays what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flarec.checkpoint.manifest import Manifest
from tests.cli.conversions import QUICK, flarec, place_of_conversions

COMMAND = ["convert", "source", "--data", "data.jsonl", *QUICK, "--set", "evaluation.every=0", "--out", "out"]
CODES = ["--set", "optim=adamw_8bit"]


def test_stopped_refused_with_other_moments_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of_conversions(tmp_path, monkeypatch)
    wrong = flarec(*COMMAND, "--set", "optimizer.moments=4bit")
    assert wrong.exit_code == 2 and "optimizer.moments = '4bit' is not allowed; give" in wrong.stderr
    assert sorted(path.name for path in place.iterdir()) == ["data.jsonl", "source"], "nothing is written"

    stopped = flarec(*COMMAND, *CODES, "--stop-after", "2")
    assert stopped.exit_code == 0, stopped.output
    assert "optim = adamw_8bit: optimizer.moments = 8bit" in stopped.stderr
    saved = load_file(place / "out.partial" / "state-00000002" / "optimizer.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.uint8, torch.float32}
    embedding = {name.rpartition(".")[2]: value for name, value in saved.items() if "embed_tokens" in name}
    assert embedding["exp_avg"].dtype == embedding["exp_avg_sq"].dtype == torch.uint8
    scales = torch.Size([embedding["exp_avg"].numel() // 256])
    assert embedding["exp_avg_scale"].shape == embedding["exp_avg_sq_scale"].shape == scales

    other = flarec(*COMMAND, "--resume")
    assert other.exit_code == 2 and 'recipe.optimizer.moments was "8bit" and is now "float32"' in other.stderr
    ended = flarec(*COMMAND, *CODES, "--resume")
    assert ended.exit_code == 0, ended.output
    manifest = Manifest.read(place / "out")
    assert manifest is not None and manifest.recipe["optimizer"]["moments"] == "8bit"
