"""Tests with bitsandbytes and torchao, in an environment of its own (`make test-quantized`)."""

from __future__ import annotations

import tests.conftest  # noqa: F401  threads, offline, program cache: before torch is imported
from tests.conftest import pytest_collection_modifyitems as pytest_collection_modifyitems  # tests for a GPU
