"""A micro-benchmark of a device, and what counted work would take there: an extrapolation, not a measurement.

An operation takes what its arithmetic or its memory traffic takes, whichever is longer, on top of a fixed time that an
operation of nothing takes (on a GPU that time passes while the GPU works).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from .report import Rates
from .simulate import ATEN, ATTENTION, BATCHED, GATHER, MATMUL, MEMORY, Work

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
    large = device.type == "cuda"  # smaller products leave a part of it idle
    rows, batch, tokens = (8192, 2048, 2048) if large else (512, 64, 256)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    x, weight = random(rows, width), random(width, width)
    left, right = random(batch, 64, 64), random(batch, 64, 128)
    query, mask = random(1, 8, tokens, 64), torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device)
    flops = {
        MATMUL: 2 * rows * width * width / _seconds(device, lambda: F.linear(x, weight)),
        BATCHED: 2 * batch * 64 * 64 * 128 / _seconds(device, lambda: left @ right),
        ATTENTION: 4 * 8 * tokens * tokens * 64
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
    """Seconds per operation of a graph of tiny ones, called as a program calls them, forward and backward."""
    step = fx.symbolic_trace(_mix)
    x, weight = torch.ones(1, 2, 4, device=device, requires_grad=True), torch.ones(4, 4, device=device)
    index, hidden = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, 2, dtype=torch.bool, device=device)

    def chain() -> None:
        value = x
        for _ in range(4):
            value = step(value, weight, index, hidden)
        value.sum().backward()
        x.grad = None

    with _Counter() as counter:
        chain()
    seconds: float = _seconds(device, chain) / counter.count
    return seconds


def _mix(x: Tensor, weight: Tensor, index: Tensor, hidden: Tensor) -> Tensor:
    """What steps of hybrid models are made of, in about their shares (half views, a quarter elementwise): a norm, a
    projection into heads, rotary halves, a product between tokens with a mask, rows by index, a gate, a residual.

    x, returned [1, 2, 4], weight [4, 4], index [2] int64, hidden [2, 2] bool
    """
    variance = ATEN.mean.dim(ATEN.pow.Tensor_Scalar(x, 2), [-1], True)
    normed = ATEN.mul.Tensor(x, ATEN.rsqrt.default(ATEN.add.Tensor(variance, 1e-6)))
    flat = ATEN.mm.default(ATEN.view.default(normed, [2, 4]), ATEN.t.default(weight))
    heads = ATEN.transpose.int(ATEN.view.default(ATEN._unsafe_view.default(flat, [1, 2, 4]), [1, 2, 2, 2]), 1, 2)
    first, second = ATEN.slice.Tensor(heads, 3, 0, 1), ATEN.slice.Tensor(heads, 3, 1, 2)
    turned = ATEN.add.Tensor(heads, ATEN.cat.default([ATEN.neg.default(second), first], -1))
    left = ATEN.view.default(ATEN.expand.default(turned, [1, 2, 2, 2]), [2, 2, 2])
    right = ATEN.view.default(ATEN.expand.default(ATEN.transpose.int(turned, 2, 3), [1, 2, 2, 2]), [2, 2, 2])
    weights = ATEN.view.default(ATEN.bmm.default(left, right), [1, 2, 2, 2])
    seen = ATEN.masked_fill.Scalar(weights, ATEN.unsqueeze.default(ATEN.unsqueeze.default(hidden, 0), 0), 0.0)
    rows = ATEN.index_select.default(ATEN.select.int(seen, 0, 0), 1, index)
    joined = ATEN.clone.default(ATEN.transpose.int(rows, 0, 1), memory_format=torch.contiguous_format)
    back = ATEN.view.default(joined, [1, 2, 4])
    result: Tensor = ATEN.add.Tensor(x, ATEN.mul.Tensor(ATEN.silu.default(back), normed))
    return result


class _Counter(TorchDispatchMode):
    """`count`: operations that torch ran within the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


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
