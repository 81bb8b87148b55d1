"""What lowered nodes read from the layout, computed once per batch: masks, conv windows, state schedules, positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.diagonal.schedule import CHUNK_SIZE, ScanSchedule
from .kernels.linear_attention.panels.schedule import StateSchedule
from .kernels.linear_attention.step.schedule import MAX_TILE, StepSchedule
from .kernels.linear_attention.tiles.schedule import TileSchedule
from .kernels.short_conv.readers import ConvSchedule
from .kernels.short_conv.windows import conv_windows
from .kernels.softmax_attention.attention_schedule import AttentionSchedule
from .kernels.softmax_attention.mask import visibility
from .layout import PADDING, Layout


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


@dataclass(frozen=True)
class Scan:
    """`ScanSchedule`: the clean walk of a selective scan or gated recurrence, and the blocks that start on its way.

    chunk_size  clean slots whose states are kept at a time; None: the whole row (gated recurrence, whose states are the
                output)
    """

    chunk_size: int | None = CHUNK_SIZE
    on_host = True

    def build(self, layout: Layout, capacity: int | None) -> ScanSchedule:
        return ScanSchedule.from_layout(layout, self.chunk_size)

    def describe(self) -> str:
        return "scan schedule" + (f", chunk_size {self.chunk_size}" if self.chunk_size else ", one chunk")


@dataclass(frozen=True)
class AttentionIntervals:
    """`AttentionSchedule`: the intervals of slots that every token reads, and who reads each tile of keys (Triton)."""

    window: int | None = None
    on_host = True

    def build(self, layout: Layout, capacity: int | None) -> AttentionSchedule:
        return AttentionSchedule.from_layout(layout, window=self.window)

    def describe(self) -> str:
        return "attention intervals" + (f", sliding window {self.window}" if self.window else "")


@dataclass(frozen=True)
class ConvOrder:
    """`ConvSchedule`: the order in which a short convolution visits tokens, and what each of them reads (Triton)."""

    width: int
    on_host = True

    def build(self, layout: Layout, capacity: int | None) -> ConvSchedule:
        return ConvSchedule.from_layout(layout, self.width)

    def describe(self) -> str:
        return f"conv order, width {self.width}"


@dataclass(frozen=True)
class Tiles:
    """`TileSchedule`: chunks of clean tokens and tiles of noisy rows that start from their states (Triton)."""

    chunk_size: int = 64
    on_host = True

    def build(self, layout: Layout, capacity: int | None) -> TileSchedule:
        return TileSchedule.from_layout(layout, chunk_size=self.chunk_size)

    def describe(self) -> str:
        return f"chunks and tiles, chunk_size {self.chunk_size}"


@dataclass(frozen=True)
class StepTiles:
    """What a decode step's linear attention reads: `StepSchedule`, or `TileSchedule` for a prefill (Triton).

    A request whose clean slots and one block are more rows than the step kernel holds (64) is a prefill: its rows are
    worth the chunks of the training kernels. A layout of more than 64 slots on a GPU is asked for its longest block.
    """

    chunk_size: int = 64

    def build(self, layout: Layout, capacity: int | None) -> StepSchedule | TileSchedule:
        longest = None if layout.length <= MAX_TILE else _longest_block(layout)
        if longest is not None and layout.clean_length + longest > MAX_TILE:
            return TileSchedule.from_layout(layout, chunk_size=self.chunk_size)
        return StepSchedule.from_layout(layout, max_block=longest)

    def describe(self) -> str:
        return f"step rows; in a prefill chunks and tiles, chunk_size {self.chunk_size}"


def _longest_block(layout: Layout) -> int:
    """Tokens of the longest noisy block, 1 if there is none."""
    if layout.noisy_length == 0 or layout.blocks == 0:
        return 1
    real = (layout.noisy_block != PADDING).long()
    counts = torch.zeros_like(layout.block_document).scatter_add_(1, layout.noisy_block.clamp_min(0), real)
    return max(1, int(counts.max()))
