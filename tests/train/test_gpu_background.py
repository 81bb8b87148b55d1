"""Saves of a GPU's state that are written while its steps go on, and runs that are killed while they are."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flarec.train import state
from flarec.train.background import SaveWriter, in_background
from flarec.train.saves import FILES, SavedState, write_save
from flarec.train.state import StateDirectory
from tests.models import tiny_tokenizer
from tests.test_repository import ROOT
from tests.train.test_gpu_bf16 import BF16, trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_files_are_those_of_a_save_that_is_waited_for(
    moments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps change every tensor before the first byte is written; a second save takes the memory of the first copy."""
    made = trainer("qwen3_5_text", "cuda", BF16, f"optimizer.moments={moments}")
    assert in_background("auto", made)[0], "what a GPU has by default, where main memory has room"
    go, places = threading.Event(), (tmp_path / "waited", tmp_path / "meanwhile")

    def waiting(folder: Path, saved: SavedState, between: Any) -> None:
        assert go.wait(60)
        write_save(folder, saved, between)

    directories = [StateDirectory(place) for place in places]
    for directory in directories:
        directory.create({})
    with (
        SaveWriter(directories[0], 2, background=False, fresh=False) as first,
        SaveWriter(directories[1], 2, background=True, fresh=False) as second,
    ):
        for _ in range(2):
            for _ in range(2):
                made.advance()  # nobody waits for the device before the state is taken
            first.save(made.step, made.state())
            monkeypatch.setattr(state, "write_save", waiting)
            go.clear()
            second.save(made.step, made.state())
            for _ in range(2):
                made.advance().read(tiny_tokenizer())
            assert second.saved != second.begun, "the steps were not waited for"
            go.set()
            second.wait()
            monkeypatch.setattr(state, "write_save", write_save)
    for name in ("state-00000002", "state-00000006"):
        files = [{path.name: path.read_bytes() for path in (place / name).iterdir()} for place in places]
        assert files[0] == files[1] and FILES in files[0]
    latest = directories[1].latest()
    assert latest is not None and latest.values["step"] == 6
    masters = made.weights.masters
    moved = [name for name, value in masters.items() if not torch.equal(latest.model[name], value.cpu())]
    assert len(moved) > len(masters) / 2, "training went on"


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_killed_conversions_end_with_the_same_bits(moments: str) -> None:
    """kill -9 at random moments of conversions on the device, half of which write their saves meanwhile."""
    words = [sys.executable, "-m", "tools.crash", "--trials", "2", "--seed", "5", "--device", "cuda",
             "--set", f"optimizer.moments={moments}"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 of 2 trials" in found.stdout and "the same bits, nothing left over" in found.stdout
