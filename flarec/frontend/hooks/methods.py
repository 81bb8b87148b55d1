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


def cca_hook(
    self: Any, hidden_states: Tensor, past_key_values: Any = None, conv_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`ZayaCCAProjection.forward`: x [B,L,D] -> q [B,L,H,K], k and v [B,L,Hk,K].

    Queries and keys go through a depthwise convolution and one that mixes the channels of a head; half of each value is
    the token's before it. Whatever relates tokens is the short convolution: to look j tokens back is one whose only
    weight is a 1. Before a document's first token the model reads zeros, so that biases of the first convolution and of
    the delayed projection are there too.
    """
    reject("ZayaCCAProjection", past_key_values=past_key_values, conv_mask=conv_mask)
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    queries, keys = self.q_proj(hidden_states), self.k_proj(hidden_states)
    raw = torch.cat([queries, keys], dim=-1).transpose(1, 2).contiguous()  # [B,C,L]
    first, second = self.conv_qk_depthwise, self.conv_qk_grouped
    mixed = ops.SHORT_CONV(raw, first.weight.squeeze(1), None, None)
    heads, width = second.groups, second.kernel_size[0]
    weight = second.weight.unflatten(0, (heads, -1))  # [heads, out, in, width]
    total = second.bias
    for back in range(width):
        row = _shifted(mixed, back).transpose(1, 2) + first.bias
        part = weight[..., width - 1 - back].transpose(1, 2)  # [heads, in, out]
        total = total + torch.matmul(row.unflatten(-1, (heads, 1, -1)), part).flatten(-3)
    per_head = queries.view(shape)
    repeated = keys.view(shape).unsqueeze(3).expand(-1, -1, -1, self.num_key_value_groups, -1).flatten(2, 3)
    query_rest = (per_head + repeated) * 0.5
    key_rest = query_rest.unflatten(2, (-1, self.num_key_value_groups)).mean(dim=-2)
    size = queries.shape[-1]
    query = total[..., :size].view(shape) + query_rest
    key = total[..., size:].view(shape) + key_rest
    delayed = F.linear(hidden_states, self.v_proj_delayed.weight).transpose(1, 2).contiguous()
    before = _shifted(delayed, 1).transpose(1, 2)
    if self.v_proj_delayed.bias is not None:
        before = before + self.v_proj_delayed.bias
    value = torch.cat([self.v_proj_current(hidden_states), before], dim=-1).view(shape)
    return query, key, value


def _shifted(x: Tensor, back: int) -> Tensor:
    """x [B,C,L] as it was `back` tokens ago, zeros before the first token."""
    if back == 0:
        return x
    one = torch.ones(x.shape[1], 1, dtype=x.dtype, device=x.device)
    return ops.SHORT_CONV(x, torch.cat([one, *(torch.zeros_like(one) for _ in range(back))], dim=1), None, None)


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
