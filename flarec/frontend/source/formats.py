"""Quantised weights: which format a source is in, told from its configuration, the files beside it and its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .headers import FLOATS, StoredTensor

KEY = "quantization_config"
SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""modelopt's, old AutoGPTQ's and old AutoAWQ's own records."""
_MARKS: tuple[tuple[str, str], ...] = (
    ("bitsandbytes 4-bit", r"\.(quant_state\.bitsandbytes__\w+|(nested_)?absmax|(nested_)?quant_map)$"),
    ("bitsandbytes 8-bit", r"\.(SCB|weight_format)$"),
    ("gptq", r"\.g_idx$"),
    ("awq", r"\.(qweight|qzeros)$"),
    ("modelopt NVFP4", r"\.weight_scale_2$"),
    ("compressed-tensors", r"\.(weight_packed|weight_shape|weight_zero_point|weight_global_scale|input_global_scale)$"),
    ("mxfp4", r"_(blocks|scales)$"),
    ("fp8", r"\.(weight_scale_inv|activation_scale|qscale_weight|qscale_act)$|_scale_inv$"),
    ("hqq", r"\.(W_q|W_scale|W_zero)$"),
    ("quanto", r"\.(weight\._data|weight\._scale|input_scale\._data|weight_qtype)$"),
    ("torchao", r":(qdata|scale|zero_point)$|\.weight\.(int_data|tensor_impl|_weight_\w+)$"),
    ("aqlm", r"\.(codebooks|codes)$"),
    ("mlx", r"\.biases$"),
    ("fp8", r"\.(weight_scale|input_scale|scale_weight|scale_input|weight_scales|input_scales)$"),
    ("an fp8 cache", r"\.(k_scale|v_scale|kv_scale|q_scale|prob_scale|k_proj\.output_scale|v_proj\.output_scale)$"),
    ("a quantised format", r"\.(scales?|zeros?|zero_points?|qzeros|scaling_factor)$"),
)
"""Format -> names that no model of transformers has; the first that is met counts."""
_DTYPES = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "F8_E4M3FNUZ": "fp8", "F8_E5M2FNUZ": "fp8", "F4": "fp4"}
QUANTISED = {*_DTYPES, "I8", "U8", "I32", "U32"}
"""Dtypes in which files hold quantised weights..."""
SCALES = ("_scale_inv", ".weight_scale", ".input_scale", ".activation_scale", ".weight_zero_point", ".weight_shape")
"""... and endings of the names of what belongs to them."""


@dataclass(frozen=True)
class Quantised:
    """method: the format; where: the key, file or tensor that says so; tensors: whether any tensor is quantised."""

    method: str
    where: str
    tensors: bool


def stated_format(table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of quantised weights, also that of a multimodal model; None if it says nothing."""
    inner = table.get("text_config")
    found = table.get(KEY) or (inner.get(KEY) if isinstance(inner, Mapping) else None)
    return found if isinstance(found, Mapping) else None


def quantised(
    directory: Path, table: Mapping[str, Any], stored: Collection[StoredTensor], unread: Collection[str]
) -> Quantised | None:
    """How the weights of a source are quantised; None if they are not.

    table: config.json, also that of a multimodal model. stored: its tensors, empty if they are not known.
    unread: those without a place in the model.
    """
    mark = _met(unread) or _met_dtype(stored)
    key = stated_format(table)
    if key is not None:
        method = str(key.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in key else "unknown"))
        if algorithm := key.get("quant_algo"):
            method = f"{method} {algorithm}"
        return Quantised(method, f"{KEY} of config.json", bool(mark) or not stored)
    if mark is None:
        return None
    for name in SIDE_FILES:
        if (side := _side(directory / name)) is not None:
            return Quantised(side, f"{name} and {mark[1]}", True)
    return Quantised(mark[0], mark[1], True)


def _met(unread: Collection[str]) -> tuple[str, str] | None:
    for method, pattern in _MARKS:
        if name := next((name for name in sorted(unread) if re.search(pattern, name)), None):
            return method, name
    return None


def _met_dtype(stored: Collection[StoredTensor]) -> tuple[str, str] | None:
    """Weights in a dtype that no model computes in: matrices of integers, or of 8 bits and less."""
    for tensor in stored:
        if tensor.dtype in _DTYPES:
            return _DTYPES[tensor.dtype], tensor.name
        if tensor.dtype not in FLOATS and len(tensor.shape) > 1 and tensor.name.endswith("weight"):
            return f"packed {tensor.dtype}", tensor.name
    return None


def _side(path: Path) -> str | None:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(table, Mapping):
        return None
    inner = table.get("quantization")
    inner = inner if isinstance(inner, Mapping) else table
    if path.name == SIDE_FILES[0]:
        return f"modelopt {inner.get('quant_algo') or inner.get('kv_cache_quant_algo') or ''}".strip()
    return str(inner.get("quant_method") or ("gptq" if path.name == SIDE_FILES[1] else "awq"))
