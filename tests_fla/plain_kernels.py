"""Plain PyTorch in place of the library's Triton kernels: stock models of flash-linear-attention run on a CPU.

Only functions that launch a kernel are replaced; the layers and models above them are the library's own. Everything is
computed in float64 and written from the library's documentation, without `flarec`: this is the oracle of the tests
here. `test_plain_kernels.py` compares the recurrences with the library's own naive ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.double()
    return x if bias is None else x + bias.double()


def rms_norm(
    x: Tensor, weight: Any, bias: Any, residual: Any = None, eps: float = 1e-5, prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    total = x.double() + (0 if residual is None else residual.double())
    out = _scaled(_rms(total, eps), weight, bias).to(x)
    kept = x.dtype if not residual_in_fp32 else torch.float32
    return (out, total.to(kept if residual is None else residual.dtype)) if prenorm else out


def rms_norm_linear(x: Tensor, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Tensor:
    return F.linear(rms_norm(x, norm_weight, norm_bias, eps=eps), weight, bias)


def rms_norm_gated(x: Tensor, g: Tensor, weight: Any, bias: Any, activation: str = "swish", **options: Any) -> Tensor:
    assert not options["prenorm"] and options["residual"] is None
    gate = g.double().sigmoid() * (1 if activation == "sigmoid" else g.double())
    return (_scaled(_rms(x.double(), options["eps"]), weight, bias) * gate).to(x)


def rms_norm_grouped(
    x: Tensor, weight: Tensor, bias: Any, z: Any = None, eps: float = 1e-6, group_size: Any = None,
    norm_before_gate: bool = True,
) -> Tensor:
    gate = 1 if z is None else F.silu(z.double())
    h = x.double() * (1 if norm_before_gate else gate)
    groups = [_rms(part, eps) for part in h.split(group_size or h.shape[-1], dim=-1)]
    return (_scaled(torch.cat(groups, dim=-1), weight, bias) * (gate if norm_before_gate else 1)).to(x)


def swish(x: Tensor) -> Tensor:
    return F.silu(x)


def sqrelu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    return (F.silu(x.double()) * y.double()).to(x)


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Any) -> Tensor:
    return F.linear(swiglu(x, y), weight, bias)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, **options: Any) -> Tensor:
    assert not interleaved and options.get("seqlen_offsets", 0) == 0 and options.get("cu_seqlens") is None
    half, length = cos.shape[-1], x.shape[1]
    rotation = torch.complex(cos[:length].double(), sin[:length].double())[:, None, :]
    turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * rotation
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :].double()], dim=-1).to(x)


def causal_conv1d(
    x: Tensor, weight: Any = None, bias: Any = None, residual: Any = None, initial_state: Any = None,
    output_final_state: Any = False, activation: Any = None, **options: Any,
) -> tuple[Tensor, None]:
    assert residual is None and initial_state is None and not output_final_state and options.get("cu_seqlens") is None
    width, channels = weight.shape[-1], x.shape[-1]
    padded = F.pad(x.double().transpose(1, 2), (width - 1, 0))
    out = F.conv1d(padded, weight.double()[:, None], None if bias is None else bias.double(), groups=channels)
    out = out if activation is None else out * out.sigmoid()
    return out.transpose(1, 2).to(x), None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    assert causal
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q.double(), k) * q.shape[-1] ** -0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else torch.tensor(True))
    return torch.einsum("bhlm,bmhd->blhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).to(q)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, delta: bool, scale: float | None = None
) -> Tensor:
    """One token after the other: decay [B, L, H] or [B, L, H, K] as a factor, state [B, H, K, V]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = v.shape[2] // q.shape[2]
    q, k = (x.double().repeat_interleave(groups, dim=2) for x in (q, k))
    wide = v.double()
    state, out = q.new_zeros(*v.shape[:1], v.shape[2], q.shape[-1], v.shape[-1]), []
    for t in range(v.shape[1]):
        if decay is not None:
            state = state * (decay[:, t, :, None, None] if decay.ndim == 3 else decay[:, t, :, :, None])
        new = wide[:, t] - (k[:, t, :, None] @ state).squeeze(-2) if delta else wide[:, t]
        new = new if beta is None else new * beta[:, t, :, None].double()
        state = state + k[:, t, :, :, None] * new[:, :, None]
        out.append(scale * (q[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(out, dim=1).to(v)


def _unit(x: Tensor) -> Tensor:
    return x.double() / (x.double().pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def _plain(options: dict[str, Any]) -> None:
    assert options.get("initial_state") is None and not options.get("output_final_state")
    assert options.get("cu_seqlens") is None


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, None]:
    """Gated DeltaNet (g per head) and Kimi delta attention (g per channel)."""
    _plain(options)
    gate, beta = g.double(), beta.double()
    if options.get("use_gate_in_kernel"):
        gate = gate + options["dt_bias"].double().reshape(gate.shape[2:])
        rate = options["A_log"].double().exp()
        rate = rate if gate.ndim == 3 else rate[:, None]
        bound = options.get("lower_bound")
        gate = -rate * F.softplus(gate) if bound is None else bound * (rate * gate).sigmoid()
    if options.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid() * (2 if options.get("allow_neg_eigval") else 1)
    if options.get("use_qk_l2norm_in_kernel"):
        q, k = _unit(q), _unit(k)
    return recurrence(q, k, v, gate.exp(), beta, True, options.get("scale")), None


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, None]:
    _plain(options)
    if options.get("use_qk_l2norm_in_kernel"):
        q, k = _unit(q), _unit(k)
    return recurrence(q, k, v, None, beta, True, options.get("scale")), None


def gla(q: Tensor, k: Tensor, v: Tensor, g: Any = None, gk: Any = None, **options: Any) -> tuple[Tensor, None]:
    _plain(options)
    gate = g if gk is None else gk
    return recurrence(q, k, v, gate.double().exp(), None, False, options.get("scale")), None


def retention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
    _plain(options)
    factors = torch.tensor([1 - 2.0 ** (-5 - head) for head in range(q.shape[2])], dtype=torch.float64)
    return recurrence(q, k, v, factors.expand(*q.shape[:2], -1), None, False), None


def linear_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
    _plain(options)
    assert not options["normalize"]
    return recurrence(q, k, v, None, None, False), None


def hgrn(x: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, None]:
    _plain(options)
    state, out = torch.zeros_like(x[:, 0], dtype=torch.float64), []
    for t in range(x.shape[1]):
        state = g[:, t].double().exp() * state + x[:, t].double()
        out.append(state)
    return torch.stack(out, dim=1).to(x), None


def layer_norm(
    x: Tensor, weight: Any, bias: Any, residual: Any = None, eps: float = 1e-5, prenorm: bool = False,
    residual_in_fp32: bool = False, is_rms_norm: bool = False, num_groups: int = 1,
) -> Any:
    assert not is_rms_norm
    total = x.double() + (0 if residual is None else residual.double())
    groups = total.unflatten(-1, (num_groups, -1))
    deviation = groups - groups.mean(-1, keepdim=True)
    normed = (deviation / (deviation.pow(2).mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    out = _scaled(normed, weight, bias).to(x)
    kept = x.dtype if not residual_in_fp32 else torch.float32
    return (out, total.to(kept if residual is None else residual.dtype)) if prenorm else out


def token_shift(x: Tensor, cu_seqlens: Any = None, cache: Any = None, output_cache: bool = False) -> Any:
    assert cu_seqlens is None and cache is None
    delta = F.pad(x, (0, 0, 1, 0))[:, :-1] - x
    return (delta, x[:, -1]) if output_cache else delta


def six_mixes(x: Tensor, delta: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    return tuple((x.double() + delta.double() * mix.double()).to(x) for mix in mixes)


def key_update(k: Tensor, a: Tensor, rate: Tensor) -> Tensor:
    return (k.double() * (1 + (a.double() - 1) * rate.double())).to(k)


def output_correction(o: Tensor, r: Tensor, k: Tensor, weight: Tensor, v: Tensor, g: Tensor) -> Tensor:
    bonus = (r.double() * k.double() * weight.double()).sum(-1, keepdim=True) * v.double()
    return ((o.double() + bonus.reshape(o.shape)) * g.double()).to(o)


def unit(x: Tensor) -> Tensor:
    return _unit(x).to(x)


def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, **options: Any
) -> tuple[Tensor, None]:
    """Log decay w; a is what the state is read with before it decays, b what is added for it."""
    _plain(options)
    r, k, w, a, b, wide = (x.double() for x in (r, k, w, a, b, v))
    state, out = r.new_zeros(*r.shape[:1], *r.shape[2:], v.shape[-1]), []
    for t in range(r.shape[1]):
        transition = torch.diag_embed(w[:, t].exp()) + b[:, t, :, :, None] * a[:, t, :, None]
        state = transition @ state + k[:, t, :, :, None] * wide[:, t, :, None]
        out.append(scale * (r[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(out, dim=1).to(v), None


def rwkv7_of_rate(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, scale: float = 1.0, **options: Any
) -> tuple[Tensor, None]:
    return rwkv7(r, w, k, v, -kk, kk * a, scale, **options)


_REPLACED: dict[str, Callable[..., Any]] = {
    "fla.modules.norm.layernorm:rms_norm": rms_norm,
    "fla.modules.norm.fused_norm_gate:rms_norm_gated": rms_norm_gated,
    "fla.modules.norm.layernorm_gated:rmsnorm_fn": rms_norm_grouped,
    "fla.modules.mlp:swiglu": swiglu,
    "fla.modules.mlp:swiglu_linear": swiglu_linear,
    "fla.modules.rotary.ops:rotary_embedding": rotary_embedding,
    "fla.modules.causal_conv1d.ops:causal_conv1d": causal_conv1d,
    "fla.modules.convolution:causal_conv1d": causal_conv1d,
    "fla.layers.attn:flash_attn_func": flash_attention,
    "fla.layers.mla:flash_attn_func": flash_attention,
    "fla.layers.gated_deltanet:causal_conv1d": causal_conv1d,
    "fla.layers.gated_deltanet:chunk_gated_delta_rule": gated_delta_rule,
    "fla.layers.gated_deltanet:fused_recurrent_gated_delta_rule": gated_delta_rule,
    "fla.layers.kda:chunk_kda": gated_delta_rule,
    "fla.layers.kda:fused_recurrent_kda": gated_delta_rule,
    "fla.layers.delta_net:chunk_delta_rule": delta_rule,
    "fla.layers.delta_net:fused_recurrent_delta_rule": delta_rule,
    "fla.layers.gla:chunk_gla": gla,
    "fla.layers.gla:fused_recurrent_gla": gla,
    "fla.layers.multiscale_retention:chunk_retention": retention,
    "fla.layers.multiscale_retention:fused_recurrent_retention": retention,
    "fla.layers.linear_attn:chunk_linear_attn": linear_attention,
    "fla.layers.linear_attn:fused_recurrent_linear_attn": linear_attention,
    "fla.layers.hgrn2:chunk_gla": gla,
    "fla.layers.hgrn2:fused_recurrent_gla": gla,
    "fla.layers.hgrn2:swish": swish,
    "fla.layers.hgrn2:rms_norm_linear": rms_norm_linear,
    "fla.layers.hgrn:chunk_hgrn": hgrn,
    "fla.layers.hgrn:fused_recurrent_hgrn": hgrn,
    "fla.layers.hgrn:swiglu": swiglu,
    "fla.modules.norm.layernorm:layer_norm": layer_norm,
    "fla.modules.norm.layernorm:group_norm": layer_norm,
    "fla.models.rwkv7.modeling_rwkv7:token_shift": token_shift,
    "fla.layers.rwkv7:token_shift": token_shift,
    "fla.layers.rwkv7:fused_addcmul_rwkv7": six_mixes,
    "fla.layers.rwkv7:fused_k_rwkv7": key_update,
    "fla.layers.rwkv7:gate_output_correction": output_correction,
    "fla.layers.rwkv7:l2_norm": unit,
    "fla.layers.rwkv7:chunk_rwkv7": rwkv7,
    "fla.layers.rwkv7:fused_mul_recurrent_rwkv7": rwkv7_of_rate,
}


def install() -> None:
    """Replace the kernels in this process. A name that the library no longer has is an error."""
    for name, function in _REPLACED.items():
        module, _, attribute = name.partition(":")
        owner = importlib.import_module(module)
        assert hasattr(owner, attribute), f"{module} has no {attribute} in this version of the library"
        setattr(owner, attribute, function)
    table = importlib.import_module("fla.modules.activations").ACT2FN
    table.update({"swish": swish, "silu": swish, "sigmoid": torch.sigmoid, "logsigmoid": F.logsigmoid})
    table["sqrelu"] = sqrelu
    _generate_without_mask()
    rotary = importlib.import_module("fla.modules.rotary").RotaryEmbedding
    frequencies = rotary._compute_inv_freq
    # a model in float64 keeps the frequencies that it was made with
    rotary._compute_inv_freq = lambda self, device=None: (
        self.inv_freq if self.inv_freq.dtype == torch.float64 else frequencies(self, device)
    )


def _generate_without_mask() -> None:
    """The plain kernels know neither padding nor states: drop the mask of ones that `generate` makes, and its cache."""
    mixin = importlib.import_module("fla.models.generation_utils").FLAGenerationMixin
    stock, generate = mixin.prepare_inputs_for_generation, mixin.generate

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = stock(self, *args, **kwargs)
        mask = inputs.pop("attention_mask", None)
        assert mask is None or bool(mask.all())
        return inputs

    mixin.prepare_inputs_for_generation = prepare
    mixin.generate = lambda self, *args, **kwargs: generate(self, *args, use_cache=False, **kwargs)
