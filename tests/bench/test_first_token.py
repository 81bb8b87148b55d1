"""What processes that are measured do as `flarec.load` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flarec.bench.serving.models import ServingSession


def test_a_second_process_finds_the_captured_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm caches are those of a user: the program cache among them."""
    monkeypatch.setenv("FLAREC_CACHE_DIR", str(tmp_path))
    for step in ("capture()", "capture(cached=True)"):
        assert ServingSession(torch.device("cpu"), "tiny").program.history[0].step == step
