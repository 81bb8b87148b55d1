"""Opening Hugging Face models, with the text model found inside multimodal checkpoints.

A multimodal checkpoint ("wrapper") has a configuration with a `text_config`, and the text model's weights beside a
vision tower and a projector. Only the text model is loaded: as the causal LM class of its own configuration, under that
class's parameter names. Text has the same position on every axis of multimodal rotary positions, so the text class
computes the wrapper's logits for text.

Nothing of a source is executed, and nobody is asked whether it may be (`flarec.frontend.trust`).
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError, UsageError
from .families import family_of
from .fla.families import prepare, without_flash_attention
from .trust import check_config, check_weights, config_table, made, opened

TEXT_PREFIXES = {r"^language_model\.model\.": "model.", r"^language_model\.lm_head\.": "lm_head.",
                 r"^model\.language_model\.": "model."}
"""Names of the text model's tensors in the files of wrappers (both layouts in use) -> names in its own class."""


def read_config(path: str | Path) -> Any:
    """The transformers configuration of a directory or hub id; never with remote code. Raises `UsageError`."""
    from transformers import AutoConfig

    try:
        table = config_table(path)
        prepare(str(table.get("model_type")))
        check_config(path, table)
        return opened(AutoConfig, path)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_open(path, error) from error


def is_wrapper(config: Any) -> bool:
    """Whether a configuration is that of a multimodal model with a text model inside."""
    return "text_config" in getattr(config, "sub_configs", {}) and getattr(config, "text_config", None) is not None


def text_config_of(config: Any) -> Any:
    """The configuration of the causal LM: the given one, or a copy of a wrapper's `text_config`.

    Whether the head is tied to the embedding is the wrapper's decision, and often only the wrapper states a dtype.
    """
    if not is_wrapper(config):
        return config
    text = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", text.tie_word_embeddings))
    if text.dtype is None:
        text.dtype = config.dtype
    return text


def text_name(name: str) -> str:
    """The name in the text model's class of a tensor in a wrapper's files; other names stay as they are."""
    for pattern, replacement in TEXT_PREFIXES.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def load_model(path: str | Path, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    """Open a causal LM from a directory or hub id; never with remote code. On "meta" only the configuration is read.

    Of a multimodal checkpoint the text model is opened. Raises `UsageError` for a path that holds no such model or not
    all of its weights, `CaptureError` for a family that cannot be captured.
    """
    from transformers import AutoModelForCausalLM

    name = str(path)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UsageError(
            f"{name} is not a model directory (no config.json); give a Hugging Face model directory or hub id"
        )
    whole = read_config(name)
    config = text_config_of(whole)
    family_of(config)
    try:
        if torch.device(device).type == "meta":
            with torch.device("meta"), without_flash_attention():
                return made(AutoModelForCausalLM, config, dtype=dtype or config.dtype or torch.float32)
        wrapper = {"config": config, "key_mapping": TEXT_PREFIXES} if is_wrapper(whole) else {}
        check_weights(name, whole)
        with without_flash_attention():
            wanted: Any = {"dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
            model, info = opened(AutoModelForCausalLM, name, **wanted, **wrapper)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_open(path, error) from error
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(f"{name} holds no weights for {', '.join(missing[:3])}{more}; copy the model again")
    check_rotary(model)
    return model.to(device)


def text_model_of(model: nn.Module) -> nn.Module:
    """The causal LM inside a wrapper in memory, on the wrapper's own parameters; any other model as it is."""
    whole: Any = model
    if not is_wrapper(getattr(model, "config", None)):
        return model
    from transformers import AutoModelForCausalLM

    config = text_config_of(whole.config)
    try:
        with torch.device("meta"):
            text: Any = made(AutoModelForCausalLM, config, dtype=whole.dtype)
    except ValueError as error:
        raise CaptureError(
            f"{type(model).__name__} has a text model of type '{config.model_type}', which is no causal language model "
            "in transformers; give a model that has one"
        ) from error
    wanted = type(text.base_model)
    body = next((module for module in model.modules() if type(module) is wanted), None)
    head = whole.get_output_embeddings()
    if body is None or head is None:
        raise CaptureError(
            f"{type(model).__name__} has no {wanted.__name__} with a head; save it and give the directory"
        )
    setattr(text, text.base_model_prefix, body)
    text.set_output_embeddings(head)
    text.generation_config = whole.generation_config
    return text.train(model.training)  # type: ignore[no-any-return]


def check_rotary(model: nn.Module) -> None:
    """Rotary frequencies made on the meta device can come out as zeros; the model would then ignore positions.

    Some of them may be zero: so do models turn only a part of each head.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.device.type != "meta" and not bool(buffer.any()):
            raise CaptureError(
                f"rotary buffer {name} holds only zeros; load the model with from_pretrained, not from meta"
            )


def _cannot_open(path: str | Path, error: Exception) -> UsageError:
    if isinstance(error, UsageError):
        return error
    lines = str(error).strip().splitlines()
    return UsageError(
        f"{path} cannot be opened as a causal language model: {lines[0] if lines else type(error).__name__}"
    )
