"""The adapter table: how each model family's token mixers reach the semantic ops.

A row names the model type and what is replaced in its modelling file during capture, and nothing else. Softmax
attention and experts need no row (`flarec.frontend.hooks.interfaces`), so a model type without one is captured as a
plain softmax model; a mixer that was not recognised is then found by the checks of the capture.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..errors import CaptureError
from .family import Family
from .hooks.functions import delta_rule_hook, mamba2_hook, no_shortcut, selective_scan_hook, short_conv_hook
from .hooks.interfaces import IMPLEMENTATION, register_interfaces
from .hooks.methods import BoundedSqrt, cca_hook, lightning_hook, recurrent_block_hook, rnn_scan_hook

_Hooks = dict[str, Callable[..., Any]]
_CONV: _Hooks = {"causal_conv1d_fn": short_conv_hook}
_GDN: _Hooks = _CONV | {"torch_chunk_gated_delta_rule": delta_rule_hook("torch_chunk_gated_delta_rule")}
_KDA: _Hooks = _CONV | {"chunk_kimi_delta_attention": delta_rule_hook("chunk_kimi_delta_attention")}
_SSD: _Hooks = _CONV | {
    "mamba2_chunk_scan": mamba2_hook,
    "mamba2_split_conv1d_scan_combined": no_shortcut,
}
_SCAN: _Hooks = _CONV | {"mamba_selective_scan": selective_scan_hook, "mamba_inner_fn": no_shortcut}
_LIGHTNING: _Hooks = {"MiniMaxLightningAttention.forward": lightning_hook}
_RGLRU: _Hooks = {
    "RecurrentGemmaRecurrentBlock.forward": recurrent_block_hook,
    "RecurrentGemmaRglru._rnn_scan": rnn_scan_hook,
}

_GDN_MIXERS = ("softmax", "short_conv", "gated delta rule")
_KDA_MIXERS = ("softmax (MLA)", "short_conv", "kimi delta attention")
_SSD_MIXERS = ("softmax", "short_conv", "mamba2")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen3_5_text", _GDN_MIXERS, _GDN, "Qwen3_5ForCausalLM"),
        Family("qwen3_5_moe_text", _GDN_MIXERS, _GDN, "Qwen3_5MoeForCausalLM"),
        Family("qwen3_next", _GDN_MIXERS, _GDN),
        Family("olmo_hybrid", _GDN_MIXERS, _GDN),
        Family("kimi_linear", _KDA_MIXERS, _KDA),
        Family("bailing_hybrid", _KDA_MIXERS, _KDA),
        Family("minimax", ("softmax", "lightning attention"), methods=_LIGHTNING),
        Family("bamba", _SSD_MIXERS, _SSD),
        Family("falcon_h1", _SSD_MIXERS, _SSD),
        Family("nemotron_h", _SSD_MIXERS, _SSD, mixerless=frozenset({"mlp", "moe"})),
        Family("granitemoehybrid", _SSD_MIXERS, _SSD),
        Family("zamba2", _SSD_MIXERS, _SSD),
        Family("jamba", ("softmax", "short_conv", "selective scan"), _SCAN),
        Family("zamba", ("softmax", "short_conv", "selective scan"), _SCAN),
        Family("zaya", ("softmax", "short_conv"), methods={"ZayaCCAProjection.forward": cca_hook}),
        Family("mamba2", ("short_conv", "mamba2"), _SSD, positions=False),
        Family("mamba", ("short_conv", "selective scan"), _SCAN, positions=False),
        Family("falcon_mamba", ("short_conv", "selective scan"), _SCAN, positions=False),
        Family("lfm2", ("softmax", "short_conv"), _CONV),
        Family("lfm2_moe", ("softmax", "short_conv"), _CONV),
        Family("lfm3", ("softmax", "softmax (window)", "short_conv"), _CONV),
        Family(
            "recurrent_gemma",
            ("softmax (window)", "short_conv", "gated recurrence"),
            {"SqrtBoundDerivative": BoundedSqrt},
            methods=_RGLRU,
        ),
    )
}
"""Hybrid families by the model type of their text configuration."""

PLAIN = ("llama", "mistral", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")
"""Softmax models without a row that are tested through all stages; others are captured the same way."""

_INDEXER = "its attention reads the keys that {} chooses, and no op of flarec chooses keys"
REFUSED: dict[str, str] = {
    **{
        family: _INDEXER.format(name)
        for family, name in {
            "axk2": "AXK2Indexer", "deepseek_v32": "DeepseekV32Indexer", "deepseek_v4": "DeepseekV4Indexer",
            "dots3_note_text": "Dots3NoteTextIndexer", "glm5_next_text": "Glm5NextTextIndexer",
            "glm_moe_dsa": "GlmMoeDsaIndexer", "hy_v4": "HYV4Indexer", "minimax_m3_vl_text": "MiniMaxM3VLIndexer",
            "mistral_large4_text": "MistralLarge4TextIndexer", "qwen4_exp_text": "Qwen4ExpTextQSAIndexer",
        }.items()
    },
    "inkling_text": "its attention adds InklingRelativeLogits to the scores, which no op of flarec has a place for",
    "inkling2_text": "Inkling2BlockAttentionResidual and Inkling2DynamicShortConvolution are no ops of flarec",
    "rwkv": "RwkvLinearAttention, a recurrence with a running maximum, is no op of flarec",
    "xlstm": "its matrix memory with exponential gates and a normaliser (mLSTM) is no op of flarec",
}
"""Families of transformers that cannot be converted, by the model type of their text configuration -> why."""


def family_of(config: Any) -> Family:
    """The row of a configuration; one without hooks for a model type that has none.

    Raises `CaptureError` for a family that is known not to convert.
    """
    from .fla import families as fla_families  # it makes rows too, from the class above

    model_type = str(getattr(config, "model_type", "unknown"))
    if (row := fla_families.row_of(config)) is not None:
        return row
    if model_type in REFUSED:
        raise CaptureError(f"family '{model_type}' cannot be converted: {REFUSED[model_type]}")
    return FAMILIES.get(model_type) or Family(model_type, ("softmax",))


def _targets(model: nn.Module, family: Family) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """(owner, attribute, hook) of everything that the row replaces."""
    own = type(model).__module__
    for name, hook in (*family.functions.items(), *family.methods.items()):
        module_name, _, path = name.rpartition(":")
        owner: Any = importlib.import_module(module_name) if module_name else sys.modules[own]
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        if hasattr(owner, attribute):
            yield owner, attribute, hook
        elif hook is not no_shortcut:
            raise CaptureError(
                f"family '{family.model_type}': {module_name or own} has no {path}; this transformers version names "
                "its mixers differently, update the row in flarec/frontend/families.py"
            )


_SETTINGS = {
    "_attn_implementation": IMPLEMENTATION,
    "_experts_implementation": IMPLEMENTATION,
    "use_cache": False,
    "output_router_logits": False,  # a program gives the logits alone
}
"""Settings of a configuration while its model is traced."""


def check_exchangeable(model: nn.Module, family: Family) -> None:
    """A model class says whether attention functions other than its own compute the same; `CaptureError` if not."""
    exchangeable = getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False)
    if not (exchangeable or family.functions or family.methods):
        raise CaptureError(
            f"{type(model).__name__} (family '{family.model_type}') states that its attention cannot be computed by "
            "other functions than its own; such a model needs a row in flarec/frontend/families.py"
        )


@contextlib.contextmanager
def hooked(model: nn.Module, family: Family) -> Iterator[None]:
    """Within the context, the model's token mixers call the semantic ops; everything is put back afterwards."""
    register_interfaces()
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    with contextlib.ExitStack() as stack:
        for owner, attribute, hook in list(_targets(model, family)):
            if attribute in vars(owner):
                stack.callback(setattr, owner, attribute, vars(owner)[attribute])
            else:  # inherited
                stack.callback(delattr, owner, attribute)
            setattr(owner, attribute, hook)
        for config in configs.values():
            for name, value in _SETTINGS.items():
                if hasattr(config, name):
                    stack.callback(setattr, config, name, getattr(config, name))
                    setattr(config, name, value)
        yield
