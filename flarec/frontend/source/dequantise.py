"""Quantised weights as plain ones: what transformers can read on a CPU, and what it would read wrongly.

transformers dequantises while it loads. It takes the size of a block of fp8 from the sizes of weight and scales, so
that a matrix whose last block is smaller than the others would get scales in the wrong places: such files are refused.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from .formats import KEY, SCALES, Quantised, stated_format
from .headers import StoredTensor

PACKAGES = {"fp8": "accelerate", "mxfp8": "accelerate", "compressed-tensors": "compressed_tensors"}
"""Formats that transformers dequantises without a GPU -> the package that it asks for."""
SCALE = "_scale_inv"
PACKED = ".weight_packed"
_USUAL_BLOCK = (128, 128)
_NARROW = ("F8_E4M3", "F8_E5M2", "F4", "I8")


def why_not(kind: Quantised, table: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> str:
    """Why weights cannot be dequantised, in words; empty if they can."""
    package = PACKAGES.get(kind.method.lower())
    if package is None:
        return "transformers does not dequantise this format without its own kernels"
    if importlib.util.find_spec(package) is None:
        return f"transformers needs the package for it (pip install {package.replace('_', '-')})"
    return _wrong_scales(table, stored) if package == "accelerate" else ""


def _wrong_scales(table: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> str:
    key = stated_format(table) or {}
    block = tuple(key.get("weight_block_size") or _USUAL_BLOCK)
    for name, tensor in stored.items():
        if tensor.dtype not in _NARROW:
            continue
        scales = stored.get(name + SCALE)
        if scales is None:
            return f"{name} has no {name.rpartition('.')[2]}{SCALE} beside it"
        grid = scales.shape if len(scales.shape) >= 2 else (1, 1)
        for size, count, edge in zip(tensor.shape[-2:], grid[-2:], block, strict=True):
            length = size // count
            right = length == edge if key else length & (length - 1) == 0  # unstated: blocks are powers of two
            if size % count or (count > 1 and not right):
                return f"{name} is {size} long, not {count} blocks of {edge}: transformers would misplace the scales"
    return ""


def companions(stored: Mapping[str, StoredTensor]) -> set[str]:
    """Names of scales of weights."""
    return {name for name in stored if name.endswith(SCALES)}


def asking(config: Any, table: Mapping[str, Any], kind: Quantised) -> Any:
    """A copy of a text model's configuration that makes transformers dequantise."""
    config = copy.deepcopy(config)
    usual = {"quant_method": kind.method, "weight_block_size": [*_USUAL_BLOCK]}
    config.quantization_config = {**(stated_format(table) or usual), "dequantize": True}
    return config


def make_plain(model: Any, dtype: torch.dtype) -> Any:
    """A model that transformers dequantised, as if it had been loaded from plain weights in `dtype`; in place."""
    kept = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and not any(part in name for part in kept):
                parameter.data = parameter.data.to(dtype)
    model._weight_conversions = None  # else it would be quantised again when it is saved
    for config in (module.config for module in model.modules() if hasattr(module, "config")):
        for key in (KEY, "_pre_quantization_dtype"):
            config.__dict__.pop(key, None)
    return model
