"""What lowered nodes read from the layout, computed once per batch: masks, conv windows, state schedules, positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .kernels.linear_attention.schedule import StateSchedule
from .kernels.short_conv.windows import conv_windows
from .kernels.softmax_attention.mask import visibility
from .layout import Layout


@dataclass(frozen=True)
class PositionIds:
    """[rows, T] int64, position of every token inside its document."""

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        return layout.position_ids()

    def describe(self) -> str:
        return "positions inside the document, clean | noisy"


@dataclass(frozen=True)
class SoftmaxMask:
    """[rows, T, S] bool: what every token may attend to; S = T, or cache slots and noisy tokens with a cache."""

    window: int | None = None

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        return visibility(layout, window=self.window, cache_length=capacity)

    def describe(self) -> str:
        return "softmax visibility" + (f", sliding window {self.window}" if self.window else "")


@dataclass(frozen=True)
class ConvWindows:
    """[rows, T, W] int64: which raw input every lag of a short convolution reads."""

    width: int

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        return conv_windows(layout, self.width)

    def describe(self) -> str:
        return f"conv windows, width {self.width}"


@dataclass(frozen=True)
class Schedule:
    """`StateSchedule`: chunks of clean tokens and the noisy blocks that start from their states."""

    chunk_size: int = 64

    def build(self, layout: Layout, capacity: int | None) -> StateSchedule:
        return StateSchedule.from_layout(layout, chunk_size=self.chunk_size)

    def describe(self) -> str:
        return f"state schedule, chunk_size {self.chunk_size}"
