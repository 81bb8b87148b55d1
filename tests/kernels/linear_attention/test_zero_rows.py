"""Rows of q and k that are exactly zero under l2norm: outputs and gradients are finite in every kernel, and the
reference's. Such rows are not rare: a short convolution in front of the mixer with its activation gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flarec import ops
from flarec.ir.spec import TensorSpec
from flarec.kernels.linear_attention import reference
from flarec.kernels.linear_attention.panels import chunk
from flarec.kernels.linear_attention.panels.schedule import StateSchedule
from flarec.layout import Block, Layout, build_layout
from flarec.ops import self_test
from tests.kernels.linear_attention.cases import Case

LAYOUT = build_layout([[11, 6]], [[Block(0, 5, 3), Block(0, 9, 3, 0, "causal"), Block(1, 0, 2)]])
SHORT = build_layout([[9]], [[Block(0, 5, 3)]])
EVERY = range(99)
ZEROS = {"all of q": ("q", EVERY), "all of k": ("k", EVERY), "rows": ("qk", (0, 4, 9, 10, 12, 17))}


def inputs_of(case: Case, zeros: str, dtype: torch.dtype, layout: Layout = LAYOUT) -> dict[str, Tensor | None]:
    names, places = ZEROS[zeros]
    inputs = case.inputs(layout, dtype)
    for name in names:
        value = inputs[name]
        assert value is not None
        with torch.no_grad():
            value[:, [place for place in places if place < layout.length]] = 0.0
    return inputs


def outcome(op: Any, case: Case, inputs: dict[str, Tensor | None], where: Any) -> dict[str, Tensor]:
    arguments = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    out = op(*arguments, where, **case.options(), initial_state=inputs["initial_state"])
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    leaves = {name: value for name, value in inputs.items() if value is not None}
    grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()), materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, value in expected.items():
        assert torch.isfinite(value).all(), f"{name} of the reference"
        assert torch.isfinite(found[name]).all(), name
        distance = float((found[name].double() - value).norm())
        assert distance <= bound * (1 + float(value.norm())), f"{name}: {distance}"


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
@pytest.mark.parametrize("delta", [True, False])
def test_panels(gate: str, delta: bool, zeros: str) -> None:
    case = Case(gate, delta, True, 2, seed=4)
    expected = outcome(reference, case, inputs_of(case, zeros, torch.float64), LAYOUT)
    schedule = StateSchedule.from_layout(LAYOUT, 4)
    check(outcome(chunk.two_stream, case, inputs_of(case, zeros, torch.float64), schedule), expected, 1e-10)
    check(outcome(chunk.two_stream, case, inputs_of(case, zeros, torch.float32), schedule), expected, 1e-5)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_tiles(gate: str) -> None:
    """With zeros in some rows of both; in the interpreter, a layout of few tiles."""
    pytest.importorskip("triton")
    from flarec.kernels.linear_attention.tiles.schedule import TileSchedule
    from flarec.kernels.linear_attention.tiles.train import two_stream

    case = Case(gate, True, True, 1, seed=4)
    expected = outcome(reference, case, inputs_of(case, "rows", torch.float64, SHORT), SHORT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {
        name: None if value is None else value.detach().to(device).requires_grad_()
        for name, value in inputs_of(case, "rows", torch.float32, SHORT).items()
    }
    found = outcome(two_stream, case, inputs, TileSchedule.from_layout(SHORT, 16, 16))
    check({name: value.cpu() for name, value in found.items()}, expected, 1e-5)


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_decode_steps(gate: str) -> None:
    """Zeros in rows of q and k, and in the pending keys that a step commits first; both forms of the step."""
    pytest.importorskip("triton")
    heads, width = 2, 16
    g = {"none": None, "scalar": TensorSpec((2, 9, heads), torch.float32),
         "channel": TensorSpec((2, 9, heads, width), torch.float32)}[gate]
    spec = TensorSpec((2, 9, heads, width), torch.float32)
    operands = {"q": spec, "k": spec, "v": spec, "g": g, "beta": TensorSpec((2, 9, heads), torch.float32)}
    site = ops.Site({**operands, "scale": 0.25, "delta": True, "l2norm": True}, step=True)
    layout = self_test._step_layouts()[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = self_test._inputs(ops.LINEAR_ATTENTION, site, layout, device)
    for name in ("q", "k", "pending_k"):
        inputs[name][:, :2] = 0.0
    found, exact = (
        self_test._step(ops.LINEAR_ATTENTION, form, site, given, layout.to(device))
        for form, given in (("triton", inputs), ("torch", {n: self_test._widened(v) for n, v in inputs.items()}))
    )
    check({name: value.cpu() for name, value in found.items()}, {n: v.cpu() for n, v in exact.items()}, 1e-5)
