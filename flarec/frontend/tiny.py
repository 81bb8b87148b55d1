"""Small models of every family and of plain softmax models: made from numbers, in milliseconds, without a download.

    config = tiny_config("bamba", num_hidden_layers=2)
    model = build_tiny("bamba")          # float32, eval mode, every parameter with a value that matters

The smallest configurations that hold every kind of layer of a family, with grouped heads, experts, biases and
multipliers where the family has them. `transformers` is imported when a configuration is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError

VOCABULARY = 512
PAD_ID, START_ID, END_ID = 0, 1, 2


@dataclass(frozen=True)
class TinyModel:
    """Classes of transformers and the configuration's values."""

    config_class: str
    model_class: str
    values: Mapping[str, Any]


_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "pad_token_id": PAD_ID, "bos_token_id": START_ID, "eos_token_id": END_ID, "tie_word_embeddings": False,
}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
    "moe_intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 32,
}
_PAIR: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_PLAIN: dict[str, Any] = {"num_hidden_layers": 2, "head_dim": 16}


def _tiny(config_class: str, model_class: str, *values: Mapping[str, Any], **own: Any) -> TinyModel:
    merged = dict(_BASE)
    for part in (*values, own):
        merged |= part
    return TinyModel(config_class, model_class, {name: value for name, value in merged.items() if value is not ...})


