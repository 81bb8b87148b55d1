"""Tests with flash-linear-attention, in an environment of its own (`make test-fla`): see `tests_fla/tiny.py`."""

from __future__ import annotations

import tests.conftest  # noqa: F401  threads, offline, program cache: before torch is imported

from . import plain_kernels, tiny

plain_kernels.install()
tiny.register()
