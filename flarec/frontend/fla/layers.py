"""Layers of the flash-linear-attention library with semantic ops in place of its Triton kernels.

Each function stands in for the method or function of the same name while a model is captured: same arguments, same
result, fused kernels written out in plain ATen, one semantic op per token mixer. Two things make whole `forward`
methods necessary where a kernel alone would do: the library chooses a kernel by `q_len <= 64`, which export would bake
in, and it rotates by the place in the row, where packed documents and noisy blocks need `position_ids`.

Nothing of the library is imported here; see `flarec.frontend.fla.families` for the table.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...errors import CaptureError
from ..hooks.interfaces import reject

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "logsigmoid": F.logsigmoid,
    "sqrelu": lambda x: F.relu(x).square(),
}


def activation_of(name: str, where: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise CaptureError(f"{where} uses the activation '{name}', which flarec does not cover; known: {known}")
    return _ACTIVATIONS[name]


def table_activation(function: Callable[..., Any], where: str) -> Callable[[Tensor], Tensor]:
    """The plain form of an activation: a module of transformers, or an entry of the library's own table (Triton)."""
    if isinstance(function, nn.Module):
        return function
    from fla.modules.activations import ACT2FN

    name = next((name for name, entry in ACT2FN.items() if entry is function), getattr(function, "__name__", "?"))
    return activation_of(name, where)


# Norms, MLP, rotary positions: token by token.


