"""RWKV-7 of the flash-linear-attention library with semantic ops in place of its Triton kernels.

As in `flarec.frontend.fla.layers`: each function stands in for the method of the same name while a model is captured.
The shift by one token, which time mixing and channel mixing start with, is a short convolution of width 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import ops
from ...ops.generalized_delta_rule import GENERALIZED_DELTA_RULE
from ..hooks.interfaces import reject
from .layers import table_activation

L2_EPSILON = 1e-6
LOG_DECAY_RATE = -0.6065306597126334  # -exp(-1/2): the log decay lies between it and 0


def layer_norm(
    self: Any, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`LayerNorm.forward`: x [..., D]; with `residual` the norm of the sum, with `prenorm` also the sum."""
    total = x.float() if residual is None else x.float() + residual.float()
    normed = _normalised(total, self.hidden_size, self.eps, self.weight, self.bias).to(x.dtype)
    if not prenorm:
        return normed
    dtype = torch.float32 if residual_in_fp32 else x.dtype
    return normed, total.to(residual.dtype if residual is not None else dtype)


def _normalised(x: Tensor, group: int, epsilon: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., D] with mean 0 and variance 1 in every group of channels, then scaled and shifted."""
    grouped = x.float().unflatten(-1, (-1, group))
    centred = grouped - grouped.mean(-1, keepdim=True)
    out: Tensor = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)).flatten(-2)
    out = out if weight is None else out * weight.float()
    return out if bias is None else out + bias.float()


def change(x: Tensor) -> Tensor:
    """`token_shift`: x [B, L, D] -> the token before minus the token, x_{t-1} - x_t, with 0 before the first."""
    one = x.new_ones(x.shape[-1], 1)
    weight = torch.cat([one, -one], dim=1)
    return ops.SHORT_CONV(x.transpose(1, 2).contiguous(), weight).transpose(1, 2)


def time_mixing(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    v_first: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None, None, Tensor | None]:
    """`RWKV7Attention.forward`: [B, L, D] -> ([B, L, D], ..., values of the first layer)."""
    reject("RWKV7Attention", attention_mask=attention_mask, past_key_values=past_key_values, cu_seqlens=cu_seqlens)
    difference = change(hidden_states)
    mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
    xr, xw, xk, xv, xa, xg = (hidden_states + difference * mix for mix in mixes)
    r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
    if self.layer_idx == 0:
        v_first = v
    else:
        assert v_first is not None
        v = torch.lerp(v, v_first, self.v_lora(xv).sigmoid())
    decay, rate = LOG_DECAY_RATE * self.w_lora(xw).sigmoid(), self.a_lora(xa).sigmoid()
    erased = _heads(k * self.k_k, self.head_dim)
    erased = _unit(erased) if self.fuse_norm else F.normalize(erased, dim=-1, p=2.0)
    k = k + k * (rate - 1) * self.k_a
    r, decay, k, rate = (_heads(x, self.head_dim) for x in (r, decay, k, rate))
    v = _heads(v, self.head_v_dim)
    operands = (x.contiguous() for x in (r, k, v, decay, -erased, erased * rate))
    out = GENERALIZED_DELTA_RULE(*operands, 1.0)
    norm = self.g_norm
    normed = _normalised(out.flatten(-2), self.head_v_dim, norm.eps, norm.weight, norm.bias).to(r.dtype)
    bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
    return self.o_proj((normed + bonus.flatten(-2)) * self.g_lora(xg)), None, None, v_first


def channel_mixing(
    self: Any,
    x: Tensor,
    attention_mask: Tensor | None = None,
    state: Any = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`RWKV7FeedForward.forward`: [B, L, D] -> [B, L, D]."""
    reject("RWKV7FeedForward", attention_mask=attention_mask, state=state, cu_seqlens=cu_seqlens)
    activation = table_activation(self.act_fn, "RWKV7FeedForward")
    return self.value(activation(self.key(x + change(x) * self.x_k))), None


def _unit(x: Tensor) -> Tensor:
    """`l2_norm`: over the last axis, in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPSILON)).to(x.dtype)


def _heads(x: Tensor, dim: int) -> Tensor:
    """[..., heads * dim] -> [..., heads, dim]"""
    return x.reshape(*x.shape[:-1], -1, dim)
