"""A sample of tools/crash.py: conversions that are killed at random, resumed, and end as if nothing had been."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_repository import ROOT


@pytest.mark.slow
def test_killed_conversions_end_with_the_same_bits() -> None:
    words = [sys.executable, "-m", "tools.crash", "--trials", "4", "--seed", "3"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "4 of 4 trials" in found.stdout and "the same bits, nothing left over" in found.stdout
