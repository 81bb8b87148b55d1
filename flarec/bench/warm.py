"""Compile the baselines' kernels in parallel before they are tuned: `python -m flarec.bench.warm INDEX COUNT NAME...`.

Triton's autotuner compiles one configuration after the other. Here COUNT processes run the same baselines on small
inputs, each with every COUNT-th configuration; the results are in Triton's cache on disk when the benchmark tunes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .problems import Linear

MOST_PROCESSES = 16


def start(names: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Processes that compile for these functions of `Baselines` (and for the routes, which use the first of them)."""
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    command = [sys.executable, "-P", "-m", "flarec.bench.warm"]  # not what lies in the working directory
    return [
        subprocess.Popen(
            [*command, str(index), str(count), *names], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for index in range(count)
    ]


def wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> int:
    """How many processes ended well; those that run for more than `seconds` are stopped. The rest is compiled later."""
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return sum(process.returncode == 0 for process in processes)


def take_slice(index: int, count: int) -> None:
    """Give every autotuner made from now on each `count`-th of its configurations, and run each of them once."""
    from triton.runtime.autotuner import Autotuner

    from .baselines import shorten_autotuning

    original = Autotuner.__init__

    def sliced(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        every = list(self.configs)
        self.configs = every[index::count] or [every[index % len(every)]]

    def once(fn: Any, quantiles: Any = None) -> list[float]:
        fn()
        return [1.0, 1.0, 1.0]

    shorten_autotuning(once)
    Autotuner.__init__ = sliced  # type: ignore[method-assign,unused-ignore]


def compile_for(name: str, device: str = "cuda") -> None:
    """Run one of the baselines forward and backward on short rows."""
    from .baselines import Baselines
    from .problems import Conv, StreamSizes
    from .rows import CONV, KDA, LAYER, MAMBA, ONE_VIEW, STEP

    library = Baselines(tune=False)
    short = StreamSizes(rows=8, tokens=128, views=0)
    if name == "short_conv":
        leaves = Conv(short, CONV.channels, CONV.width).inputs(128, device)
        library.short_conv(*leaves).sum().backward()
        return
    layer = {"gated_delta_rule": LAYER, "kda": KDA, "simple_gla": MAMBA, "recurrent_step": STEP.layer()}[name]
    operands = layer.named(layer.inputs(128, device))
    if name == "simple_gla":
        del operands["beta"]
    if name == "recurrent_step":
        state = STEP.cache(device)[0]
        first = {name: x[:, :1].detach() for name, x in operands.items()}
        library.recurrent_step(**first, state=state, scale=layer.scale)
        return
    getattr(library, name)(**operands, scale=layer.scale).sum().backward()
    if name == "gated_delta_rule":
        _compile_routes(ONE_VIEW, device)


def _compile_routes(problem: Linear, device: str) -> None:
    import torch

    from .library_routes import simple_route, virtual_query_route

    streams = [problem.inputs(128, device, seed=seed) for seed in (0, 1)]
    leaves = [leaf for stream in streams for leaf in stream]
    for block in (4, 16, 32):  # its short sequences have chunks of 16, 32 and 64
        out = simple_route(streams[0], streams[1:], block, problem.scale)
        torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])
    out = virtual_query_route(streams[0], streams[1:], 4, problem.scale)
    torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])


def main(arguments: Sequence[str]) -> None:
    index, count, *names = arguments
    take_slice(int(index), int(count))
    for name in names:
        compile_for(name)


if __name__ == "__main__":
    main(sys.argv[1:])
