"""Compiling in parallel: every configuration of an autotuner goes to one process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from flarec.bench import warm

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("count", [1, 3, 16])
def test_slices_cover_all_configurations(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.autotuner import Autotuner

    configs = [triton.Config({"BLOCK": 2**n}) for n in range(5)]
    seen: list[int] = []
    for index in range(count):
        with monkeypatch.context() as patch:
            patch.setattr(Autotuner, "__init__", Autotuner.__init__)  # both are put back
            patch.setattr(Autotuner, "do_bench", Autotuner.do_bench)
            warm.take_slice(index, count)

            @triton.autotune(configs=configs, key=[])
            @triton.jit
            def kernel(BLOCK: Any) -> None:
                pass

            made: Any = kernel
            seen += [config.kwargs["BLOCK"] for config in made.configs]
            calls: list[int] = []
            assert made.do_bench(lambda calls=calls: calls.append(1), quantiles=(0.5, 0.2, 0.8)) == [1.0, 1.0, 1.0]
            assert calls == [1]
    assert set(seen) == {config.kwargs["BLOCK"] for config in configs}
    assert len(seen) == max(count, len(configs))


def test_processes_that_take_too_long_are_stopped() -> None:
    quick, slow, bad = (
        subprocess.Popen([sys.executable, "-c", code])
        for code in ("pass", "import time; time.sleep(600)", "raise SystemExit(3)")
    )
    quick.wait()
    bad.wait()
    assert warm.wait([quick, slow, bad], 0.1) == 1
    assert slow.returncode != 0
