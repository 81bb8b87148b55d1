"""What processes that are measured do, as `flarec.load` does it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flarec
from flarec.bench.serving import models
from flarec.bench.serving.models import ServingSession
from flarec.ir.compiled import Codes


def test_a_second_process_finds_the_captured_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm caches are those of a user: the program cache among them."""
    monkeypatch.setenv("FLAREC_CACHE_DIR", str(tmp_path))
    for step in ("capture()", "capture(cached=True)"):
        assert ServingSession(torch.device("cpu"), "tiny").program.history[0].step == step


def test_steps_are_compiled_by_rules_and_readers_of_prompts_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`flarec.ir.compiled.by_rules`; in what is measured as in what is loaded."""
    loaded = flarec.load(Path(__file__).parents[2] / "examples" / "tiny" / "model", device="cpu")
    given: list[Codes] = [loaded._codes, loaded._reading_codes]
    monkeypatch.setattr(models, "compiled_by_region", lambda program, codes: given.append(codes))
    session = ServingSession(torch.device("cpu"), "tiny", compile=True)
    session._compiled(None)
    session.reader(None)
    assert [(codes.exact > 0, codes.timing) for codes in given] == 2 * [(True, False), (False, True)]
