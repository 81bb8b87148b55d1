"""What is timed: sizes and options of one layer, its layout, and its random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..layout import Block, Layout, build_layout

SEED = 0


@dataclass(frozen=True)
class StreamSizes:
    """A training batch: `rows` of `tokens` clean tokens, `views` noisy views of every response in blocks of `block`.

    documents = documents per row, of uneven lengths; prompt = part of every document that has no noisy copy.
    """

    rows: int = 8
    tokens: int = 4096
    block: int = 4
    views: int = 2
    documents: int = 1
    prompt: float = 0.0
    readout: str = "block_end"

    @property
    def clean_tokens(self) -> int:
        return self.rows * self.tokens

    def lengths(self) -> list[int]:
        """Lengths of a row's documents; with several, the last is about three times as long as the first."""
        weights = [self.documents + 2 * index for index in range(self.documents)]
        ends = [self.tokens * sum(weights[: index + 1]) // sum(weights) for index in range(self.documents)]
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def length(self) -> int:
        """Token slots per row, T = Lc + Ln."""
        responses = [length - int(self.prompt * length) for length in self.lengths()]
        return self.tokens + self.views * self.block * sum(-(-length // self.block) for length in responses)

    def layout(self, device: torch.device | str) -> Layout:
        lengths = self.lengths()
        blocks = [
            Block(document, anchor, self.block, view, self.readout)
            for view in range(self.views)
            for document, length in enumerate(lengths)
            for anchor in range(int(self.prompt * length), length, self.block)
        ]
        return build_layout([lengths] * self.rows, [blocks] * self.rows, device=device)

    def small(self, tokens: int) -> StreamSizes:
        """The same batch with one row of few tokens and no more than three documents, for a loop over tokens."""
        return replace(self, rows=1, tokens=min(self.tokens, tokens), documents=min(self.documents, 3))

    def text(self) -> str:
        views = "clean stream alone" if not self.views else f"{self.views} view{'s' * (self.views > 1)}"
        parts = [f"{self.rows} x {self.tokens} clean tokens", views]
        if self.views:
            parts.append(f"blocks of {self.block}")
        if self.documents > 1:
            parts.append(f"{self.documents} documents per row")
        if self.prompt:
            parts.append(f"{self.prompt:.0%} prompt")
        return ", ".join(parts)


@dataclass(frozen=True)
class Linear:
    """One linear-attention layer on `streams`. gate: "none", "scalar" or "channel"."""

    streams: StreamSizes = StreamSizes()
    heads: int = 16
    key_dim: int = 128
    value_dim: int = 128
    gate: str = "scalar"
    delta: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return float(self.key_dim**-0.5)

    def options(self) -> dict[str, Any]:
        """Keywords of the op. Keys and queries come normalised, as they do to the baselines."""
        return {"scale": self.scale, "delta": self.delta, "l2norm": False}

    def clean_only(self) -> Linear:
        return replace(self, streams=replace(self.streams, views=0))

    def small(self, tokens: int) -> Linear:
        return replace(self, streams=self.streams.small(tokens))

    def inputs(self, tokens: int, device: torch.device | str, seed: int = SEED) -> list[Tensor]:
        """Leaves q, k, v, g, beta (g left out without a gate) for `tokens` slots per row; gates in float32."""
        generator = torch.Generator(device=device).manual_seed(seed)
        shape = (self.streams.rows, tokens, self.heads)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        q, k = (functional.normalize(normal(*shape, self.key_dim), dim=-1).to(self.dtype) for _ in range(2))
        v = normal(*shape, self.value_dim).to(self.dtype)
        gates = {"none": (), "scalar": shape, "channel": (*shape, self.key_dim)}[self.gate]
        g = [-functional.softplus(normal(*gates) - 1)] if gates else []
        beta = torch.sigmoid(normal(*shape))
        return [x.requires_grad_() for x in (q, k, v, *g, beta)]

    def named(self, leaves: Sequence[Tensor]) -> dict[str, Any]:
        """The op's operands by name, in its order; g is None without a gate."""
        q, k, v, *rest = leaves
        return {"q": q, "k": k, "v": v, "g": rest[0] if len(rest) == 2 else None, "beta": rest[-1]}

    def text(self) -> str:
        gate = {"none": "no gate", "scalar": "scalar gate", "channel": "channel gate"}[self.gate]
        rule = "delta rule" if self.delta else "no delta"
        return (
            f"{self.streams.text()}, {self.heads} heads, K = {self.key_dim}, V = {self.value_dim}, {gate}, {rule}, "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class Conv:
    """One short convolution with SiLU on `streams`."""

    streams: StreamSizes = StreamSizes()
    channels: int = 6144
    width: int = 4
    dtype: torch.dtype = torch.bfloat16

    def small(self, tokens: int) -> Conv:
        return replace(self, streams=self.streams.small(tokens), channels=min(self.channels, 256))

    def inputs(self, tokens: int, device: torch.device | str) -> list[Tensor]:
        """Leaves x [B, T, C] (token-major, as a projection leaves it) and weight [C, W]."""
        generator = torch.Generator(device=device).manual_seed(SEED)
        x = torch.randn(self.streams.rows, tokens, self.channels, generator=generator, device=device)
        weight = torch.randn(self.channels, self.width, generator=generator, device=device) * self.width**-0.5
        return [x.to(self.dtype).requires_grad_(), weight.to(self.dtype).requires_grad_()]

    def text(self) -> str:
        return f"{self.streams.text()}, {self.channels} channels, width {self.width}, SiLU"


@dataclass(frozen=True)
class Softmax:
    """One softmax-attention layer on `streams`."""

    streams: StreamSizes = StreamSizes()
    heads: int = 16
    key_heads: int = 4
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)

    def small(self, tokens: int) -> Softmax:
        heads = max(1, self.heads // self.key_heads)
        return replace(self, streams=self.streams.small(tokens), heads=heads, key_heads=1)

    def inputs(self, tokens: int, device: torch.device | str) -> list[Tensor]:
        """Leaves q [B, H, T, D], k and v [B, Hkv, T, D], views of token-major tensors as in a model."""
        generator = torch.Generator(device=device).manual_seed(SEED)

        def normal(heads: int) -> Tensor:
            x = torch.randn(self.streams.rows, tokens, heads, self.dim, generator=generator, device=device)
            return x.to(self.dtype).transpose(1, 2).requires_grad_()

        return [normal(self.heads), normal(self.key_heads), normal(self.key_heads)]

    def text(self) -> str:
        return f"{self.streams.text()}, {self.heads} heads, {self.key_heads} key heads, D = {self.dim}"


@dataclass(frozen=True)
class DecodeStep:
    """A draft-and-verify step of a linear-attention layer: per request `clean` rows, and a block after each of them."""

    batch: int = 8
    clean: int = 4
    block: int = 3
    heads: int = 16
    key_dim: int = 128
    value_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    cached: int = 1000

    def small(self) -> DecodeStep:
        return replace(self, batch=min(self.batch, 2), heads=min(self.heads, 2))

    def layer(self) -> Linear:
        streams = StreamSizes(rows=self.batch, tokens=self.clean, block=self.block)
        return Linear(streams, self.heads, self.key_dim, self.value_dim, dtype=self.dtype)

    def layout(self, device: torch.device | str) -> Layout:
        blocks = [Block(0, self.cached + 1 + index, self.block, 0, "causal") for index in range(self.clean)]
        return build_layout(
            [[self.clean]] * self.batch, [blocks] * self.batch, cached=[self.cached] * self.batch, device=device
        )

    def cache(self, device: torch.device | str, seed: int = SEED) -> list[Tensor]:
        """state [B, H, K, V] and pending k, d, g of `clean` rows, float32, and how many each request accepted."""
        rows = Linear(StreamSizes(rows=self.batch), self.heads, self.key_dim, self.value_dim, dtype=torch.float32)
        _, k, v, g, beta = (x.detach() for x in rows.inputs(self.clean, device, seed=seed + 1))
        generator = torch.Generator(device=device).manual_seed(seed + 2)
        shape = (self.batch, self.heads, self.key_dim, self.value_dim)
        state = torch.randn(shape, generator=generator, device=device)
        accepted = torch.arange(self.batch, device=device) % (self.clean + 1)
        return [state, k, beta[..., None] * v, g, accepted]

    def text(self) -> str:
        return (
            f"batch {self.batch}, {self.clean} clean rows and {self.clean} blocks of {self.block}, {self.heads} heads, "
            f"K = {self.key_dim}, V = {self.value_dim}"
        )
