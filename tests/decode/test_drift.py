"""Decoding for long leaves the caches that a prefill of the text leaves, to the rounding of float32."""

from __future__ import annotations

import pytest

from tests.decode.drift import drift
from tests.models import FAMILIES

MOST = 4.0
"""Times as far from float64 as a fresh prefill, whose sums are rounded in another order (5,000 steps:
benchmarks/results/state-drift-cpu.json)."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_caches_are_those_of_a_fresh_prefill(family: str) -> None:
    found = drift(family, 20)
    assert found["accepted"] > 0 and found["tokens"] > 30
    assert found["largest_ratio"] < MOST, found
