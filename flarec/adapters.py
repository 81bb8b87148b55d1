"""The adapter table: how each model family's token mixers reach the semantic ops.

A row names the `model_type`, the functions of the modelling module that are replaced during capture, and nothing else.
Every hook has the signature of the function it replaces and calls one semantic op; what the op does not cover is
written out in plain ATen here (Mamba-2: discretisation and the skip connection). Softmax attention and MoE experts need
no row: they are reached through transformers' own interfaces.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .errors import CaptureError

IMPLEMENTATION = "flarec"
"""Name under which our functions are registered with transformers' attention and experts interfaces."""


def _reject(where: str, **values: object) -> None:
    """Stop at an argument that the semantic op has no place for (a silent drop would change the model)."""
    for name, value in values.items():
        if value is not None and value is not False:
            raise CaptureError(
                f"{where} was called with {name}, which no semantic op covers; extend the hook in flarec/adapters.py"
            )


def attention_hook(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`AttentionInterface` function: q [B,H,L,Dqk], k [B,Hkv,L,Dqk], v [B,Hkv,L,Dv] -> [B,L,H,Dv]."""
    where = f"attention of {type(module).__name__}"
    _reject(where, attention_mask=attention_mask, s_aux=kwargs.get("s_aux"), position_bias=kwargs.get("position_bias"))
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise CaptureError(f"{where} is not causal; only causal language models can be converted")
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    window = kwargs.get("sliding_window")
    softcap = kwargs.get("softcap")
    output = ops.softmax_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), scale, window or None, softcap or None
    )
    return output, None


def experts_hook(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`ExpertsInterface` function: x [N,D], index [N,k], weight [N,k] -> [N,D]."""
    expected = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    for name, wanted in expected.items():
        if getattr(module, name, wanted) != wanted:
            raise CaptureError(
                f"experts {type(module).__name__} have {name}={not wanted}; flarec::moe_experts covers {name}={wanted}"
            )
    activation = str(getattr(module.config, "hidden_act", "silu"))
    return ops.moe_experts(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, activation)


def short_conv_hook(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    """`causal_conv1d_fn`: x [B,C,L], weight [C,W] -> [B,C,L]."""
    _reject("causal_conv1d_fn", initial_states=kwargs.get("initial_states"), seq_idx=kwargs.get("seq_idx"))
    return ops.short_conv(hidden_states.contiguous(), weight, bias, activation)


def _delta_rule(name: str) -> Callable[..., tuple[Tensor, None]]:
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
        _reject(name, initial_state=initial_state, output_final_state=output_final_state)
        scale = float(query.shape[-1]) ** -0.5
        args = (query.contiguous(), key.contiguous(), value.contiguous(), g.contiguous(), beta.contiguous())
        return ops.linear_attention(*args, scale, True, use_qk_l2norm_in_kernel), None

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
    _reject("mamba2_chunk_scan", initial_states=initial_states, return_final_states=return_final_states)
    _reject("mamba2_chunk_scan", z=kwargs.get("z"), seq_idx=kwargs.get("seq_idx"))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    x = hidden_states.float()
    g = dt * A.float()
    args = (C.float().contiguous(), B.float().contiguous(), x.contiguous(), g.contiguous(), dt.contiguous())
    output = ops.linear_attention(*args, 1.0, False, False)
    return output if D is None else output + D[:, None] * x


def _no_shortcut(*args: Any, **kwargs: Any) -> None:
    """A fused kernel that may decline: declining makes the model take the path with one function per mixer."""


@dataclass(frozen=True)
class Family:
    """One row: `functions` maps a global of the modelling module to its hook."""

    model_type: str
    mixers: tuple[str, ...]
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    architecture: str | None = None
    """Class that opens the converted checkpoint without remote code, where the configuration does not name it."""


_Functions = dict[str, Callable[..., Any]]
_GDN: _Functions = {
    "causal_conv1d_fn": short_conv_hook,
    "torch_chunk_gated_delta_rule": _delta_rule("torch_chunk_gated_delta_rule"),
}
_KDA: _Functions = {
    "causal_conv1d_fn": short_conv_hook,
    "chunk_kimi_delta_attention": _delta_rule("chunk_kimi_delta_attention"),
}
_SSD: _Functions = {
    "causal_conv1d_fn": short_conv_hook,
    "mamba2_chunk_scan": mamba2_hook,
    "mamba2_split_conv1d_scan_combined": _no_shortcut,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen3_5_text", ("softmax", "short_conv", "gated delta rule"), _GDN, "Qwen3_5ForCausalLM"),
        Family("kimi_linear", ("softmax (MLA)", "short_conv", "kimi delta attention"), _KDA),
        Family("bamba", ("softmax", "short_conv", "mamba2"), _SSD),
    )
}


def family_of(config: Any) -> Family:
    """The row of a configuration; `CaptureError` names the missing row."""
    model_type = str(getattr(config, "model_type", "unknown"))
    if model_type not in FAMILIES:
        raise CaptureError(
            f"model type '{model_type}' has no adapter row; known: {', '.join(sorted(FAMILIES))}. "
            "Add a Family row to FAMILIES in flarec/adapters.py (see CONTRIBUTING.md)"
        )
    return FAMILIES[model_type]


def register_interfaces() -> None:
    """Make our attention and experts functions known to transformers (idempotent)."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention_hook)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
    ExpertsInterface.register(IMPLEMENTATION, experts_hook)


@contextlib.contextmanager
def hooked(model: nn.Module, family: Family) -> Iterator[None]:
    """Within the context, the model's token mixers call the semantic ops; everything is put back afterwards."""
    register_interfaces()
    module = sys.modules[type(model).__module__]
    missing = [
        name for name in family.functions if not hasattr(module, name) and name != "mamba2_split_conv1d_scan_combined"
    ]
    if missing:
        raise CaptureError(
            f"family '{family.model_type}': {module.__name__} has no {', '.join(missing)}; this transformers version "
            "names its mixer functions differently, update the row in flarec/adapters.py"
        )
    functions = {name: getattr(module, name) for name in family.functions if hasattr(module, name)}
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    saved = [
        (
            config,
            getattr(config, "_attn_implementation", None),
            getattr(config, "_experts_implementation", None),
            getattr(config, "use_cache", None),
        )
        for config in configs.values()
    ]
    try:
        for name in functions:
            setattr(module, name, family.functions[name])
        for config in configs.values():
            config._attn_implementation = IMPLEMENTATION
            config._experts_implementation = IMPLEMENTATION
            config.use_cache = False
        yield
    finally:
        for name, function in functions.items():
            setattr(module, name, function)
        for config, attention, experts, use_cache in saved:
            config._attn_implementation = attention
            config._experts_implementation = experts
            config.use_cache = use_cache
