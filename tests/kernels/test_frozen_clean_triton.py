"""Triton kernels with a frozen clean stream: launches over noisy tokens alone give the full backward's gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.layout import Block, Layout, build_layout

pytest.importorskip("triton")
from flarec.kernels.linear_attention.tiles.problem import Problem
from flarec.kernels.linear_attention.tiles.schedule import TileSchedule
from flarec.kernels.linear_attention.tiles.train import two_stream as linear_attention
from flarec.kernels.softmax_attention.attention_schedule import AttentionSchedule
from flarec.kernels.softmax_attention.triton_attention import two_stream as softmax_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUT = build_layout(
    [[19, 6], [11]],
    [[Block(0, 0, 3), Block(0, 17, 3, 0, "causal"), Block(1, 4, 2)], [Block(0, 11, 3, 0, "causal"), Block(0, 5, 3)]],
    device=DEVICE,
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN while deterministic algorithms are on."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def gradients(
    run: Any, tensors: dict[str, Tensor], dim: int, layout: Layout = LAYOUT, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """(output, gradients); the gradient of clean outputs is 0."""
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    out = run(**leaves, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    weight.narrow(dim, 0, layout.clean_length).zero_()
    return out.detach(), list(torch.autograd.grad((out * weight).sum(), list(leaves.values())))


def check(run: Any, tensors: dict[str, Tensor], dims: dict[str, int], out_dim: int, **options: Any) -> None:
    full, expected = gradients(run, tensors, out_dim, **options)
    out, found = gradients(run, tensors, out_dim, frozen_clean=LAYOUT.clean_length, **options)
    assert torch.equal(out, full)
    sizes = [LAYOUT.clean_length, LAYOUT.noisy_length]
    for (name, dim), one, other in zip(dims.items(), found, expected, strict=True):
        (clean, noisy), (whole, wanted) = one.split(sizes, dim), other.split(sizes, dim)
        assert not bool(clean.any()), name
        assert torch.equal(noisy, wanted), name
        assert bool(noisy.any()), name
        assert name == "q" or bool(whole.any()), "something is left out"


def randn(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    ("gate", "delta", "l2norm"), [("scalar", True, True), ("none", False, False), ("channel", True, True)]
)
def test_linear_attention(gate: str, delta: bool, l2norm: bool) -> None:
    rows, length = LAYOUT.rows, LAYOUT.length
    tensors = {name: randn(seed, rows, length, 1, 16) for seed, name in enumerate(("q", "k"))}
    tensors["v"] = randn(2, rows, length, 2, 16)
    dims = dict.fromkeys(("q", "k", "v"), 1)
    given: dict[str, Any] = {"g": None} if gate == "none" else {}
    if gate != "none":
        sizes = (rows, length, 2, 16) if gate == "channel" else (rows, length, 2)
        tensors["g"], dims["g"] = -randn(3, *sizes).square(), 1
    tensors["beta"], dims["beta"] = randn(4, rows, length, 2).sigmoid(), 1
    schedule = TileSchedule.from_layout(LAYOUT.to("cpu"), chunk_size=16).to(DEVICE)
    check(linear_attention, tensors, dims, 1, schedule=schedule, scale=0.3, delta=delta, l2norm=l2norm, **given)


def test_a_frozen_backward_launches_no_kernel_of_clean_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    known = Problem.launch

    def noted(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        names.append(name)
        known(self, name, *args, **kwargs)

    rows, length = LAYOUT.rows, LAYOUT.length
    tensors = {name: randn(seed, rows, length, 1, 16) for seed, name in enumerate(("q", "k", "v"))}
    tensors["beta"] = randn(4, rows, length, 1).sigmoid()
    schedule = TileSchedule.from_layout(LAYOUT.to("cpu"), chunk_size=16).to(DEVICE)
    leaves: Any = {name: value.requires_grad_() for name, value in tensors.items()}
    out = linear_attention(
        **leaves, g=None, schedule=schedule, scale=0.3, delta=True, l2norm=False, frozen_clean=LAYOUT.clean_length
    )
    monkeypatch.setattr(Problem, "launch", noted)
    out.sum().backward()
    assert names == ["noisy_queries_grad", "noisy_keys_grad"]


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, 3.0)])
def test_softmax_attention(window: int | None, softcap: float | None) -> None:
    rows, length = LAYOUT.rows, LAYOUT.length
    tensors = {
        "q": randn(0, rows, 2, length, 16), "k": randn(1, rows, 1, length, 16), "v": randn(2, rows, 1, length, 16),
    }
    schedule = AttentionSchedule.from_layout(LAYOUT, window=window)
    check(
        softmax_attention, tensors, dict.fromkeys(("q", "k", "v"), 2), 1, schedule=schedule, scale=0.3, softcap=softcap
    )
