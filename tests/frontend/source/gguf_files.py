"""Tiny GGUF files, written with the `gguf` package from models of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.models import END_ID, PAD_ID, START_ID, tiny_model, tiny_tokenizer

Kind = gguf.GGMLQuantizationType


def source_model() -> Any:
    return tiny_model("llama", attention_bias=False, mlp_bias=False, tie_word_embeddings=False)


def write_gguf(
    file: Path, kind: Kind = Kind.Q8_0, more: Mapping[str, Any] | None = None, words: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Write `source_model()` with its matrices as `kind`. Returns the values that the file holds, by the model's names.

    more: further tensors; words: further tokens, which no merge makes.
    """
    model, tokenizer = source_model(), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, tokenizer, config.vocab_size, words)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    held = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        raw = gguf.quants.quantize(values, kind) if values.ndim == 2 else values
        held[name] = gguf.quants.dequantize(raw, kind) if values.ndim == 2 else values
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((heads[part] for part in heads if part in name), None)
        if count is not None:  # llama.cpp turns pairs of neighbours, transformers halves
            raw = raw.reshape(count, 2, raw.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(raw.shape)
        key = names.get_name(name, try_suffixes=(".weight",))
        assert key is not None
        writer.add_tensor(key, np.ascontiguousarray(raw), raw_dtype=kind if values.ndim == 2 else None)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, rows: int, more: Sequence[str]) -> None:
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])] + list(more)
    words += [f"[PAD{index}]" for index in range(len(words), rows)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(START_ID)
    writer.add_eos_token_id(END_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_chat_template(tokenizer.chat_template)
