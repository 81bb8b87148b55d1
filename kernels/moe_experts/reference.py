"""Experts as a loop: the specification.

Gated experts are `down(act(gate(x)) * up(x))` with gate and up in one matrix, the others `down(act(up(x)))`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flarec.errors import CaptureError


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _squared_relu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Look an activation up by its transformers name; `CaptureError` if the experts do not know it."""
    if name not in ACTIVATIONS:
        raise CaptureError(f"moe_experts has no activation {name!r}; it knows {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def expert(x: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool) -> Tensor:
    """One expert on rows x [n, D]: up [2I, D] (gate rows first) if gated, else [I, D]; down [D, I] -> [n, D]."""
    act = activation_function(activation)
    hidden = F.linear(x, up)
    if not gated:
        return F.linear(act(hidden), down)
    gate, rest = hidden.chunk(2, dim=-1)
    return F.linear(act(gate) * rest, down)


def reference(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *, activation: str, gated: bool = True
) -> Tensor:
    """Weighted sum over each token's experts, [N, D] in x's dtype.

    x [N, D]; index [N, k] int64, the experts chosen for each token (`index == E` means: dropped, contributes nothing);
    weight [N, k]; up [E, 2I, D] if gated (gate rows first), else [E, I, D]; down [E, D, I].
    """
    activation_function(activation)
    out = torch.zeros_like(x)
    for number in range(up.shape[0]):
        token, choice = torch.where(index == number)
        result = expert(x[token], up[number], down[number], activation, gated) * weight[token, choice, None]
        out = out.index_add(0, token, result.to(out.dtype))
    return out
