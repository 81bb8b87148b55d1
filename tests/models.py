"""Small models of every family in the adapter table, a tokenizer and checkpoints that fit them: made in milliseconds.

    model = tiny_model("bamba")                     # float32, weights large enough for logits that are not flat
    program = captured("bamba")                     # its capture, made once per session (clone before changing it)
    path = tiny_checkpoint(tmp_path, "bamba")       # a directory that `AutoModelForCausalLM.from_pretrained` opens

The tokenizer has fewer tokens than the model has rows, so ids in `[TOKENS, VOCABULARY)` are spare rows.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import fx
from transformers import GenerationConfig, PreTrainedTokenizerFast

from flarec.frontend import capture
from flarec.program import Program
from flarec.spec import TensorSpec

FAMILIES = ("qwen3_5_text", "kimi_linear", "bamba")
VOCABULARY = 512
TOKENS = 300
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "pad_token_id": PAD_ID, "bos_token_id": START_ID, "eos_token_id": END_ID, "tie_word_embeddings": False,
}  # fmt: skip
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Gated DeltaNet (scalar gate, delta rule, grouped value heads) and softmax attention with rotary positions.
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {
        "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    }),
    # Kimi delta attention (channel gate, delta rule), latent attention with Dqk != Dv and no positions, experts.
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", {
        "num_key_value_heads": 4, "moe_intermediate_size": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "qk_nope_head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2,
        "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
    }),
    # Mamba-2 (scalar gate, no delta rule, skip connection, conv with bias) and softmax attention.
    "bamba": ("BambaConfig", "BambaForCausalLM", {
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 32,
        "attn_layer_indices": [1, 3],
    }),
}  # fmt: skip


def tiny_config(family: str, **overrides: Any) -> Any:
    """The configuration of a small model; `overrides` replace its fields (layer counts, sizes, tied embeddings)."""
    config, _, values = _CONFIGS[family]
    return getattr(transformers, config)(**(_BASE | values | overrides))


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A small Hugging Face model in float32, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, _CONFIGS[family][1])(tiny_config(family, **overrides)).float().eval()
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


def _randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a value that matters: fresh models have zero biases, flat logits and states that forget."""

    def normal(tensor: torch.Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                normal(parameter, -1.5, 0.4)  # decay of about 0.85 per token instead of a memory of one token
            elif name.endswith("dt_bias"):
                normal(parameter, 0.0, 0.5)
            elif parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if "embed" not in name else 1
                normal(parameter, 0.0, 1.0 * fan_in**-0.5)
            else:
                normal(parameter, float(parameter.mean()), 0.1)  # norms (centred at 0 or 1), biases
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                normal(buffer, 0.0, 0.1)


def tiny_tokenizer(size: int = TOKENS) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with pad (0), message start (1), EOS (2), all bytes, and a few merges."""
    specials = [PAD, START, END]
    vocabulary = {token: index for index, token in enumerate(specials)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    if size < len(vocabulary):
        raise ValueError(f"a byte-level tokenizer has at least {len(vocabulary)} tokens, got size {size}")
    merges: list[tuple[str, str]] = []
    pairs = ((left, right) for left in "Ġaeioustnr" for right in "aeioustnrlhd")
    while len(vocabulary) < size:
        left, right = next(pairs)
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def tiny_checkpoint(directory: Path, family: str, seed: int = 0, *, tokens: int = TOKENS, **overrides: Any) -> Path:
    """Save model, tokenizer and generation config under `directory / family`; returns that path."""
    path = Path(directory) / family
    model = tiny_model(family, seed, **overrides)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False)
    model.save_pretrained(path)
    tiny_tokenizer(tokens).save_pretrained(path)
    return path


@functools.cache
def shared_model(family: str) -> Any:
    """The model behind `captured`: do not change its parameters."""
    return tiny_model(family)


@functools.cache
def captured(family: str) -> Program:
    """The captured program of `shared_model(family)`, once per session. Passes change what they get: clone first."""
    return capture(shared_model(family))


@functools.cache
def captured_float64(family: str) -> Program:
    """As `captured`, in float64 throughout: differences that are left are errors, not rounding.

    The models cast to float32 inside (norms, gates, softmax); these casts are widened in the captured graph.
    """
    program = capture(tiny_model(family).double())
    for node in program.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _widen)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _widen)
        spec = node.meta.get("val")
        if spec is not None and spec.dtype == torch.float32:
            node.meta["val"] = TensorSpec(spec.shape, torch.float64)
    program.finish()
    return program


def _widen(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
