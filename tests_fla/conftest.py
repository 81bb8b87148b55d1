"""Tests with flash-linear-attention, in an environment of its own (`make test-fla`): see `tests_fla/tiny.py`."""

from __future__ import annotations

import pytest

import tests.conftest  # noqa: F401  threads, offline, program cache: before torch is imported

from . import plain_kernels, tiny

plain_kernels.install()
tiny.register()

IN_BFLOAT16 = "test_in_bfloat16_it_is_as_close_as_transformers_is[mamba2]"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name == IN_BFLOAT16:  # float32 norms feed bfloat16 projections: the library's own forward stops too
            item.add_marker(pytest.mark.xfail(raises=RuntimeError, strict=True, reason="not in bfloat16 by itself"))
