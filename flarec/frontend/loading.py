"""Opening Hugging Face models, with the text model found inside multimodal checkpoints.

A multimodal checkpoint ("wrapper") has a configuration with a `text_config`, and the text model's weights beside a
vision tower and a projector. Only the text model is loaded: as the causal LM class of its own configuration, under that
class's parameter names. Text has the same position on every axis of multimodal rotary positions, so the text class
computes the wrapper's logits for text.

Nothing of a source is executed, and nobody is asked whether it may be (`flarec.frontend.trust`).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..errors import CaptureError, FlarecWarning, UsageError, first_line
from .families import family_of
from .fla.families import prepare, without_flash_attention
from .source.check import SourceFacts, examine
from .source.dequantise import make_plain
from .source.headers import WEIGHTS
from .source.prefixes import TEXT_PREFIXES, renamed
from .source.ties import claimed
from .trust import check_config, check_weights, config_table, made, opened

_REFUSALS = (OSError, ValueError, KeyError, StrictDataclassError)
"""How transformers says that a configuration is none."""


def read_config(path: str | Path) -> Any:
    """The transformers configuration of a directory or hub id; never with remote code. Raises `UsageError`."""
    from transformers import AutoConfig

    try:
        table = config_table(path)
        prepare(str(table.get("model_type")))
        check_config(path, table)
        _check_dtypes(path, table)
        return opened(AutoConfig, path)
    except (*_REFUSALS, TypeError, AttributeError) as error:  # of values of another type
        raise _cannot_open(path, error) from error


def _check_dtypes(path: str | Path, table: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `UsageError` for the name of a dtype that is none: transformers asks torch for whatever stands there."""
    for key, value in table.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            _check_dtypes(path, value, f"{prefix}{key}.")
        known = isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
        if key in ("dtype", "torch_dtype") and value is not None and not known and not isinstance(value, Mapping):
            raise UsageError(
                f"{path}: {prefix}{key} = {value!r} in config.json is no dtype; write float32, bfloat16 or float16, or "
                "remove it"
            )


def is_wrapper(config: Any) -> bool:
    """Whether a configuration is that of a multimodal model with a text model inside."""
    return "text_config" in getattr(config, "sub_configs", {}) and getattr(config, "text_config", None) is not None


def text_config_of(config: Any, table: Mapping[str, Any] | None = None) -> Any:
    """The configuration of the causal LM: the given one, or a copy of a wrapper's `text_config`.

    Whether the head is tied to the embedding is the wrapper's decision, and often only the wrapper states a dtype.
    table: config.json, which shows what was stated and what is a default.
    """
    if not is_wrapper(config):
        return config
    text = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = claimed(table if table is not None else config.to_dict(), config, text)
    if text.dtype is None:
        text.dtype = config.dtype
    return text


def text_name(name: str) -> str:
    """The name in the text model's class of a tensor in a wrapper's files; other names stay as they are."""
    for pattern, replacement in TEXT_PREFIXES.items():
        if (found := renamed(name, {pattern: replacement})) != name:
            return found
    return name


def judge_source(path: str | Path, *, weights: bool = True, dequantize: bool = False) -> SourceFacts:
    """Judge a source by its configuration and the headers of its files (`flarec.frontend.source.check`).

    weights: refuse a directory that holds a configuration alone. dequantize: quantised weights are wanted plain.
    Raises `UsageError` for a source that cannot be opened, `CaptureError` for a family that cannot be captured.
    """
    name = str(path)
    whole = read_config(name)
    table = config_table(name)
    text = text_config_of(whole, table)
    family_of(text)
    check_weights(name, whole)
    _check_generation(Path(name))
    try:
        facts = examine(name, table, whole, text, _empty, dequantize=dequantize)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_open(path, error) from error
    if weights and not facts.weights:
        raise UsageError(f"{name} holds no weights (no {WEIGHTS} and no index of shards); copy the model again")
    return facts


def _check_generation(directory: Path) -> None:
    """Raise `UsageError` for generation defaults that transformers refuses, which it does after it read the weights."""
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if not file.is_file():
        return
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it is no JSON object")
        GenerationConfig.from_dict(table).validate()
    except (*_REFUSALS, TypeError, AttributeError) as error:
        raise UsageError(f"{file} cannot be used: {first_line(error)}; correct it, or remove it") from error


def _empty(config: Any) -> Any:
    """The model of a configuration, without numbers, its ties told."""
    model = meta_model(config, None)
    model.tie_weights()
    return model


def load_model(
    path: str | Path, dtype: torch.dtype | None, device: torch.device | str, *, dequantize: bool = False
) -> Any:
    """Open a causal LM from a directory or hub id; never with remote code. On "meta" only the configuration is read.

    Of a multimodal checkpoint the text model is opened. dequantize: of quantised weights, which are bfloat16 where no
    dtype is given. What is unusual of a source is told as a `FlarecWarning`.
    Raises `UsageError` for a path that holds no such model or not all of its weights, `CaptureError` for a family that
    cannot be captured.
    """
    from transformers import AutoModelForCausalLM

    name = str(path)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UsageError(
            f"{name} is not a model directory (no config.json); give a Hugging Face model directory or hub id"
        )
    if torch.device(device).type == "meta":
        config = text_config_of(read_config(name), _table(name))
        return meta_model(config, dtype)
    facts = judge_source(name, dequantize=dequantize)
    for note in facts.notes:
        warnings.warn(note, FlarecWarning, stacklevel=2)
    try:
        with without_flash_attention():
            usual = "auto" if facts.quantised is None else torch.bfloat16
            wanted: Any = {"dtype": dtype or usual, "use_safetensors": True, "output_loading_info": True}
            if facts.mapping:
                wanted["key_mapping"] = dict(facts.mapping)
            if facts.config is not None:
                wanted["config"] = facts.config
            model, info = opened(AutoModelForCausalLM, name, **wanted)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_open(path, error) from error
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        raise UsageError(f"{name} holds no weights for {', '.join(missing[:3])}; copy the model again")
    if facts.quantised is not None:
        make_plain(model, dtype or torch.bfloat16)
    if facts.mapping and not facts.wrapper:
        model._weight_conversions = None  # else the names would be written as they were stored
    check_rotary(model)
    return model.to(device)


def meta_model(config: Any, dtype: torch.dtype | None) -> Any:
    """The model of a text configuration on the meta device, in `dtype` (None: as the configuration states).

    transformers notes the dtype in the configuration that it is given: that is a copy here.
    """
    from transformers import AutoModelForCausalLM

    family_of(config)
    try:
        with torch.device("meta"), without_flash_attention():
            return made(AutoModelForCausalLM, copy.deepcopy(config), dtype=dtype or config.dtype or torch.float32)
    except (*_REFUSALS, RuntimeError) as error:  # sizes that no tensor has
        raise _cannot_open(str(config.name_or_path), error) from error


def _table(path: str) -> Mapping[str, Any]:
    try:
        return config_table(path)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_open(path, error) from error


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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith(":"):
        lines = [" ".join(map(str.strip, lines[:2]))]
    if isinstance(error, KeyError) and error.args:  # whose text is the key alone
        lines = [f"its config.json has a value, or lacks a key, that transformers does not find ({lines[0]})"]
    return UsageError(f"{path} cannot be opened as a causal language model: {lines[0]}")
