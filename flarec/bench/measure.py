"""Time and memory of a function: CUDA events, CUDA graphs, the allocator's peak. On the CPU wall time, for tests."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

GRAPH_TURNS = 4
"""How often a graph runs every step: starting it costs a few microseconds."""

Step = Callable[[], Sequence[Tensor]]
GIB = 2**30


class NotMeasured(Exception):
    """What a row needs is not there; the message says what."""


@dataclass(frozen=True)
class TrainingTime:
    """Medians in milliseconds, and bytes above what was allocated before: gradients of the inputs are not counted."""

    forward_ms: float
    both_ms: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Clock:
    """Measures on one device; `budget_ms` is about how long a timing repeats, after a warm-up of a quarter of it."""

    device: torch.device
    budget_ms: float = 100

    def median_ms(self, step: Callable[[], object]) -> float:
        """Milliseconds of one call, the median of many; the L2 cache is flushed between calls."""
        if self.device.type == "cuda":
            from triton.testing import do_bench

            return float(do_bench(step, warmup=self.budget_ms / 4, rep=self.budget_ms, return_mode="median"))
        return statistics.median(_wall_ms(step) for _ in range(3))

    def graph_ms(self, steps: Sequence[Callable[[], object]]) -> float:
        """Milliseconds of one step when all of them are replayed as one CUDA graph, which leaves out the host.

        Give steps on different memory, more of it than the L2 cache holds.
        """
        if self.device.type != "cuda":
            return statistics.median(_wall_ms(step) for step in steps)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in steps:
                step()  # compiles, and allocates what a first call allocates
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # results stay alive, so that no step writes where another one has just written
            results = [step() for _ in range(GRAPH_TURNS) for step in steps]
        times: list[float] = []
        for turn in range(30):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 5:
                times.append(start.elapsed_time(end) / len(results))
        return statistics.median(times)

    def peak_bytes(self, step: Step) -> int | None:
        """Most bytes that one call has allocated at a time, without the tensors that it returns; None on the CPU."""
        if self.device.type != "cuda":
            return None
        step()  # what a first call allocates for good is not counted
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        results = step()
        torch.cuda.synchronize(self.device)
        returned = sum(result.numel() * result.element_size() for result in results)
        return torch.cuda.max_memory_allocated(self.device) - before - returned

    def training(self, forward: Step, leaves: Sequence[Tensor]) -> TrainingTime:
        """A layer's forward (with what autograd keeps), and forward with backward. `forward` returns its outputs."""
        seeds = [torch.randn_like(output) for output in forward()]  # strides, too, are those of the outputs

        def both() -> Sequence[Tensor]:
            return torch.autograd.grad(forward(), leaves, seeds)

        peak = self.peak_bytes(both)
        return TrainingTime(self.median_ms(forward), self.median_ms(both), peak)

    def free(self) -> None:
        """Give back what finished measurements have left in the allocator."""
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # of an earlier kernel, whose measurement has failed already
                torch.cuda.empty_cache()


def _wall_ms(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def ceilings(clock: Clock) -> dict[str, float]:
    """What the device does at most: GB/s of a copy (bytes read and written) and TFLOP/s of a bf16 product of 8192^3."""
    size, side = (2**30, 8192) if clock.device.type == "cuda" else (2**16, 64)

    def copy_ms() -> float:
        source = torch.zeros(size, dtype=torch.bfloat16, device=clock.device)
        target = torch.empty_like(source)
        return clock.median_ms(lambda: target.copy_(source))

    def product_ms() -> float:
        a, b = (torch.randn(side, side, device=clock.device).to(torch.bfloat16) for _ in range(2))
        return clock.median_ms(lambda: a @ b)

    return {"copy_gb_per_s": 4 * size / copy_ms() / 1e6, "matmul_tflop_per_s": 2 * side**3 / product_ms() / 1e9}
