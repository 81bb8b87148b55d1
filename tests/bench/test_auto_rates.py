"""Rows of `--drafts auto`: their requests outlast what is timed, and one that ends is told, not waited for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flarec.bench.measure import NotMeasured
from flarec.bench.serving import ours
from flarec.bench.serving.rows import HIGH
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine

SESSION: Any = SimpleNamespace(prompts=lambda requests: [[5, 7, 9]] * requests, wait=lambda: None)


def test_requests_outlast_the_steps() -> None:
    """Also if a tenth of the steps is recorded, with the replays behind it, and every step yields the most tokens."""
    steps = 1.1 * (ours.AUTO_STEPS + ours.AUTO_WARM)
    assert steps * max(HIGH) < ours.AUTO_TOKENS


@pytest.mark.parametrize("mode", ["causal", "ar-trust"])
def test_a_request_that_ends_is_told(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "AUTO_TOKENS", 100)
    monkeypatch.setattr(ours, "AUTO_WARM", 4)
    engine, _ = make_engine(FakeModel(agreement=0.8, key=1), 3)
    decoding = ours.Decoding(SESSION, engine, 2, mode)
    decoding.take(8)
    assert decoding.made >= 16 and decoding.rate > 0
    with pytest.raises(NotMeasured, match="a request ended after 100 tokens"):
        decoding.take(200)
