"""The suite over all families (`tests/families`), over the families of this library: see `tests_fla/conftest.py`."""

from tests.families.test_conversion import *  # noqa: F403
from tests.families.test_invariants import *  # noqa: F403
