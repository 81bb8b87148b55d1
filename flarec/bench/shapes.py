"""Shapes of Qwen3.5 that whole models are measured in, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

VOCABULARY = 248320
_LINEAR = {"head_dim": 256, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
           "linear_num_value_heads": 16, "num_attention_heads": 8, "num_key_value_heads": 2}
_LARGE = {**_LINEAR, "linear_num_value_heads": 32, "num_attention_heads": 16, "num_key_value_heads": 4}
_SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 2048}
SHAPES: dict[str, dict[str, int]] = {
    "2B": {**_LINEAR, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
           "vocab_size": VOCABULARY},
    "4B": {**_LARGE, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "vocab_size": VOCABULARY},
    "9B": {**_LARGE, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "vocab_size": VOCABULARY,
           "tie_word_embeddings": False},
    # the same mixers with little around them: compiles the same kernels
    "warm": {**_LINEAR, **_SMALL},
    "warm-large": {**_LARGE, **_SMALL},
    # for a machine without a GPU: does the benchmark run?
    "tiny": {"head_dim": 32, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
             "linear_num_value_heads": 2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320},
}
"""Three layers of linear attention to one of softmax attention, tied embeddings but for the 9B's."""


def build(
    shape: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, layers: Sequence[str] | None = None
) -> Any:
    """The transformers model in eval mode, without end tokens; `meta` has no weights. layers: kinds of so many, with a
    small vocabulary, in place of all of them."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    given: dict[str, Any] = {"tie_word_embeddings": True, "eos_token_id": None, "pad_token_id": 0, **SHAPES[shape]}
    if layers is not None:
        given |= {"num_hidden_layers": len(layers), "layer_types": list(layers), "vocab_size": _SMALL["vocab_size"]}
    config = Qwen3_5TextConfig(**given)
    with torch.device(device):
        model = Qwen3_5ForCausalLM._from_config(config, dtype=dtype)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()
