"""Hooks: functions with the signature of a modelling file's mixer function that call one semantic op.

What the op does not cover is written out in plain ATen here: discretisation, skip connections, output gates. Every
argument is used or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import ops
from .interfaces import reject


def short_conv_hook(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    """`causal_conv1d_fn`: x [B,C,L], weight [C,W] -> [B,C,L]."""
    reject("causal_conv1d_fn", **kwargs)
    return ops.SHORT_CONV(hidden_states.contiguous(), weight, bias, activation)


def delta_rule_hook(name: str) -> Callable[..., tuple[Tensor, None]]:
    """A delta rule: q, k [B,L,Hk,K], v [B,L,H,V], g [B,L,H(,K)], beta [B,L,H] -> ([B,L,H,V], no state)."""

    def hook(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        reject(name, initial_state=initial_state, output_final_state=output_final_state, **kwargs)
        scale = float(query.shape[-1]) ** -0.5
        args = (query.contiguous(), key.contiguous(), value.contiguous(), g.contiguous(), beta.contiguous())
        return ops.LINEAR_ATTENTION(*args, scale, True, use_qk_l2norm_in_kernel), None

    return hook


def mamba2_hook(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`mamba2_chunk_scan` as scalar-gate linear attention: C, B, x are q, k, v; beta = dt, g = dt * A."""
    reject("mamba2_chunk_scan", initial_states=initial_states, return_final_states=return_final_states, **kwargs)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    x = hidden_states.float()
    g = dt * A.float()
    args = (C.float().contiguous(), B.float().contiguous(), x.contiguous(), g.contiguous(), dt.contiguous())
    output = ops.LINEAR_ATTENTION(*args, 1.0, False, False)
    return output if D is None else output + D[:, None] * x


def selective_scan_hook(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`mamba_selective_scan` (Mamba-1): x, dt, z [B,C,L], A [C,N], B, C [B,N,L] -> [B,C,L].

    The last two flags choose between implementations of the same recurrence.
    """
    reject("mamba_selective_scan", return_last_state=return_last_state, **kwargs)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    x, dt, B, C = (tensor.transpose(1, 2).contiguous() for tensor in (hidden_states, dt, B, C))
    output = ops.SELECTIVE_SCAN(x, dt, A, B, C).transpose(1, 2)
    if D is not None:
        output = output + hidden_states * D[:, None]
    return output if z is None else output * F.silu(z)


def no_shortcut(*args: Any, **kwargs: Any) -> None:
    """A fused kernel that may decline: declining makes the model take the path with one function per mixer."""
