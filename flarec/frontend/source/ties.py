"""Whether the head of a model is its embedding: what the configuration claims, and what the two tensors say."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open

from .headers import StoredTensor
from .prefixes import renamed

TIE = "tie_word_embeddings"
_BLOCK = 1 << 24
"""Elements that are compared at a time."""


def claimed(table: Mapping[str, Any], whole: Any, text: Any) -> bool:
    """What a configuration says of its text model.

    table: config.json. The outer key of a multimodal model decides; where it is absent, that of its `text_config`.
    """
    inner = table.get("text_config")
    if whole is not text and TIE not in table and isinstance(inner, Mapping) and inner.get(TIE) is not None:
        return bool(inner[TIE])
    return bool(getattr(whole, TIE, getattr(text, TIE, False)))


def head_differs(model: Any, stored: Mapping[str, StoredTensor], mapping: Mapping[str, str]) -> bool:
    """Whether a file holds a head and an embedding with other numbers, or of other sizes, than one another.

    model: the text model, whose ties are looked at.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if f"{head}.weight" not in ties:
        return False
    own = {renamed(name, mapping): tensor for name, tensor in stored.items()}
    one, other = own.get(f"{head}.weight"), own.get(ties[f"{head}.weight"])
    return one is not None and other is not None and not _equal(one, other)


def _equal(left: StoredTensor, right: StoredTensor) -> bool:
    if left.shape != right.shape:
        return False
    rows = max(1, _BLOCK // max(1, left.shape[-1]))
    with safe_open(left.file, framework="pt") as first, safe_open(right.file, framework="pt") as second:
        one, other = first.get_slice(left.name), second.get_slice(right.name)
        return all(
            torch.equal(one[start : start + rows].float(), other[start : start + rows].float())
            for start in range(0, left.shape[0], rows)
        )


def untied(config: Any) -> Any:
    """A copy of a configuration that claims no tie."""
    config = copy.deepcopy(config)
    setattr(config, TIE, False)
    return config
