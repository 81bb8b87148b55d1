"""Models with random weights in the shapes that are trained, and what is trained of them."""

from __future__ import annotations

from dataclasses import dataclass
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
"""Of Qwen3.5: three layers of linear attention to one of softmax attention, tied embeddings but for the 9B's."""

_ADAPTER = ["adapter.rank=64", "adapter.alpha=64", "objective.ar_weight=0", "mask_token=vector"]
_AGAIN = ["train.memory=recompute"]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "ar": ("draft", ["objective.diffusion_weight=0"]),
    "flare": ("flare", []),
    "draft": ("draft", []),
    "adapter": ("draft", _ADAPTER),
    "ar-recompute": ("draft", ["objective.diffusion_weight=0", *_AGAIN]),
    "flare-recompute": ("flare", _AGAIN),
    "adapter-recompute": ("draft", [*_ADAPTER, *_AGAIN]),
    "flare-4B": ("flare", _AGAIN),
    "adapter-9B": ("draft", [*_ADAPTER, *_AGAIN]),
}
"""By part the recipe and what is changed of it. Of "draft", "ar" is the clean stream alone, "adapter" its objective
over a frozen model; with "-recompute", and in larger shapes, layers are computed again."""
SHAPE_OF = {"flare-4B": "4B", "adapter-9B": "9B"}
"""Parts with a shape of their own."""
MICRO: dict[str, tuple[int, ...]] = {
    "stock": (8, 4), "stock-compiled": (8, 4), "ar": (8, 4), "flare": (4, 1), "draft": (4, 2), "adapter": (8, 4),
    "ar-recompute": (8, 4), "flare-recompute": (4, 2), "adapter-recompute": (8, 4), "flare-4B": (4, 2),
    "adapter-9B": (4, 2), "first-step": (4, 2), "doctor": (4,),
}
"""Rows of a micro batch that are tried, by part: one after the other until one fits, those of `EVERY` all."""
EVERY = ("flare",)
"""Of it fewer rows are of interest, too: for their peak."""


@dataclass(frozen=True)
class PartPlan:
    """What a process measures.

    part     a key of `MICRO`
    rows     of an optimizer step, `length` clean tokens each; micro: rows of a forward pass, one after the other
    compile  auto, on or off: our steps by region
    quick    shorter timings
    every    try all micro batches, not only until one fits
    """

    part: str
    shape: str
    device: str
    rows: int
    length: int
    micro: tuple[int, ...]
    compile: str = "auto"
    quick: bool = False
    every: bool = False


def build(shape: str, device: torch.device | str) -> Any:
    """The transformers model in bfloat16, in eval mode; `meta` has no weights."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    given = {"tie_word_embeddings": True, "eos_token_id": None, "pad_token_id": 0, **SHAPES[shape]}
    config = Qwen3_5TextConfig(**given)
    with torch.device(device):
        model = Qwen3_5ForCausalLM._from_config(config, dtype=torch.bfloat16)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def sizes(model: Any) -> tuple[int, int]:
    """(parameters, tied ones once; those of the head)."""
    seen = {id(value): value.numel() for value in model.parameters()}
    return sum(seen.values()), model.get_input_embeddings().weight.numel()
