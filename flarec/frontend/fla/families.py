"""Rows for models of the flash-linear-attention library (MIT; https://github.com/fla-org/flash-linear-attention).

Its models are transformers classes that live in `fla.models`, and register themselves there when `fla` is imported. The
library is optional: it is imported only for a configuration of its own, or for a directory whose model type is one of
its. Capture runs none of its Triton kernels, so it needs no GPU: while a model is traced, `flarec.frontend.fla.layers`
stands in for the layers and kernels named below.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...errors import CaptureError, UsageError
from ..family import Family
from . import layers as fla_layers
from . import rwkv7

_Hooks = Mapping[str, Callable[..., Any]]

# Parts that every model of the library is made of.
_COMMON: _Hooks = {
    "fla.modules.norm.layernorm:RMSNorm.forward": fla_layers.rms_norm,
    "fla.modules.norm.fused_norm_gate:FusedRMSNormGated.forward": fla_layers.rms_norm_gated,
    "fla.modules.mlp:GatedMLP.forward": fla_layers.gated_mlp,
    "fla.modules.causal_conv1d.ops:ShortConvolution.forward": fla_layers.short_convolution,
    "fla.layers.attn:Attention.forward": fla_layers.attention,
}

# Per model type: what its layers hold beside softmax attention, and the hooks for it.
_ROWS: dict[str, tuple[tuple[str, ...], _Hooks]] = {
    "transformer": ((), {}),
    "mla": ((), {"fla.layers.mla:MultiheadLatentAttention.forward": fla_layers.latent_attention}),
    "gated_deltanet": (
        ("short_conv", "gated delta rule"),
        {
            "fla.layers.gated_deltanet:chunk_gated_delta_rule": fla_layers.gated_delta_rule,
            "fla.layers.gated_deltanet:causal_conv1d": fla_layers.causal_conv1d,
        },
    ),
    "kda": (("short_conv", "kimi delta attention"), {"fla.layers.kda:chunk_kda": fla_layers.gated_delta_rule}),
    "delta_net": (("short_conv", "delta rule"), {"fla.layers.delta_net:DeltaNet.forward": fla_layers.delta_net}),
    "gla": (
        ("gated linear attention",),
        {"fla.layers.gla:GatedLinearAttention.forward": fla_layers.gated_linear_attention},
    ),
    "retnet": (
        ("retention",),
        {"fla.layers.multiscale_retention:MultiScaleRetention.forward": fla_layers.retention},
    ),
    "linear_attn": (
        ("linear attention",),
        {"fla.layers.linear_attn:chunk_linear_attn": fla_layers.linear_attention},
    ),
    "hgrn2": (("hgrn2",), {"fla.layers.hgrn2:HGRN2Attention.forward": fla_layers.hgrn2}),
    "hgrn": (
        ("gated recurrence",),
        {"fla.layers.hgrn:chunk_hgrn": fla_layers.hgrn, "fla.layers.hgrn:swiglu": fla_layers.swiglu},
    ),
    "mamba": (("short_conv", "selective scan"), {"fla.layers.mamba:Mamba.forward": fla_layers.mamba}),
    "samba": (("short_conv", "selective scan"), {"fla.layers.mamba:Mamba.forward": fla_layers.mamba}),
    "rwkv7": (
        ("short_conv", "generalized delta rule"),
        {
            "fla.layers.rwkv7:RWKV7Attention.forward": rwkv7.time_mixing,
            "fla.models.rwkv7.modeling_rwkv7:RWKV7FeedForward.forward": rwkv7.channel_mixing,
            "fla.modules.norm.layernorm:LayerNorm.forward": rwkv7.layer_norm,
        },
    ),
    "mamba2": (
        ("short_conv", "mamba2"),
        {
            "fla.layers.mamba2:Mamba2.forward": fla_layers.mamba2,
            "fla.modules.norm.layernorm_gated:RMSNormGated.forward": fla_layers.rms_norm_grouped,
        },
    ),
}

MODEL_TYPES = tuple(_ROWS)
"""Model types of the library that convert."""

_OWN_RECURRENCE = "its recurrence is not one of flarec's semantic ops: "
_OWN_ATTENTION = "its attention is not causal softmax attention over the keys of the row: "
REFUSED: dict[str, str] = {
    "abc": _OWN_RECURRENCE + "the two passes over memory slots decay on the value side",
    "gsa": _OWN_RECURRENCE + "the two passes over memory slots decay on the value side",
    "raven": _OWN_RECURRENCE + "the two passes over memory slots decay on the value side",
    "lightnet": _OWN_RECURRENCE + "its gate is normalised by a running sum over the tokens before",
    "rodimus": _OWN_RECURRENCE + "gated linear attention with a selection gate inside a layer that also shifts tokens",
    "comba": _OWN_RECURRENCE + "the delta rule erases along a vector other than the key",
    "gated_deltaproduct": _OWN_RECURRENCE + "several delta updates per token",
    "precond_gated_deltanet": _OWN_RECURRENCE + "the delta rule carries a second, preconditioning state",
    "precond_kda": _OWN_RECURRENCE + "the delta rule carries a second, preconditioning state",
    "mesa_net": _OWN_RECURRENCE + "each token solves a linear system with the state",
    "rwkv6": _OWN_RECURRENCE + "it shifts tokens and adds a bonus for the present token",
    "mamba3": _OWN_RECURRENCE + "rotated states and a trapezoidal update",
    "log_linear_mamba2": _OWN_RECURRENCE + "a number of states that grows with the logarithm of the length",
    "mom": _OWN_RECURRENCE + "tokens are routed to several memories, by sorting the row",
    "cyclic_flow_attention": _OWN_RECURRENCE + "memories that move between slots of relative time",
    "cat": _OWN_ATTENTION + "it reads compressed chunks through a block mask",
    "deltaformer": _OWN_ATTENTION + "keys are combined by a delta rule first",
    "forgetting_transformer": _OWN_ATTENTION + "scores decay with the gates of the tokens between",
    "wall_transformer": _OWN_ATTENTION + "scores decay with the gates of the tokens between",
    "path_attn": _OWN_ATTENTION + "positions are products of Householder matrices over the tokens between",
    "stickbreaking_attn": _OWN_ATTENTION + "weights are broken off a stick instead of a softmax",
    "parallax": _OWN_ATTENTION + "a second query corrects the values",
    "moba": _OWN_ATTENTION + "blocks of keys are selected by their mean",
    "nsa": _OWN_ATTENTION + "blocks of keys are compressed and selected",
    "yoco": _OWN_ATTENTION + "the upper layers read the keys of one layer below",
    "bitnet": "its linear layers quantise with a straight-through gradient, which export would drop",
}
"""Model types of the library that do not convert, and why."""

_ATTENTION = ("fla.layers.attn", "fla.layers.mla")


def lives_in_library(config: Any) -> bool:
    """Whether a configuration's class is the library's (some model types, as mamba2, exist in transformers too)."""
    return type(config).__module__.split(".")[0] == "fla"


def row_of(config: Any) -> Family | None:
    """The row of a configuration of the library, None for any other; `CaptureError` gives the reason of a refusal."""
    if not lives_in_library(config):
        return None
    model_type = str(config.model_type)
    if model_type not in _ROWS:
        reason = REFUSED.get(model_type, "no row in flarec/frontend/fla/families.py covers it")
        raise CaptureError(f"flash-linear-attention model '{model_type}' cannot be converted: {reason}")
    if getattr(config, "attnres_block_size", None) is not None:
        raise CaptureError(
            f"flash-linear-attention model '{model_type}' with attnres_block_size (residuals chosen by attention over "
            "depth) cannot be converted: no hook covers that kernel"
        )
    mixers, hooks = _ROWS[model_type]
    softmax = ("softmax",) if model_type in ("transformer", "mla") or getattr(config, "attn", None) is not None else ()
    model = importlib.import_module("transformers").AutoModelForCausalLM._model_mapping[type(config)]
    forward = {f"{model.__module__}:{model.__name__}.forward": fla_layers.with_positions(model.forward)}
    return Family(model_type, (*softmax, *mixers), {**_COMMON, **hooks, **forward})


def prepare(model_type: str) -> None:
    """Import the library if `model_type` is one of its, so that transformers' Auto classes know its models.

    `UsageError` if it is not installed and transformers itself does not know the type either.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in _ROWS and model_type not in REFUSED:
        return
    try:
        importlib.import_module("fla.models")
    except ImportError as error:
        if model_type not in CONFIG_MAPPING:
            raise UsageError(
                f"models of type '{model_type}' come from the flash-linear-attention library, which cannot be imported "
                f"({error}); install it with: pip install flash-linear-attention"
            ) from error


@contextlib.contextmanager
def without_flash_attention() -> Iterator[None]:
    """Within the context the library's attention layers can be built where the flash-attn package is missing.

    They ask for it when they are built, although capture replaces the only function that calls it.
    """
    names = _ATTENTION if "fla.models" in sys.modules else ()
    found: list[Any] = [importlib.import_module(name) for name in names]
    modules = [module for module in found if module.flash_attn_func is None]
    for module in modules:
        module.flash_attn_func = _not_installed
    try:
        yield
    finally:
        for module in modules:
            module.flash_attn_func = None


def _not_installed(*args: Any, **kwargs: Any) -> None:
    raise CaptureError("a flash-linear-attention attention layer was run, which needs the flash-attn package")
