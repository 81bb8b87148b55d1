"""Small multimodal checkpoints: a vision tower, a projector, a tiny text model, and the files of a processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from flarec.frontend.tiny import TINY
from tests.models import END_ID, PAD_ID, START_ID, VOCABULARY, tiny_tokenizer

# Ids that only the wrapper's configuration names, in rows that the tokenizer leaves free.
IMAGE, VIDEO, VISION_START, VISION_END = 300, 301, 302, 303
_QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_channels": 3, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 16,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}
_PLAIN = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": PAD_ID,
    "bos_token_id": START_ID, "eos_token_id": END_ID,
}
_EXPERTS = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
}
_QWEN_TEXT = dict(TINY["qwen3_5_text"].values) | {
    "rope_parameters": {  # multimodal: time, height and width have frequencies of their own
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen3_5": {"text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION, **_QWEN_TOKENS},
    # experts are merged into one tensor on loading: its files have a tensor per expert
    "qwen3_5_moe": {"text_config": _QWEN_TEXT | _EXPERTS, "vision_config": _QWEN_VISION, **_QWEN_TOKENS},
    # the other layout of names, and a tied head
    "gemma3": {
        "text_config": _PLAIN | {"query_pre_attn_scalar": 16, "sliding_window": 8}, "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    },
}
"""Values of the configuration by model type."""
PREPROCESSOR = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2}
PREDICTION = "mtp.layers.0.fc.weight"
"""A tensor of multi-token prediction, as released Qwen3.5 checkpoints have them: transformers drops it on loading."""


def tiny_wrapper(directory: Path, model_type: str = "qwen3_5", *, seed: int = 0, **save: Any) -> Path:
    """Save a wrapper below `directory`; `save` goes to `save_pretrained`. Its vision tensors are bfloat16."""
    path = Path(directory) / model_type
    config = AutoConfig.for_model(model_type, **WRAPPERS[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    fan_in = parameter.shape[-1] if "embed" not in name else 1
                    parameter.normal_(0.0, fan_in**-0.5)
                elif not name.endswith("A_log"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False)
    model.save_pretrained(path, **save)
    tiny_tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {name: t.bfloat16() if "visi" in name or "visual" in name else t for name, t in tensors.items()}
        if not save and model_type == "qwen3_5":
            changed[PREDICTION] = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        save_file(changed, file, metadata={"format": "pt"})
    return path


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's weight files but flarec's own."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        found.update(load_file(file))
    return found
