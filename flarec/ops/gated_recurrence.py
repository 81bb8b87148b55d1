"""Gated recurrence, RG-LRU: one state per channel (docs/semantics.md section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..kernels.diagonal.gated_recurrence.reference import reference, reference_step
from ..layout import Layout
from .mixer import Form, Mixer, Site, Slot, plain_layout, state_dtype

if TYPE_CHECKING:
    from ..kernels.diagonal.schedule import ScanSchedule


def _captured(x: Tensor, a: Tensor) -> Tensor:
    return reference(x, a, plain_layout(x.shape[0], x.shape[1], x.device))


def _fake(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@dataclass(frozen=True)
class RowScan:
    """`ScanSchedule` of whole rows: all states are kept, because they are the output."""

    operand: ClassVar[str] = "schedule"
    relative: ClassVar[bool] = True
    name: ClassVar[str] = "row_schedule"
    on_host: ClassVar[bool] = True

    def build(self, layout: Layout, capacity: int | None) -> ScanSchedule:
        from ..kernels.diagonal.schedule import ScanSchedule

        return ScanSchedule.from_layout(layout, None)

    def describe(self) -> str:
        return "scan schedule, one chunk"


def _slots(site: Site) -> Iterator[Slot]:
    channels, dtype = site.size("x", 2), state_dtype(site.dtype("x"))
    yield Slot("state", ("batch", channels), dtype)
    yield Slot("pending_x", ("batch", "pending", channels), dtype)
    yield Slot("pending_a", ("batch", "pending", channels), dtype)


def _options(site: Site) -> Iterator[str]:
    yield "one state per channel"


GATED_RECURRENCE = Mixer(
    name="gated_recurrence",
    captured=_captured,
    fake=_fake,
    mixing="state",
    axes={"x": "BLC", "a": "BLC"},
    output="BLC",
    sees="clean: reset per document; noisy: from the clean state at the anchor",
    streams=reference,
    cached=reference_step,
    slots=_slots,
    options=_options,
    forms={
        "torch": Form(
            train="flarec.kernels.diagonal.gated_recurrence.torch_walk:two_stream",
            step="flarec.kernels.diagonal.gated_recurrence.torch_walk:step",
            reads=lambda site: RowScan(),
            opaque=("train", "step"),
            frozen=True,
        ),
    },
)
"""x, a [B,L,C] -> [B,L,C]; slots state [B,C], pending_x, pending_a [B,R,C] in float32."""
