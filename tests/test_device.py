"""Devices, dtypes and kernels by name."""

from __future__ import annotations

import pytest
import torch

from flarec.device import resolve_kernels


@pytest.mark.parametrize(
    ("kernels", "device", "chosen"),
    [
        ("auto", "cuda", "triton"), ("auto", "cuda:1", "triton"), ("auto", "cpu", "torch"), ("auto", "meta", "torch"),
        ("torch", "cuda", "torch"), ("triton", "cpu", "triton"), ("reference", "cuda", "reference"),
    ],
)
def test_auto_is_triton_on_cuda_devices(kernels: str, device: str, chosen: str) -> None:
    assert resolve_kernels(kernels, torch.device(device)) == chosen
