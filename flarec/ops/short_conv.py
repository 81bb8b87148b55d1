"""Short causal depthwise convolution (docs/semantics.md section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..kernels.short_conv.reference import reference, reference_step
from ..layout import Layout
from .mixer import Form, Mixer, Site, Slot, plain_layout

if TYPE_CHECKING:
    from ..kernels.short_conv.readers import ConvSchedule


def _captured(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    return reference(x, weight, bias, plain_layout(x.shape[0], x.shape[2], x.device), activation=activation)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    return x.new_empty(x.shape)


@dataclass(frozen=True)
class ConvWindows:
    """[rows, T, W] int64: which raw input every lag of a short convolution reads."""

    width: int
    operand: ClassVar[str] = "windows"
    relative: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"conv_windows_{self.width}"

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        from ..kernels.short_conv.windows import conv_windows

        return conv_windows(layout, self.width, continues=capacity is not None)

    def describe(self) -> str:
        return f"conv windows, width {self.width}"


@dataclass(frozen=True)
class ConvOrder:
    """`ConvSchedule`: the order in which a short convolution visits tokens, and what each of them reads (Triton)."""

    width: int
    operand: ClassVar[str] = "schedule"
    relative: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"conv_order_{self.width}"

    def build(self, layout: Layout, capacity: int | None) -> ConvSchedule:
        from ..kernels.short_conv.readers import ConvSchedule

        return ConvSchedule.from_layout(layout, self.width, continues=capacity is not None)

    def describe(self) -> str:
        return f"conv order, width {self.width}"


def _slots(site: Site) -> Iterator[Slot]:
    yield Slot("buffer", ("batch", site.size("x", 1), site.size("weight", 1) - 1), site.dtype("x"), "conv")


def _options(site: Site) -> Iterator[str]:
    yield f"width {site.size('weight', 1)}"
    yield f"activation {site['activation'] or 'none'}"


def _refuses(site: Site) -> str | None:
    from ..kernels.short_conv import triton_conv
    from ..kernels.short_conv.readers import WIDTHS

    width, activation = site.size("weight", 1), site["activation"]
    if site.dtype("x") not in triton_conv.DTYPES:
        return f"dtype {str(site.dtype('x')).removeprefix('torch.')}"
    if width not in WIDTHS:
        return f"width {width} (widths {WIDTHS.start} to {WIDTHS.stop - 1} are supported)"
    return None if activation in (None, "silu", "swish") else f"activation '{activation}'"


SHORT_CONV = Mixer(
    name="short_conv",
    captured=_captured,
    fake=_fake,
    mixing="state",
    axes={"x": "BCL"},
    output="BCL",
    sees="clean: causal per document; noisy: own block, then clean before the anchor",
    streams=reference,
    cached=reference_step,
    slots=_slots,
    options=_options,
    forms={
        "torch": Form(
            train="flarec.kernels.short_conv.torch_gather:two_stream",
            step="flarec.kernels.short_conv.torch_gather:step",
            reads=lambda site: ConvWindows(site.size("weight", 1)),
            frozen=True,
        ),
        "triton": Form(
            train="flarec.kernels.short_conv.triton_conv:two_stream",
            step="flarec.kernels.short_conv.triton_conv:step_of_layout",
            reads=lambda site: ConvOrder(site.size("weight", 1)),
            refuses=_refuses,
            opaque=("step",),
            in_place=("x",),
        ),
    },
)
"""x [B,C,L], weight [C,W], bias [C] or None -> [B,C,L]; slot buffer [B,C,W-1+R]: raw inputs before and in the previous
step's clean rows."""
