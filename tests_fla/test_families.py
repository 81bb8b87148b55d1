"""The suite over all families (`tests/conformance`), over the families of this library: see `tests_fla/conftest.py`."""

from tests.conformance.test_conversion import *  # noqa: F403
from tests.conformance.test_invariants import *  # noqa: F403