TINY: dict[str, TinyModel] = {
    # Gated DeltaNet (scalar gate, delta rule, grouped value heads) and softmax attention with rotary positions.
    "qwen3_5_text": _tiny("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _DELTA, head_dim=16),
    # The same with experts, a shared expert beside them.
    "qwen3_5_moe_text": _tiny("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _DELTA, _EXPERTS, _PAIR, head_dim=16),
    "qwen3_next": _tiny("Qwen3NextConfig", "Qwen3NextForCausalLM", _DELTA, _EXPERTS, _PAIR, head_dim=16),
    # Gated DeltaNet; norms after the sublayers.
    "olmo_hybrid": _tiny("OlmoHybridConfig", "OlmoHybridForCausalLM", _DELTA, _PAIR),
    # Kimi delta attention (channel gate, delta rule), latent attention with Dqk != Dv and no positions, experts.
    "kimi_linear": _tiny("KimiLinearConfig", "KimiLinearForCausalLM", _LATENT,
        linear_head_dim=16, linear_num_heads=4, layer_types=["linear_attention", "full_attention"] * 2),
    # The same mixers with rotary positions; experts chosen by groups.
    "bailing_hybrid": _tiny("BailingHybridConfig", "BailingHybridForCausalLM", _LATENT,
        num_hidden_layers=2, head_dim=16, n_group=2, topk_group=1, layer_group_size=2, first_k_dense_replace=1),
    # Lightning attention (a fixed decay per head), experts in every layer.
    "minimax": _tiny("MiniMaxConfig", "MiniMaxForCausalLM", num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, block_size=32, linear_attn_alpha_factor=1.1, mlp_alpha_factor=0.9),
    # Mamba-2 (scalar gate, no delta rule, skip connection, conv with bias) and softmax attention.
    "bamba": _tiny("BambaConfig", "BambaForCausalLM", _MAMBA2, attn_layer_indices=[1, 3]),
    # Mamba-2 and softmax attention side by side in every layer, multipliers everywhere.
    "falcon_h1": _tiny("FalconH1Config", "FalconH1ForCausalLM", _MAMBA2,
        num_hidden_layers=2, mamba_d_ssm=128, head_dim=16, mamba_rms_norm=True, key_multiplier=0.7,
        attention_bias=True, mlp_bias=True, projectors_bias=True,
        attention_in_multiplier=0.9, attention_out_multiplier=0.8, ssm_multipliers=[0.9, 0.8, 1.1, 1.2, 0.7]),
    # Layers of one kind each: Mamba-2, experts without a gate, softmax attention, MLP.
    "nemotron_h": _tiny("NemotronHConfig", "NemotronHForCausalLM", num_hidden_layers=...,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"], head_dim=16,
        ssm_state_size=16, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, chunk_size=32, n_routed_experts=4,
        moe_intermediate_size=32, moe_shared_expert_intermediate_size=32),
    # Mamba-2, experts and a shared MLP; residual, attention, embedding and logit multipliers.
    "granitemoehybrid": _tiny("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", _MAMBA2,
        layer_types=["linear_attention", "full_attention"], num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, shared_intermediate_size=64, position_embedding_type="rope", residual_multiplier=0.7,
        attention_multiplier=0.3, embedding_multiplier=1.5, logits_scaling=1.3),
    # Mamba-2; one softmax attention block whose weights several layers share, with adapters of their own.
    "zamba2": _tiny("Zamba2Config", "Zamba2ForCausalLM", num_key_value_heads=4, mamba_d_state=16, mamba_ngroups=2,
        num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"], n_mamba_heads=8,
        chunk_size=32, adapter_rank=8, num_mem_blocks=1, use_mem_rope=True, tie_word_embeddings=True),
    # Selective scan (Mamba-1), softmax attention without positions, experts in every second layer.
    "jamba": _tiny("JambaConfig", "JambaForCausalLM", num_hidden_layers=2, num_experts=4, attn_layer_period=2,
        attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8, mamba_proj_bias=True),
    # Selective scan with several heads; a softmax attention block whose weights layers share, beside it.
    "zamba": _tiny("ZambaConfig", "ZambaForCausalLM", num_key_value_heads=4, num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"], mamba_d_state=8, mamba_dt_rank=8,
        n_mamba_heads=2, attention_hidden_size=128, tie_word_embeddings=True),
    # Convolutions of queries and keys, values half of the token before; experts, the last of which does nothing.
    "zaya": _tiny("ZayaConfig", "ZayaForCausalLM", num_hidden_layers=2, head_dim=16, num_experts=4,
        moe_intermediate_size=32, router_hidden_size=16, tie_word_embeddings=True, attention_bias=True,
        layer_types=["hybrid", "hybrid_sliding"], sliding_window=12, num_experts_per_tok=1),
    # No attention at all, and no positions.
    "mamba2": _tiny("Mamba2Config", "Mamba2ForCausalLM", num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16,
        n_groups=2, chunk_size=32, use_conv_bias=True, intermediate_size=..., num_attention_heads=...,
        num_key_value_heads=..., max_position_embeddings=...),
    "mamba": _tiny("MambaConfig", "MambaForCausalLM", num_hidden_layers=2, state_size=8, time_step_rank=8,
        intermediate_size=..., num_attention_heads=..., num_key_value_heads=..., max_position_embeddings=...),
    "falcon_mamba": _tiny("FalconMambaConfig", "FalconMambaForCausalLM", num_hidden_layers=2, state_size=8,
        time_step_rank=8, intermediate_size=..., num_attention_heads=..., num_key_value_heads=...,
        max_position_embeddings=...),
    # A gated short convolution as the only recurrence.
    "lfm2": _tiny("Lfm2Config", "Lfm2ForCausalLM", num_hidden_layers=2, layer_types=["conv", "full_attention"],
        block_multiple_of=32, conv_bias=True),
    "lfm2_moe": _tiny("Lfm2MoeConfig", "Lfm2MoeForCausalLM", num_hidden_layers=2,
        layer_types=["conv", "full_attention"], moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        num_dense_layers=1),
    # The same with sliding windows and with rotary positions that turn a part of each head.
    "lfm3": _tiny("Lfm3Config", "Lfm3ForCausalLM", num_hidden_layers=3, head_dim=16, sliding_window=12,
        layer_types=["conv", "sliding_attention", "full_attention"]),
    # A diagonal recurrence (RG-LRU) and attention with a sliding window; soft-capped logits.
    "recurrent_gemma": _tiny("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", num_hidden_layers=3, lru_width=64,
        attention_window_size=12, head_dim=16, num_key_value_heads=1, tie_word_embeddings=True),
    # Plain softmax models: biases everywhere; a sliding window; q/k norms and tied embeddings; experts; soft caps,
    # windows in every second layer, multipliers; windows with rotary frequencies of their own.
    "llama": _tiny("LlamaConfig", "LlamaForCausalLM", _PLAIN, attention_bias=True, mlp_bias=True),
    "mistral": _tiny("MistralConfig", "MistralForCausalLM", _PLAIN, sliding_window=12),
    "qwen3": _tiny("Qwen3Config", "Qwen3ForCausalLM", _PLAIN, tie_word_embeddings=True),
    "qwen3_moe": _tiny("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _PLAIN, _EXPERTS),
    "gemma2": _tiny("Gemma2Config", "Gemma2ForCausalLM", _PLAIN, sliding_window=12, query_pre_attn_scalar=16,
        attn_logit_softcapping=4.0, final_logit_softcapping=5.0, tie_word_embeddings=True),
    "gemma3_text": _tiny("Gemma3TextConfig", "Gemma3ForCausalLM", _PLAIN, sliding_window=12, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True),
}
"""By model type."""


def tiny_config(family: str, **overrides: Any) -> Any:
    """The configuration of a small model; `overrides` replace its fields (layer counts, sizes, tied embeddings).

    `UsageError` for a family without a tiny configuration, or one that the installed transformers does not have.
    """
    import transformers

    if family not in TINY:
        raise UsageError(f"there is no tiny configuration of '{family}'; known: {', '.join(sorted(TINY))}")
    row = TINY[family]
    if not available(family):
        raise UsageError(f"transformers {transformers.__version__} has no {row.config_class}; install a newer release")
    return getattr(transformers, row.config_class)(**(dict(row.values) | overrides))


def available(family: str) -> bool:
    """Whether the installed transformers knows the family."""
    import transformers

    return hasattr(transformers, TINY[family].config_class)


def build_tiny(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A small Hugging Face causal LM in float32, in eval mode; the same seed gives the same weights."""
    import transformers

    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, TINY[family].model_class)(config).float().eval()
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


def _randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a value that matters: fresh models have zero biases, flat logits and states that forget."""

    def normal(tensor: torch.Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    with torch.no_grad():
        head = model.get_output_embeddings().weight  # type: ignore[operator]
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                normal(parameter, -1.5, 0.4)  # decay of about 0.85 per token instead of a memory of one token
            elif name.endswith("dt_bias"):
                normal(parameter, 0.0, 0.5)
            elif parameter.dim() >= 2:
                fan_in = 1 if "embed" in name and parameter is not head else parameter.shape[-1]
                normal(parameter, 0.0, 1.0 * fan_in**-0.5)
            else:
                normal(parameter, float(parameter.mean()), 0.1)  # norms (centred at 0 or 1), biases
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                normal(buffer, 0.0, 0.1)
