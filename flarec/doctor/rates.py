"""A micro-benchmark of a device, and what counted work would take there: an extrapolation, not a measurement.

An operation takes what its arithmetic or its memory traffic takes, whichever is longer, on top of a fixed time that an
operation of nothing takes (on a GPU that time passes while the GPU works).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .report import Rates
from .simulate import ATTENTION, BATCHED, GATHER, MATMUL, MEMORY, Work

NEAR, FAR = 18, 26
"""Operations that move up to 2**NEAR bytes run in the caches, those of 2**FAR and more in main memory."""
REPEATS = 5
ENOUGH = 0.004  # seconds of one timing


def seconds_of(work: Work, rates: Rates) -> float:
    """Time of the counted work at the measured rates."""
    total = 0.0
    overlapped = rates.device != "cpu"
    for cell, calls in work.calls.items():
        arithmetic = work.flops[cell] / rates.flops[cell.kind] if work.flops[cell] else 0.0
        traffic = work.bytes[cell] / _bandwidth(rates, GATHER if cell.kind == GATHER else MEMORY, cell.moved)
        busy = max(arithmetic, traffic)
        total += max(busy, calls * rates.call) if overlapped else busy + calls * rates.call
    return total


def _bandwidth(rates: Rates, kind: str, moved: int) -> float:
    """Bytes per second of operations that move about 2**moved bytes."""
    share = min(1.0, max(0.0, (moved - NEAR) / (FAR - NEAR)))
    near, far = rates.near[kind], rates.far[kind]
    return 1 / ((1 - share) / near + share / far)


def measure(device: torch.device, dtype: torch.dtype, width: int) -> Rates:
    """Measure the rates on a device, with matrices as wide as the model's hidden size (at most 2048); takes about a
    second."""
    width = max(64, min(width, 2048))
    rows = 512

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    x, weight = random(rows, width), random(width, width)
    left, right = random(64, 64, 64), random(64, 64, 128)
    query, mask = random(1, 8, 256, 64), torch.ones(1, 1, 256, 256, dtype=torch.bool, device=device)
    flops = {
        MATMUL: 2 * rows * width * width / _seconds(device, lambda: F.linear(x, weight)),
        BATCHED: 2 * 64 * 64 * 64 * 128 / _seconds(device, lambda: left @ right),
        ATTENTION: 4 * 8 * 256 * 256 * 64
        / _seconds(device, lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=mask)),
    }
    near, far = ({MEMORY: _stream(device, size), GATHER: _gather(device, size)} for size in (1 << NEAR, 1 << FAR))
    return Rates(
        device.type, str(dtype).removeprefix("torch."), torch.get_num_threads(), flops, near, far, _call(device)
    )


def _stream(device: torch.device, size: int) -> float:
    """Bytes per second of a sum of two tensors; 2**size bytes read and written in all."""
    a = torch.ones(size // 12, device=device)
    b = torch.ones_like(a)
    return 12 * a.numel() / _seconds(device, lambda: a + b)


def _gather(device: torch.device, size: int) -> float:
    """Bytes per second of rows of 64 numbers fetched by index."""
    rows = torch.ones(size // 512, 64, device=device)
    index = torch.randperm(len(rows), device=device)
    return 512 * len(rows) / _seconds(device, lambda: rows.index_select(0, index))


def _call(device: torch.device) -> float:
    """Seconds per operation of a chain of tiny ones, called as a graph calls them, forward and backward."""
    length = 64
    multiply = torch.ops.aten.mul.Tensor
    x, y = torch.ones(8, device=device, requires_grad=True), torch.ones(8, device=device)

    def chain() -> None:
        value = x
        for _ in range(length):
            value = multiply(value, y)
        value.sum().backward()
        x.grad = None

    return _seconds(device, chain) / (2 * length)


def _seconds(device: torch.device, operation: Callable[[], object]) -> float:
    """Of one call, the best of several timings: other work on the machine is not the device's rate."""

    def timed(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    timed(1)
    count = max(1, int(ENOUGH / max(timed(1), 1e-7)))
    return min(timed(count) for _ in range(REPEATS))
