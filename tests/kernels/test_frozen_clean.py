"""Kernels with a frozen clean stream: the same outputs, the same gradients of noisy tokens, none of clean ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec import ops
from flarec.layout import Layout
from flarec.ops.generalized_delta_rule import GENERALIZED_DELTA_RULE
from flarec.ops.mixer import Mixer, Site
from flarec.verify.inputs import random_layout

Case = tuple[Mixer, Callable[[torch.Generator, int, int], dict[str, Any]]]


def _randn(generator: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=generator, dtype=torch.float64)


def softmax(generator: torch.Generator, rows: int, length: int, **options: Any) -> dict[str, Any]:
    q = _randn(generator, rows, 4, length, 8)
    k, v = (_randn(generator, rows, 2, length, 8) for _ in range(2))
    return {"q": q, "k": k, "v": v, "scale": 0.3, "window": None, "softcap": None, **options}


def capped(generator: torch.Generator, rows: int, length: int) -> dict[str, Any]:
    return softmax(generator, rows, length, window=6, softcap=3.0)


def conv(generator: torch.Generator, rows: int, length: int) -> dict[str, Any]:
    x, weight = _randn(generator, rows, 6, length), _randn(generator, 6, 4)
    return {"x": x, "weight": weight, "bias": _randn(generator, 6), "activation": "silu"}


def linear(gate: int, *, delta: bool) -> Callable[[torch.Generator, int, int], dict[str, Any]]:
    def make(generator: torch.Generator, rows: int, length: int) -> dict[str, Any]:
        q, k = (_randn(generator, rows, length, 2, 8) for _ in range(2))
        v, beta = _randn(generator, rows, length, 4, 6), _randn(generator, rows, length, 4).sigmoid()
        g = {0: None, 3: -beta.flip(1), 4: -_randn(generator, rows, length, 4, 8).square()}[gate]
        return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "scale": 0.4, "delta": delta, "l2norm": delta}

    return make


def scan(generator: torch.Generator, rows: int, length: int) -> dict[str, Any]:
    x, dt = _randn(generator, rows, length, 6), _randn(generator, rows, length, 6).sigmoid()
    b, c = (_randn(generator, rows, length, 3) for _ in range(2))
    return {"x": x, "dt": dt, "a": -_randn(generator, 6, 3).square(), "b": b, "c": c}


def gated(generator: torch.Generator, rows: int, length: int) -> dict[str, Any]:
    return {"x": _randn(generator, rows, length, 6), "a": _randn(generator, rows, length, 6).sigmoid()}


def delta_rule(generator: torch.Generator, rows: int, length: int) -> dict[str, Any]:
    q, k, a, b = (0.5 * _randn(generator, rows, length, 2, 4) for _ in range(4))
    g, v = -_randn(generator, rows, length, 2, 4).sigmoid(), _randn(generator, rows, length, 2, 5)
    return {"q": q, "k": k, "v": v, "g": g, "a": a, "b": b, "scale": 0.5}


CASES: dict[str, Case] = {
    "softmax": (ops.SOFTMAX_ATTENTION, softmax),
    "softmax, window and cap": (ops.SOFTMAX_ATTENTION, capped),
    "conv": (ops.SHORT_CONV, conv),
    "gated delta": (ops.LINEAR_ATTENTION, linear(3, delta=True)),
    "kimi": (ops.LINEAR_ATTENTION, linear(4, delta=True)),
    "mamba-2": (ops.LINEAR_ATTENTION, linear(3, delta=False)),
    "gla": (ops.LINEAR_ATTENTION, linear(4, delta=False)),
    "no gate": (ops.LINEAR_ATTENTION, linear(0, delta=True)),
    "selective scan": (ops.SELECTIVE_SCAN, scan),
    "gated recurrence": (ops.GATED_RECURRENCE, gated),
    "rwkv-7": (GENERALIZED_DELTA_RULE, delta_rule),
}


def run(mixer: Mixer, operands: dict[str, Any], layout: Layout, *, frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, gradients by operand) of the torch form; the gradient of clean outputs is 0, as nothing reads them."""
    given = {
        name: value.clone().requires_grad_() if isinstance(value, Tensor) and name in mixer.axes else value
        for name, value in operands.items()
    }
    tokens = {name: value for name, value in given.items() if isinstance(value, Tensor) and name in mixer.axes}
    form = mixer.forms["torch"]
    derivation = form.derivation(Site(operands, chunk_size=4))
    assert derivation is not None
    call = mixer.call("torch", frozen_clean=frozen)
    extra = {"clean_positions": layout.clean_position} if frozen else {}
    out = call(**given, **{derivation.operand: derivation.build(layout, None)}, **extra)
    dim = mixer.output.index("L")
    noisy = out.narrow(dim, layout.clean_length, layout.noisy_length)
    weight = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(5), dtype=noisy.dtype)
    found = torch.autograd.grad((noisy * weight).sum(), list(tokens.values()))
    return out.detach(), dict(zip(tokens, found, strict=True))


def parts(mixer: Mixer, name: str, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    letters = next(form for form in mixer.axes[name].split("|") if len(form) == value.dim())
    pieces = value.split([layout.clean_length, layout.noisy_length], dim=letters.index("L"))
    return pieces[0], pieces[1]


def rounded(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_noisy_tokens_keep_every_bit(name: str) -> None:
    """Softmax attention rounds: fewer queries are another product of matrices."""
    mixer, make = CASES[name]
    same = rounded if mixer is ops.SOFTMAX_ATTENTION else torch.equal
    for seed in range(3):
        layout = random_layout(random.Random(seed), rows=2, readouts=("block_end", "causal"))
        operands = make(torch.Generator().manual_seed(seed), layout.rows, layout.length)
        full, expected = run(mixer, operands, layout, frozen=False)
        out, found = run(mixer, operands, layout, frozen=True)
        real = (layout.token_document() >= 0).view(
            [layout.rows if letter == "B" else layout.length if letter == "L" else 1 for letter in mixer.output]
        )
        assert same(out * real, full * real), f"output of {name}"
        for operand, gradient in found.items():
            clean, noisy = parts(mixer, operand, gradient, layout)
            whole_clean, whole_noisy = parts(mixer, operand, expected[operand], layout)
            assert not bool(clean.any()), f"{operand} of clean tokens"
            assert same(noisy, whole_noisy), (operand, (noisy - whole_noisy).abs().max())
            assert operand in ("q", "c") or bool(whole_clean.any()), "a frozen stream leaves something out"


def test_a_convolution_whose_weights_are_trained() -> None:
    """Their gradient is that of noisy tokens; the input's does not depend on whether they are."""
    layout = random_layout(random.Random(0), rows=2, readouts=("block_end", "causal"))
    operands = conv(torch.Generator().manual_seed(0), layout.rows, layout.length)
    _, constant = run(ops.SHORT_CONV, operands, layout, frozen=True)
    for name in ("weight", "bias"):
        operands[name].requires_grad_()
    _, trained = run(ops.SHORT_CONV, operands, layout, frozen=True)
    assert torch.equal(trained["x"], constant["x"])
    found = []
    for frozen in (False, True):
        derivation = ops.SHORT_CONV.forms["torch"].derivation(Site(operands))
        assert derivation is not None
        extra = {"clean_positions": layout.clean_position} if frozen else {}
        call = ops.SHORT_CONV.call("torch", frozen_clean=frozen)
        out = call(**operands, **{derivation.operand: derivation.build(layout, None)}, **extra)
        loss = out[:, :, layout.clean_length :].square().sum()
        found.append(torch.autograd.grad(loss, [operands["weight"], operands["bias"]]))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
