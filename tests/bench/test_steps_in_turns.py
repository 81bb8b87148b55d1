"""Kinds of steps that rows compare are measured in turns, and their times are of one round."""

from __future__ import annotations

import pytest
import torch

from flarec.bench.serving import ours
from flarec.bench.serving.models import ServingSession
from flarec.decode import Engine


def test_kinds_take_turns_and_a_round_has_its_own_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def step(name: str, early: float, late: float) -> float:
        order.append(name)
        return early if order.count(name) <= 30 else late

    monkeypatch.setattr(ours, "_ms", lambda step: step())
    steps = [lambda: step("a", 2.0, 4.0), lambda: step("b", 3.0, 1.0)]
    first, second = ours.in_turns(steps, 30, 2)
    assert first == [2.0, 3.0] and second == [4.0, 1.0]
    assert order == 2 * (20 * ["a"] + 20 * ["b"] + 10 * ["a"] + 10 * ["b"])


def test_causal_and_ar_trust_steps_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    session = ServingSession(torch.device("cpu"), "tiny", context=8, steps=4)
    made: list[int] = []
    engine = session.engine

    def counted(slots: int, **options: str) -> Engine:
        made.append(slots)
        return engine(slots, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "engine", counted)
    causal, trusted = (ours.step_time(session, mode, 2) for mode in ("causal", "ar-trust"))
    assert made == [2, 2], "the second one was measured beside the first"
    assert causal.ms > 0 and trusted.ms > 0 and causal != trusted
    assert ours.step_time(session, "diffusion-trust", 2).ms > 0 and made == [2, 2, 2]
