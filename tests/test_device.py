"""Devices, dtypes and kernels by name."""

from __future__ import annotations

import pytest
import torch

from flarec.device import resolve_compile, resolve_kernels
from flarec.errors import UsageError


@pytest.mark.parametrize(
    ("kernels", "device", "chosen"),
    [
        ("auto", "cuda", "triton"), ("auto", "cuda:1", "triton"), ("auto", "cpu", "torch"), ("auto", "meta", "torch"),
        ("torch", "cuda", "torch"), ("triton", "cpu", "triton"), ("reference", "cuda", "reference"),
    ],
)
def test_auto_is_triton_on_cuda_devices(kernels: str, device: str, chosen: str) -> None:
    assert resolve_kernels(kernels, torch.device(device)) == chosen


@pytest.mark.parametrize(("choice", "device", "compiles"), [
    ("auto", "cuda", True), ("auto", "cpu", False), ("auto", "meta", False), ("on", "cpu", True),
    ("off", "cuda", False),
])
def test_auto_compiles_on_cuda_devices(choice: str, device: str, compiles: bool) -> None:
    assert resolve_compile(choice, torch.device(device)) is compiles


def test_auto_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not resolve_compile("auto", torch.device("cuda")) and resolve_compile("on", torch.device("cuda"))


def test_another_choice_of_compiling_is_refused() -> None:
    with pytest.raises(UsageError, match="choose auto, on or off"):
        resolve_compile("max-autotune", torch.device("cpu"))
