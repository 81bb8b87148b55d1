"""Random inputs of linear attention, shared by its tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from flarec.layout import Layout


@dataclass(frozen=True)
class Case:
    """One point of the op's specification, and a seed for its inputs."""

    gate: str  # "none", "scalar" or "channel"
    delta: bool
    l2norm: bool
    group: int
    seed: int
    decay: float = 1.0

    def inputs(self, layout: Layout, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
        """q, k, v, g, beta and initial_state, as leaves; 2 key heads, K = 4, V = 3."""
        gen = torch.Generator().manual_seed(self.seed)
        rows, length, heads = layout.rows, layout.length, 2 * self.group

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        size = {"none": (0,), "scalar": (rows, length, heads), "channel": (rows, length, heads, 4)}[self.gate]
        tensors = {
            "q": normal(rows, length, 2, 4),
            "k": normal(rows, length, 2, 4) * 0.5,
            "v": normal(rows, length, heads, 3),
            "g": -self.decay * torch.nn.functional.softplus(normal(*size)),
            "beta": normal(rows, length, heads).sigmoid(),
            "initial_state": normal(rows, heads, 4, 3),
        }
        if self.gate == "none":
            del tensors["g"]
        leaves: dict[str, Tensor | None] = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        return {"g": None, **leaves}

    def options(self) -> dict[str, Any]:
        return {"scale": 0.6, "delta": self.delta, "l2norm": self.l2norm}


cases = st.builds(
    Case,
    gate=st.sampled_from(["none", "scalar", "channel"]),
    delta=st.booleans(),
    l2norm=st.booleans(),
    group=st.integers(1, 2),
    seed=st.integers(0, 999),
)


def poison_padding(inputs: dict[str, Tensor | None], layout: Layout) -> dict[str, Tensor | None]:
    """The same leaves with NaN on padding slots."""
    padding = layout.token_document() < 0
    out: dict[str, Tensor | None] = {}
    for name, x in inputs.items():
        if x is None or name == "initial_state":
            out[name] = x
        else:
            mask = padding.view(*padding.shape, *[1] * (x.ndim - 2))
            out[name] = x.detach().masked_fill(mask, float("nan")).requires_grad_()
    return out
