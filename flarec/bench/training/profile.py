"""Kernels of a step on a GPU: when they ran, and what kind of work they are, by their names."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

import torch

Span = tuple[int, int]
"""First and last moment in ns."""
KINDS = {
    "communication": re.compile(r"^nccl", re.I),
    "products": re.compile(r"gemm|cutlass|nvjet|xmma|cublas", re.I),
    "optimizer": re.compile(r"multi_tensor|adam|foreach", re.I),
    "compiled regions": re.compile(r"^triton_"),
    "copies": re.compile(r"^Memcpy|^Memset|copy_kernel|CatArray", re.I),
    "single operations": re.compile(r"at::native|at_cuda_detail|cunn_|cub::", re.I),
}
"""The first that matches; anything else is a kernel that somebody wrote for a mixer, the losses, or both."""
REST = "mixers and losses"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], count: int) -> float:
    """Per step, back to back: the host may run ahead as it does in a run."""
    wait()
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return (time.perf_counter() - start) / count


def kernels_of(step: Callable[[], object], count: int = 2) -> list[tuple[str, Span]]:
    """The kernels that some steps run on the GPU, by name, with when they ran."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    wait()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(count):
            step()
        wait()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    return [
        (event.name(), (event.start_ns(), event.start_ns() + event.duration_ns()))
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
        and event.duration_ns() > 0
        and not event.name().startswith(("ProfilerStep", "Optimizer.", "gpu_user_annotation", "nccl:"))
    ]


def union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint spans of time, in order."""
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return found


def length(spans: Iterable[Span]) -> int:
    return sum(last - first for first, last in spans)


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), REST)


def shares(kernels: Iterable[tuple[str, Span]]) -> dict[str, float]:
    """Of the time between the first and the last kernel: "idle", in which none runs, and by kind the time of its
    kernels; those that overlap count twice."""
    kernels = list(kernels)
    if not kernels:
        return {}
    busy = union(span for _, span in kernels)
    whole = busy[-1][1] - busy[0][0]
    found = {"idle": 1 - length(busy) / whole}
    for name, span in kernels:
        kind = kind_of(name)
        found[kind] = found.get(kind, 0.0) + length([span]) / whole
    return found
