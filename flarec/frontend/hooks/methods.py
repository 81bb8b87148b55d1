"""Hooks for mixers that a modelling file writes as a method instead of a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import ops
from .interfaces import reject


def lightning_hook(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`MiniMaxLightningAttention.forward`: x [B,L,D] -> [B,L,D]. Linear attention that decays by exp(-slope) per head.

    Neither queries nor scores are scaled; the gate is the same for every token, and no token is weighted (beta = 1).
    """
    reject("MiniMaxLightningAttention", attention_mask=attention_mask, past_key_values=past_key_values)
    heads, dim = self.num_attention_heads, self.head_dim
    mixed = self.act_fn(self.qkv_proj(hidden_states)).unflatten(-1, (heads, 3 * dim))  # [B,L,H,3D]
    query, key, value = (part.contiguous() for part in mixed.split(dim, dim=-1))
    beta = torch.ones_like(value[..., 0])
    gate = beta.float() * -self.slope_rate[:, 0, 0].float()
    output = ops.LINEAR_ATTENTION(query, key, value, gate, beta, 1.0, False, False)
    gated = F.sigmoid(self.output_gate(hidden_states)) * self.norm(output.flatten(-2))
    return self.out_proj(gated), None


def recurrent_block_hook(self: Any, input_states: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """`RecurrentGemmaRecurrentBlock.forward` as without a cache: short convolution, RG-LRU and gate branch.

    The module keeps the state of its last call, which a call without a cache does not read; it is left as it was.
    """
    kept, self.rg_lru.recurrent_states = self.rg_lru.recurrent_states, None
    gate = self.act_fn(self.linear_y(input_states))
    x = self.linear_x(input_states).transpose(1, 2).contiguous()  # [B,C,L]
    x = ops.SHORT_CONV(x, self.conv_1d.weight.squeeze(1), self.conv_1d.bias, None)
    x = self.rg_lru(x.transpose(1, 2), position_ids)
    self.rg_lru.recurrent_states = kept
    return self.linear_out(x * gate), None


def rnn_scan_hook(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, None]:
    """`RecurrentGemmaRglru._rnn_scan`: x, gate [B,L,C], reset [B,L,1] (first position of a document) -> [B,L,C]."""
    reject("RecurrentGemmaRglru", recurrent_states=recurrent_states)
    decay = recurrent_gate * ~reset
    return ops.GATED_RECURRENCE(hidden_states.contiguous(), decay.contiguous()), None


@torch.library.custom_op("flarec::bounded_sqrt", mutates_args=())
def bounded_sqrt(x: Tensor, bound: float) -> Tensor:
    """Square root, elementwise, whose derivative is at most `bound`. An op, because export drops custom backwards."""
    return torch.sqrt(x)


@bounded_sqrt.register_fake
def _(x: Tensor, bound: float) -> Tensor:
    return torch.empty_like(x)


def _bounded_setup(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.bound = inputs[1]


def _bounded_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return grad / torch.sqrt(torch.clip(4.0 * x, min=ctx.bound**-2)), None


bounded_sqrt.register_autograd(_bounded_backward, setup_context=_bounded_setup)


class BoundedSqrt:
    """Stands for `SqrtBoundDerivative` of recurrent_gemma, an `autograd.Function`."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        result: Tensor = bounded_sqrt(x, 1000.0)
        return result