def rms_norm(
    self: Any, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`RMSNorm.forward`: x [..., D]; with `residual` the norm of the sum, with `prenorm` also the sum."""
    total = x.float() if residual is None else x.float() + residual.float()
    normed = _normalised(self, total, total.shape[-1]).to(x.dtype)
    if not prenorm:
        return normed
    dtype = torch.float32 if residual_in_fp32 else x.dtype
    return normed, total.to(residual.dtype if residual is not None else dtype)


def _normalised(self: Any, x: Tensor, group: int, epsilon: float | None = None) -> Tensor:
    grouped = x.unflatten(-1, (-1, group))
    epsilon = self.eps if epsilon is None else epsilon
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + epsilon)
    out: Tensor = grouped.flatten(-2)
    if self.weight is not None:
        out = out * self.weight.float()
    return out if self.bias is None else out + self.bias.float()


def rms_norm_gated(
    self: Any,
    x: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor:
    """`FusedRMSNormGated.forward`: norm of x [..., D] times the activation of the gate g."""
    reject("FusedRMSNormGated", residual=residual, prenorm=prenorm)
    gate = activation_of(self.activation, "FusedRMSNormGated")(g.float())
    return (_normalised(self, x.float(), x.shape[-1]) * gate).to(x.dtype)


def rms_norm_grouped(self: Any, x: Tensor, z: Tensor | None = None) -> Tensor:
    """`RMSNormGated.forward` of Mamba-2: norm per group of channels, before or after the SiLU gate z."""
    h = x.float()
    if z is not None and not self.norm_before_gate:
        h = h * F.silu(z.float())
    h = _normalised(self, h, self.group_size or h.shape[-1])
    if z is not None and self.norm_before_gate:
        h = h * F.silu(z.float())
    return h.to(x.dtype)


def gated_mlp(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """`GatedMLP.forward` with SwiGLU."""
    if self.hidden_act != "swish":
        raise CaptureError(f"GatedMLP has hidden_act='{self.hidden_act}'; flarec covers 'swish'")
    hidden = (F.silu(self.gate_proj(x).float()) * self.up_proj(x).float()).to(x.dtype)
    down: Tensor = self.down_proj(hidden)
    return down


_POSITIONS: ContextVar[Tensor] = ContextVar("position_ids")


def with_positions(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a whole model with the argument that the library's models lack: `position_ids` [B, L]."""

    def positioned(self: Any, input_ids: Tensor, position_ids: Tensor) -> Any:
        token = _POSITIONS.set(position_ids)
        try:
            return forward(self, input_ids=input_ids, use_cache=False)
        finally:
            _POSITIONS.reset(token)

    return positioned


def rotate(rotary: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of q, k [B, L, H, D] at the model's `position_ids` (the library: at the place in the row)."""
    if rotary.interleaved or rotary.scale is not None or not rotary.pos_idx_in_fp32:
        raise CaptureError("rotary embedding with interleaved pairs, XPos or low-precision positions is not covered")
    angles = _POSITIONS.get()[:, :, None, None].float() * rotary.inv_freq.float()
    cos, sin = (table.to(q.dtype).float() for table in (angles.cos(), angles.sin()))

    def turned(x: Tensor) -> Tensor:
        first, second = x[..., : rotary.dim].float().chunk(2, dim=-1)
        parts = [first * cos - second * sin, second * cos + first * sin, x[..., rotary.dim :].float()]
        return torch.cat(parts if rotary.dim < x.shape[-1] else parts[:2], dim=-1).to(x.dtype)

    return turned(q), turned(k)


# Convolution and attention.


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`causal_conv1d`: x [B, L, C], weight [C, W] -> [B, L, C]."""
    reject("causal_conv1d", residual=residual, initial_state=initial_state, cu_seqlens=cu_seqlens)
    reject("causal_conv1d", output_final_state=output_final_state)
    if weight is None:
        raise CaptureError("causal_conv1d was called without a weight")
    return ops.SHORT_CONV(x.transpose(1, 2).contiguous(), weight, bias, activation).transpose(1, 2), None


def short_convolution(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`ShortConvolution.forward`: x [B, L, C] -> [B, L, C]."""
    reject("ShortConvolution", mask=mask)
    return causal_conv1d(
        x, self.weight.squeeze(1), self.bias, residual, cache, output_final_state, self.activation, None, cu_seqlens
    )


def attention(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, None, None]:
    """`Attention.forward`: causal softmax attention with grouped heads, rotary positions, optionally a window."""
    _plain_call(self, attention_mask, past_key_values, kwargs)
    q, k, v = (_heads(project(hidden_states), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
    if self.qk_norm:
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(self.rotary, q, k)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = ops.SOFTMAX_ATTENTION(q, k, v, float(self.head_dim) ** -0.5, self.window_size, None)
    return self.o_proj(out.flatten(-2)), None, None


def latent_attention(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, None, None]:
    """`MultiheadLatentAttention.forward`: keys of a part without and a part with positions, the latter shared by heads.

    The layer computes a `scaling` from `rope_scaling` and never uses it; nor does its softmax here.
    """
    _plain_call(self, attention_mask, past_key_values, kwargs)
    q = _heads(self.q_proj(hidden_states), self.qk_head_dim)
    q, q_turning = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
    k, v = _heads(self.kv_proj(hidden_states), self.qk_nope_head_dim + self.v_head_dim).split(
        [self.qk_nope_head_dim, self.v_head_dim], dim=-1
    )
    q_turned, k_turned = rotate(self.rotary, q_turning, self.k_rope(hidden_states).unsqueeze(2))
    q = torch.cat([q, q_turned], dim=-1)
    k = torch.cat([k, k_turned.expand(-1, -1, self.num_heads, -1)], dim=-1)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = ops.SOFTMAX_ATTENTION(q, k, v, float(self.qk_head_dim) ** -0.5, self.window_size, None)
    return self.o_proj(out.flatten(-2)), None, None


# Linear attention. Tensors are [B, L, heads, dim].


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`chunk_gated_delta_rule` (g [B, L, H]) and `chunk_kda` (g [B, L, H, K]), gate and beta raw or finished.

    `safe_gate` and `state_v_first` choose an algorithm and a memory order of the state; they change no value.
    """
    reject("chunk_gated_delta_rule", initial_state=initial_state, output_final_state=output_final_state)
    reject("chunk_gated_delta_rule", cu_seqlens=cu_seqlens, **kwargs)
    g, beta = g.float(), beta.float()
    if use_gate_in_kernel:
        g = _log_decay(g, A_log, dt_bias, lower_bound)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    return _linear_attention(q, k, v, g, beta, scale, delta=True, l2norm=use_qk_l2norm_in_kernel), None


def _log_decay(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """Log decay from a raw gate: -exp(A) softplus(g + bias), or, bounded, bound * sigmoid(exp(A) (g + bias))."""
    if dt_bias is not None:
        g = g + dt_bias.float().reshape(g.shape[2:])
    rate = None if A_log is None else A_log.float().exp()
    if rate is not None and g.ndim == 4:
        rate = rate.reshape(-1, 1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(g if rate is None else rate * g)
    if rate is None:
        raise CaptureError("the gate of a gated delta rule without A_log and without a lower bound is not defined")
    return -rate * F.softplus(g)


def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, scale: float, *, delta: bool, l2norm: bool
) -> Tensor:
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    gate = None if g is None else g.contiguous()
    tensors = (q.contiguous(), k.contiguous(), v.contiguous(), gate, beta.contiguous())
    return ops.LINEAR_ATTENTION(*tensors, scale, delta, l2norm).to(v.dtype)


def delta_net(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, None, None]:
    """`DeltaNet.forward`: delta rule without gate."""
    _plain_call(self, attention_mask, past_key_values, kwargs)
    q, k, v = _projected(self, hidden_states)
    if not self.use_short_conv:
        v = F.silu(v)
        q, k = (F.silu(q), F.silu(k)) if self.qk_activation == "silu" else (q, k)
    q, k, v = _heads(q, self.head_k_dim), _heads(k, self.head_k_dim), _heads(v, self.head_v_dim)
    if self.qk_activation == "relu":
        q, k = q.relu(), k.relu()
    elif self.qk_activation == "elu":
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
    if self.qk_norm == "sum":
        q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
    beta = self.b_proj(hidden_states).sigmoid() if self.use_beta else torch.ones_like(q[..., 0])
    beta = beta * 2.0 if self.allow_neg_eigval else beta
    scale = float(self.head_k_dim) ** -0.5
    out = _linear_attention(q, k, v, None, beta, scale, delta=True, l2norm=self.qk_norm == "l2")
    out = self.o_norm(out, _heads(self.g_proj(hidden_states), self.head_v_dim)) if self.use_gate else self.o_norm(out)
    return self.o_proj(out.flatten(-2)), None, None


def gated_linear_attention(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, None, None]:
    """`GatedLinearAttention.forward`: decay per key channel, no delta rule."""
    _plain_call(self, attention_mask, past_key_values, kwargs)
    q, k, v = _projected(self, hidden_states)
    gate = self.gk_proj(hidden_states)
    q, k, v, gate = (
        _heads(x, dim)
        for x, dim in ((q, self.head_k_dim), (k, self.head_k_dim), (v, self.head_v_dim), (gate, self.head_k_dim))
    )
    k, v, gate = (x.repeat_interleave(self.num_kv_groups, dim=2) for x in (k, v, gate))
    gate = F.logsigmoid(gate) / self.gate_logit_normalizer
    if self.clamp_min is not None:
        gate = torch.clamp_min(gate, self.clamp_min)
    q, k = _featured(self, q, k)
    out = _linear_attention(q, k, v, gate, None, float(self.head_k_dim) ** -0.5, delta=False, l2norm=False)
    return _gated_output(self, out, hidden_states), None, None


def retention(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, None, None]:
    """`MultiScaleRetention.forward`: one fixed decay per head, rotary positions, no delta rule."""
    _plain_call(self, attention_mask, past_key_values, kwargs)
    q, k, v = _projected(self, hidden_states)
    q, k, v = _heads(q, self.head_k_dim), _heads(k, self.head_k_dim), _heads(v, self.head_v_dim)
    q, k = _featured(self, q, k)
    q, k = rotate(self.rotary, q, k)
    k, v = (x.repeat_interleave(self.num_kv_groups, dim=2) for x in (k, v))
    # head h decays by 1 - 2^(-5-h) per token
    heads = torch.arange(self.num_heads, device=q.device, dtype=torch.float32)
    decay = torch.log1p(-torch.exp2(-5.0 - heads)).expand(q.shape[0], q.shape[1], -1)
    out = _linear_attention(q, k, v, decay, None, float(self.head_k_dim) ** -0.5, delta=False, l2norm=False)
    return _gated_output(self, out, hidden_states), None, None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`chunk_linear_attn`: neither decay nor delta rule."""
    reject("chunk_linear_attn", initial_state=initial_state, output_final_state=output_final_state)
    reject("chunk_linear_attn", cu_seqlens=cu_seqlens, normalize=normalize, **kwargs)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    return _linear_attention(q, k, v, None, None, scale, delta=False, l2norm=False), None


def hgrn2(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    lower_bound: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None, None]:
    """`HGRN2Attention.forward`: decay f per key channel, keys 1 - f, no delta rule."""
    _plain_call(self, attention_mask, past_key_values, kwargs)
    q, f, i = self.q_proj(hidden_states), self.f_proj(hidden_states), self.i_proj(hidden_states)
    if self.use_short_conv:
        q, f, i = self.q_conv1d(q)[0], self.f_conv1d(f)[0], self.i_conv1d(i)[0]
    decay = F.logsigmoid(f)
    if lower_bound is not None and self.layer_idx > 0:
        decay = torch.logaddexp(lower_bound.log(), torch.log1p(-lower_bound) + decay)
    q, k, v = _heads(F.silu(q), self.head_f_dim), _heads((1 - decay.exp()).to(i), self.head_f_dim), i
    v, decay = _heads(v, self.head_i_dim), _heads(decay, self.head_f_dim)
    out = _linear_attention(q, k, v, decay, None, float(self.head_f_dim) ** -0.5, delta=False, l2norm=False)
    out = out.flatten(-2)
    # the library's kernel for norm and projection is called without the norm's epsilon, and so takes its default
    normed = _normalised(self.g_norm, out.float(), out.shape[-1], epsilon=1e-5).to(out.dtype)
    return self.o_proj(normed), None, None


# Recurrences outside linear attention.


def hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """`chunk_hgrn`: x [B, L, C], log decay g [B, L, C]; the state is the output."""
    reject("chunk_hgrn", initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens)
    return ops.GATED_RECURRENCE(x.contiguous(), g.float().exp().contiguous()).to(x.dtype), None


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """`swiglu`: silu(x) * y in float32."""
    return (F.silu(x.float()) * y.float()).to(x.dtype)


def mamba(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, None, None]:
    """`Mamba.forward`: selective scan, the skip connection and the gate."""
    _plain_call(self, attention_mask, past_key_values, kwargs)
    x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
    x, _ = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
    sizes = [self.dt_rank, self.ssm_state_size, self.ssm_state_size]
    dt, b, c = self.x_proj(x).split(sizes, dim=-1)
    dt = F.softplus(self.dt_proj(dt).float())
    y = ops.SELECTIVE_SCAN(x.contiguous(), dt.contiguous(), -self.A_log.float().exp(), b.contiguous(), c.contiguous())
    y = ((y.float() + x.float() * self.D.float()) * F.silu(gate.float())).to(hidden_states.dtype)
    return self.out_proj(y), None, None


def mamba2(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, None, None]:
    """`Mamba2.forward` as its CUDA kernels define it: head h reads group h // (heads / groups)."""
    _plain_call(self, attention_mask, past_key_values, kwargs)
    inner, state, groups = self.intermediate_size, self.ssm_state_size, self.n_groups
    gate, mixed, dt = self.in_proj(hidden_states).split([inner, self.conv_dim, self.num_heads], dim=-1)
    mixed, _ = causal_conv1d(mixed, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
    x, b, c = mixed.split([inner, groups * state, groups * state], dim=-1)
    x, b, c = _heads(x, self.head_dim).float(), _heads(b, state).float(), _heads(c, state).float()
    dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.dt_limit)
    decay = dt * -self.A_log.float().exp()
    y = _linear_attention(c, b, x, decay, dt, 1.0, delta=False, l2norm=False)
    skip = self.D.float().reshape(self.num_heads, -1)  # [heads, 1], or [heads, head_dim] under D_has_hdim
    y = (y + skip * x).to(hidden_states.dtype).flatten(-2)
    y = self.norm(y, gate) if self.rmsnorm else y * F.silu(gate)
    return self.out_proj(y), None, None


# Parts that several layers share.


def _plain_call(self: Any, attention_mask: Tensor | None, past_key_values: Any, kwargs: dict[str, Any]) -> None:
    reject(type(self).__name__, attention_mask=attention_mask, past_key_values=past_key_values)
    reject(type(self).__name__, cu_seqlens=kwargs.get("cu_seqlens"))


def _heads(x: Tensor, dim: int) -> Tensor:
    """[..., heads * dim] -> [..., heads, dim]"""
    return x.reshape(*x.shape[:-1], -1, dim)


def _projected(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, L, channels] after their projections and, where the layer has them, convolutions."""
    q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    if self.use_short_conv:
        q, k, v = self.q_conv1d(q)[0], self.k_conv1d(k)[0], self.v_conv1d(v)[0]
    return q, k, v


def _featured(self: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if self.feature_map_fn is None:
        return q, k
    feature = table_activation(self.feature_map_fn, f"the feature map of {type(self).__name__}")
    return feature(q), feature(k)


def _gated_output(self: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    """Norm, output gate and output projection of GLA and RetNet: out [B, L, H, V] -> [B, L, D]."""
    if not self.use_output_gate:
        mixed = self.g_norm(out).flatten(-2)
    elif self.fuse_norm_and_gate:
        mixed = self.g_norm_swish_gate(out, _heads(self.g_proj(hidden_states), self.head_v_dim)).flatten(-2)
    else:
        gate = table_activation(self.gate_fn, f"the output gate of {type(self).__name__}")
        mixed = self.g_norm(out).flatten(-2) * gate(self.g_proj(hidden_states))
    projected: Tensor = self.o_proj(mixed)
    return projected
