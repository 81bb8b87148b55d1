"""Devices and dtypes by the names that users give."""

from __future__ import annotations

import torch

from .errors import UsageError


def torch_device(device: torch.device | str) -> torch.device:
    """The device of that name, "auto" resolved. Raises `UsageError` for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"device '{device}' cannot be used ({first}); choose cpu, or auto") from None
    return place


def resolve_kernels(kernels: str, device: torch.device) -> str:
    """The implementation of the token mixers that "auto" stands for: triton on a CUDA device, torch elsewhere."""
    if kernels != "auto":
        return kernels
    return "triton" if device.type == "cuda" else "torch"


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype of that name. Raises `UsageError` for an unknown one."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype '{dtype}' is unknown; choose float32, bfloat16, float16 or float64")
    return found
