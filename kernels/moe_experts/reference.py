"""Experts as a loop: the specification. Gated experts, `down(act(gate(x)) * up(x))`, with gate and up in one matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flarec.errors import CaptureError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Look an activation up by its transformers name; `CaptureError` if the experts do not know it."""
    if name not in ACTIVATIONS:
        raise CaptureError(f"moe_experts has no activation {name!r}; it knows {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def reference(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *, activation: str) -> Tensor:
    """Weighted sum over each token's experts, [N, D] in x's dtype.

    x [N, D]; index [N, k] int64, the experts chosen for each token (`index == E` means: dropped, contributes nothing);
    weight [N, k]; gate_up [E, 2I, D] (gate rows first); down [E, D, I].
    """
    act = activation_function(activation)
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, choice = torch.where(index == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        result = F.linear(act(gate) * up, down[expert]) * weight[token, choice, None]
        out = out.index_add(0, token, result.to(out.dtype))
    return out
