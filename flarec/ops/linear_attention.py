"""Linear attention with a decayed matrix state, with or without the delta rule (docs/semantics.md section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..kernels.linear_attention.reference import reference
from ..kernels.linear_attention.reference_step import reference_step
from ..layout import PADDING, Layout
from .mixer import Form, Mixer, Site, Slot, plain_layout, state_dtype

if TYPE_CHECKING:
    from ..kernels.linear_attention.panels.schedule import StateSchedule
    from ..kernels.linear_attention.step.schedule import StepSchedule
    from ..kernels.linear_attention.tiles.schedule import TileSchedule

CHUNK_SIZES = (16, 32, 64)
"""Clean tokens per chunk that the Triton kernels are made for."""
NARROW = 64
"""Channels of a 16-bit head below which its rows are less than 128 bytes."""


def _captured(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, delta: bool, l2norm: bool
) -> Tensor:
    layout = plain_layout(q.shape[0], q.shape[1], q.device)
    return reference(q, k, v, g, beta, layout, scale=scale, delta=delta, l2norm=l2norm)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, delta: bool, l2norm: bool
) -> Tensor:
    return v.new_empty(v.shape)


@dataclass(frozen=True)
class Chunks:
    """`StateSchedule`: chunks of clean tokens and the noisy blocks that start from their states."""

    chunk_size: int = 64
    operand: ClassVar[str] = "schedule"
    relative: ClassVar[bool] = True
    name: ClassVar[str] = "state_schedule"
    on_host: ClassVar[bool] = True

    def build(self, layout: Layout, capacity: int | None) -> StateSchedule:
        from ..kernels.linear_attention.panels.schedule import StateSchedule

        return StateSchedule.from_layout(layout, chunk_size=self.chunk_size)

    def describe(self) -> str:
        return f"state schedule, chunk_size {self.chunk_size}"


@dataclass(frozen=True)
class Tiles:
    """`TileSchedule`: chunks of clean tokens and tiles of noisy rows that start from their states (Triton)."""

    chunk_size: int = 64
    operand: ClassVar[str] = "schedule"
    relative: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"state_tiles{_suffix(self.chunk_size)}"

    def build(self, layout: Layout, capacity: int | None) -> TileSchedule:
        from ..kernels.linear_attention.tiles.schedule import TileSchedule

        return TileSchedule.from_layout(layout, chunk_size=self.chunk_size)

    def describe(self) -> str:
        return f"chunks and tiles, chunk_size {self.chunk_size}"


@dataclass(frozen=True)
class StepTiles:
    """What a decode step's linear attention reads: `StepSchedule`, or `TileSchedule` for a prefill (Triton).

    A request whose clean slots and one block are more rows than the step kernel holds (64) is a prefill: its rows are
    worth the chunks of the training kernels. A layout of more than 64 slots that does not know its longest block is
    asked for it.

    narrow: 16-bit heads of less than 64 channels. Of them a step of more than 16 slots is a prefill, too: on an H200
    (Triton 3.6) a step of some 50 clean rows of 32 channels in bfloat16 ended with an illegal memory access. The tiles
    of a prefill are padded to 128 bytes, for a fault of Triton's that is known there (`tiles.problem`).
    """

    chunk_size: int = 64
    narrow: bool = False
    operand: ClassVar[str] = "schedule"
    relative: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"step_tiles{_suffix(self.chunk_size)}{'_narrow' if self.narrow else ''}"

    def build(self, layout: Layout, capacity: int | None) -> StepSchedule | TileSchedule:
        from ..kernels.linear_attention.step.schedule import MAX_TILE, MIN_TILE, StepSchedule
        from ..kernels.linear_attention.tiles.schedule import TileSchedule

        if self.narrow and layout.length > MIN_TILE:
            return TileSchedule.from_layout(layout, chunk_size=self.chunk_size)
        longest = layout.longest_block
        if longest is None and layout.length > MAX_TILE:
            longest = _longest_block(layout)
        if longest is not None and layout.clean_length + longest > MAX_TILE:
            return TileSchedule.from_layout(layout, chunk_size=self.chunk_size)
        return StepSchedule.from_layout(layout, max_block=longest)

    def describe(self) -> str:
        return f"step rows; in a prefill chunks and tiles, chunk_size {self.chunk_size}"


def _suffix(chunk_size: int) -> str:
    return "" if chunk_size == max(CHUNK_SIZES) else f"_{chunk_size}"


def _longest_block(layout: Layout) -> int:
    """Tokens of the longest noisy block, 1 if there is none."""
    if layout.noisy_length == 0 or layout.blocks == 0:
        return 1
    real = (layout.noisy_block != PADDING).long()
    counts = torch.zeros_like(layout.block_document).scatter_add_(1, layout.noisy_block.clamp_min(0), real)
    return max(1, int(counts.max()))


def _tiles(site: Site) -> Tiles | StepTiles:
    from ..kernels.linear_attention.tiles.schedule import largest_chunk

    dtype = torch.float32 if site.step and not _prefills_in_bfloat16(site) else site.dtype("q")
    chunk = min(site.chunk_size, largest_chunk(dtype, site.size("q", 3), site.size("v", 3)))
    if not site.step:
        return Tiles(chunk)
    return StepTiles(chunk, narrow=site.dtype("q").itemsize == 2 and site.size("q", 3) < NARROW)


def _prefills_in_bfloat16(site: Site) -> bool:
    """As `tiles.prefill` decides; it computes in float32 otherwise."""
    return all(site.dtype(name) == torch.bfloat16 for name in ("q", "k", "v")) and _gate_axes(site) < 4


def _refuses(site: Site) -> str | None:
    from ..kernels.linear_attention.tiles import train

    if site.chunk_size not in CHUNK_SIZES:
        return f"they take chunks of {', '.join(map(str, CHUNK_SIZES))} tokens, not {site.chunk_size}"
    dtype = torch.promote_types(torch.promote_types(site.dtype("q"), site.dtype("k")), site.dtype("v"))
    return train.unsupported(dtype, site.size("q", 3), site.size("v", 3))


def _gate_axes(site: Site) -> int:
    """Axes of the log decay: 0 without one, 3 for one per head, 4 for one per key channel."""
    return 0 if site["g"] is None else len(site["g"].shape)


def _slots(site: Site) -> Iterator[Slot]:
    heads, keys, values = site.size("v", 2), site.size("k", 3), site.size("v", 3)
    dtype = state_dtype(site.dtype("v"))
    yield Slot("state", ("batch", heads, keys, values), dtype)
    yield Slot("pending_k", ("batch", "pending", site.size("k", 2), keys), dtype)
    yield Slot("pending_d", ("batch", "pending", heads, values), dtype)
    if _gate_axes(site):
        gate = (heads, keys) if _gate_axes(site) == 4 else (heads,)
        yield Slot("pending_g", ("batch", "pending", *gate), dtype)


def _options(site: Site) -> Iterator[str]:
    yield {0: "no gate", 3: "scalar gate", 4: "channel gate"}[_gate_axes(site)]
    yield "delta rule" if site["delta"] else "no delta rule"
    if site["l2norm"]:
        yield "q, k normalised"
    yield f"scale {site['scale']:.4g}"


def _ordinary(name: str, values: Tensor) -> Tensor:
    """Log decays are at most 0, betas shares, queries and keys about unit vectors."""
    if name in ("g", "pending_g"):
        return -torch.nn.functional.softplus(values - 1)
    if name == "beta":
        return torch.sigmoid(values)
    return values * values.shape[-1] ** -0.5 if name in ("q", "k", "pending_k") else values


LINEAR_ATTENTION = Mixer(
    name="linear_attention",
    captured=_captured,
    fake=_fake,
    mixing="state",
    axes={"q": "BLGK", "k": "BLGK", "v": "BLHV", "g": "BLH|BLHK", "beta": "BLH"},
    output="BLHV",
    sees="clean: reset per document; noisy: from the clean state at the anchor",
    streams=reference,
    cached=reference_step,
    slots=_slots,
    options=_options,
    ordinary=_ordinary,
    forms={
        "torch": Form(
            train="flarec.kernels.linear_attention.panels.chunk:two_stream",
            step="flarec.kernels.linear_attention.panels.decode:step",
            reads=lambda site: Chunks(site.chunk_size),
            opaque=("train", "step"),
            frozen=True,
        ),
        "triton": Form(
            train="flarec.kernels.linear_attention.tiles.train:two_stream",
            step="flarec.kernels.linear_attention.triton_decode:step",
            reads=_tiles,
            refuses=_refuses,
            opaque=("step",),
            in_place=("q", "k", "v", "g"),
            frozen=True,
        ),
    },
)
"""q, k [B,L,Hk,K], v [B,L,H,V], g [B,L,H(,K)] or None, beta [B,L,H] -> [B,L,H,V]; slots state [B,H,K,V], pending_k
[B,R,Hk,K], pending_d [B,R,H,V], pending_g [B,R,H(,K)] in float32."""
