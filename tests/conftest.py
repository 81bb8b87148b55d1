"""Settings shared by all tests: one thread per process, no network, `gpu` tests only where there is a GPU.

Shared test code is imported from the repository root: `from tests.oracles.layouts import layouts`.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
import tempfile

# Before torch and huggingface_hub are imported: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its pool imports torch in every process
# Not the user's own program cache, nor inductor's: one for this run, shared by its workers and the processes that tests
# start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="flarec-tests-")
    os.environ["FLAREC_CACHE_DIR"] = os.path.join(_CACHE.name, "programs")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(_CACHE.name, "inductor"))
    if sys.platform == "linux":
        os.environ.setdefault("CXX", os.path.join(os.path.dirname(__file__), "compiler", "g++"))

import hypothesis
import pytest
import torch

from tests.cpu_time import CpuTime
from tests.interpreter import make_faster

torch.set_num_threads(1)
# pytest listens to every logger that stands apart; while somebody listens to this one, torch writes all graphs as text.
logging.getLogger("torch.__trace").propagate = True
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any test module is imported
    if importlib.util.find_spec("triton") is not None:
        make_faster()

# Times vary with the load of the machine, so neither a slow example nor slowly drawn data is a failure; an example that
# fails prints how to replay it. The default profile draws the same examples each time, so a run can be repeated;
# `make test-search` (profile "search") draws new ones, ten times as many where a test does not set their number.
hypothesis.settings.register_profile(
    "flarec", deadline=None, print_blob=True, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "search", hypothesis.settings.get_profile("flarec"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile(os.environ.get("FLAREC_HYPOTHESIS", "flarec"))


# Capturing and collecting make many objects that live on: with Python's own thresholds a tenth of the CPU time of all
# tests goes into looking at them again.
gc.set_threshold(100_000, 20, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exact-cases", type=int, metavar="N",
        help="cases of tests/decode/test_exact.py, over all families; tests/test_rows.py then takes all of them, too",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuTime())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` on a machine without CUDA: pytest's closing line counts them."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
