"""Selective scan, the recurrence of Mamba-1 (docs/semantics.md section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..kernels.diagonal.selective_scan.reference import reference, reference_step
from ..layout import Layout
from .mixer import Form, Mixer, Site, Slot, plain_layout, state_dtype

if TYPE_CHECKING:
    from ..kernels.diagonal.schedule import ScanSchedule


def _captured(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return reference(x, dt, a, b, c, plain_layout(x.shape[0], x.shape[1], x.device))


def _fake(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@dataclass(frozen=True)
class Scan:
    """`ScanSchedule`: the clean walk, whose states are kept for `chunk_size` slots at a time, and the blocks that start
    on its way."""

    chunk_size: int = 32
    operand: ClassVar[str] = "schedule"
    relative: ClassVar[bool] = True
    name: ClassVar[str] = "scan_schedule"
    on_host: ClassVar[bool] = True

    def build(self, layout: Layout, capacity: int | None) -> ScanSchedule:
        from ..kernels.diagonal.schedule import ScanSchedule

        return ScanSchedule.from_layout(layout, self.chunk_size)

    def describe(self) -> str:
        return f"scan schedule, chunk_size {self.chunk_size}"


def _slots(site: Site) -> Iterator[Slot]:
    channels, states = site.size("a", 0), site.size("a", 1)
    dtype = state_dtype(site.dtype("x"))
    yield Slot("state", ("batch", channels, states), dtype)
    for operand, size in (("pending_x", channels), ("pending_dt", channels), ("pending_b", states)):
        yield Slot(operand, ("batch", "pending", size), dtype)


def _options(site: Site) -> Iterator[str]:
    yield f"{site.size('a', 1)} states per channel"


SELECTIVE_SCAN = Mixer(
    name="selective_scan",
    captured=_captured,
    fake=_fake,
    mixing="state",
    axes={"x": "BLC", "dt": "BLC", "b": "BLS", "c": "BLS"},
    output="BLC",
    sees="clean: reset per document; noisy: from the clean state at the anchor",
    streams=reference,
    cached=reference_step,
    slots=_slots,
    options=_options,
    forms={
        "torch": Form(
            train="flarec.kernels.diagonal.selective_scan.torch_scan:two_stream",
            step="flarec.kernels.diagonal.selective_scan.torch_scan:step",
            reads=lambda site: Scan(),
            opaque=("train", "step"),
            frozen=True,
        ),
    },
)
"""x, dt [B,L,C], a [C,N], b, c [B,L,N] -> [B,L,C]; slots state [B,C,N], pending_x, pending_dt [B,R,C], pending_b
[B,R,N] in float32."""
