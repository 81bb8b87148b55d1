"""Weights as int8 codes, and the linear layer over them; nf4 is in tests_quantized, which has its library."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from flarec.errors import UsageError
from flarec.ops.quantized import QuantizedWeight, check_library, quantize, quantized_linear

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def weight(out: int, into: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(out, into, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (values * torch.logspace(-3, 1, out)[:, None]).to(dtype)


def layer(x: Tensor, held: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    result: Tensor = quantized_linear(x, bias, held.codes, held.scale, held.nested, held.offset, held.shape[0])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_nearest_of_255_equal_steps(dtype: torch.dtype) -> None:
    """Every row for itself, a row of zeros too; rounded to the dtype once."""
    values = weight(7, 50, dtype)
    values[3] = 0
    held = quantize(values, "int8")
    assert (held.codes.dtype, held.shape) == (torch.int8, (7, 50)) and held.nbytes == 7 * 50 + 4 * 7
    step = values.double().abs().amax(1, keepdim=True) / 127
    assert torch.equal(held.codes.abs().amax(1), torch.tensor([127, 127, 127, 0, 127, 127, 127], dtype=torch.int8))
    exact = held.codes.double() * held.scale.double()
    assert ((exact - values.double()).abs() <= 0.5001 * step).all()
    wide = held.codes * held.scale.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(held.weight(dtype), wide.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 50), (12, 50), (2, 3, 4, 50)])
def test_the_layer_is_linear_over_what_codes_stand_for(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """To the bit, forward and backward."""
    held, x = quantize(weight(30, 50, dtype), "int8"), torch.randn(shape, dtype=dtype, requires_grad=True)
    plain, bias = held.weight(dtype), torch.randn(30, dtype=dtype, requires_grad=True)
    ours, theirs = layer(x, held, bias), torch.nn.functional.linear(x, plain, bias)
    assert torch.equal(ours, theirs)
    seed = torch.randn_like(ours)
    for one, other in zip(torch.autograd.grad(ours, (x, bias), seed), torch.autograd.grad(theirs, (x, bias), seed),
                          strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_codes_are_what_the_backward_keeps() -> None:
    held, kept = quantize(weight(30, 50), "int8"), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(4, 50, requires_grad=True), held).sum().backward()
    assert {value.data_ptr() for value in kept} == {value.data_ptr() for value in held.parts.values()}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_without_numbers_the_parts_have_their_shapes(kind: str) -> None:
    """What `flarec doctor` counts; of nf4 4.13 bits a weight, without its library."""
    empty = quantize(weight(96, 1024).to("meta"), kind)  # type: ignore[arg-type]
    assert empty.codes.device.type == "meta"
    if kind == "int8":
        made = quantize(weight(96, 1024), "int8")
        assert [(value.shape, value.dtype) for value in empty.parts.values()] == [
            (value.shape, value.dtype) for value in made.parts.values()
        ]
    else:
        assert empty.nbytes == 96 * 1024 // 2 + 96 * 1024 // 64 + 4 * 96 * 1024 // (64 * 256) + 4
    assert layer(torch.randn(2, 5, 1024, device="meta"), empty).shape == (2, 5, 96)


def test_nf4_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_library("int8")
    with pytest.raises(UsageError, match=r"needs bitsandbytes.*pip install 'flarec\[quantized\]'.*adapter\.base=int8"):
        check_library("nf4")
