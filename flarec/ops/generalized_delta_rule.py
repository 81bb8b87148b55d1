"""Generalised delta rule, linear attention with a transition of its own: RWKV-7 (docs/semantics.md section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..kernels.generalized_delta_rule.reference import reference, reference_step
from ..layout import Layout
from .mixer import Form, Mixer, Site, Slot, plain_layout, state_dtype

if TYPE_CHECKING:
    from ..kernels.generalized_delta_rule.schedule import DeltaSchedule


def _captured(q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return reference(q, k, v, g, a, b, plain_layout(q.shape[0], q.shape[1], q.device), scale=scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return q.new_empty(v.shape)


@dataclass(frozen=True)
class DeltaChunks:
    """`DeltaSchedule`: clean slots in chunks, and the blocks that start on their way."""

    chunk_size: int = 16
    operand: ClassVar[str] = "schedule"
    relative: ClassVar[bool] = True
    name: ClassVar[str] = "delta_schedule"
    on_host: ClassVar[bool] = True

    def build(self, layout: Layout, capacity: int | None) -> DeltaSchedule:
        from ..kernels.generalized_delta_rule.schedule import DeltaSchedule

        return DeltaSchedule.from_layout(layout, self.chunk_size)

    def describe(self) -> str:
        return f"delta schedule, chunk_size {self.chunk_size}"


def _slots(site: Site) -> Iterator[Slot]:
    heads, keys, values = site.size("v", 2), site.size("k", 3), site.size("v", 3)
    dtype = state_dtype(site.dtype("v"))
    yield Slot("state", ("batch", heads, keys, values), dtype)
    for operand, size in (("k", keys), ("v", values), ("g", keys), ("b", keys), ("u", values)):
        yield Slot(f"pending_{operand}", ("batch", "pending", heads, size), dtype)


def _options(site: Site) -> Iterator[str]:
    yield "channel gate"
    yield f"scale {site['scale']:.4g}"


GENERALIZED_DELTA_RULE = Mixer(
    name="generalized_delta_rule",
    captured=_captured,
    fake=_fake,
    mixing="state",
    axes={"q": "BLHK", "k": "BLHK", "v": "BLHV", "g": "BLHK", "a": "BLHK", "b": "BLHK"},
    output="BLHV",
    sees="clean: reset per document; noisy: from the clean state at the anchor",
    streams=reference,
    cached=reference_step,
    slots=_slots,
    options=_options,
    forms={
        "torch": Form(
            train="flarec.kernels.generalized_delta_rule.torch_chunk:two_stream",
            step="flarec.kernels.generalized_delta_rule.torch_chunk:step",
            reads=lambda site: DeltaChunks(),
            opaque=("train", "step"),
            frozen=True,
        ),
    },
)
"""q, k, a, b, g [B,L,H,K], v [B,L,H,V] -> [B,L,H,V]; slots state [B,H,K,V], pending_k, pending_g, pending_b [B,R,H,K],
pending_v, pending_u [B,R,H,V] in float32."""
