"""Tests with lm-eval, in an environment of its own (`make test-lm-eval`)."""

from __future__ import annotations

import os

import tests.conftest  # noqa: F401  threads, offline, program cache: before torch is imported

os.environ["HF_DATASETS_OFFLINE"] = "1"
