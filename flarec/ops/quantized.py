"""Frozen weights as codes and scales, and the linear layer over one: the weight itself is there while a product runs.

    int8  w[o, i] = codes[o, i] * scale[o], codes from -127 to 127, scale the largest |w[o]| over 127 (the weights of
          LLM.int8(), https://arxiv.org/abs/2208.07339, without its rounding of activations)
    nf4   4-bit NormalFloat in blocks of 64, whose scales are 8-bit codes in blocks of 256 (QLoRA,
          https://arxiv.org/abs/2305.14314, section 3), by bitsandbytes

For training over a frozen model: the layer has a gradient by what it reads, never by its weight, and keeps the codes
for its backward pass, not the weight.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UsageError

Kind = Literal["int8", "nf4"]
INT8: Final = "int8"
NF4: Final = "nf4"
BLOCK, SCALES_BLOCK = 64, 256
"""Of nf4: weights that share a scale, and scales that share one."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] as codes.

    codes   int8: [out, in] int8. nf4: [ceil(out * in / 2), 1] uint8, two weights in a byte, row by row
    scale   int8: [out, 1] float32. nf4: [blocks] uint8, codes of the blocks' scales
    nested  nf4: [ceil(blocks / 256)] float32, scales of the scales, else None
    offset  nf4: [] float32, mean of the scales, else None
    """

    kind: Kind
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    nested: Tensor | None = None
    offset: Tensor | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        named = {"codes": self.codes, "scale": self.scale, "nested": self.nested, "offset": self.offset}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.parts.values())

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in], what a product reads."""
        return weight_of(self.codes, self.scale, self.nested, self.offset, self.shape, dtype)


@torch.no_grad()
def quantize(weight: Tensor, kind: Kind) -> QuantizedWeight:
    """The codes of a weight [out, in] of floating point, on its device; on the meta device their shapes.

    Raises `UsageError` for nf4 without bitsandbytes.
    """
    out, into = weight.shape
    if kind == INT8:
        scale = weight.detach().abs().amax(1, keepdim=True).float() / 127
        codes = (weight.detach().float() / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
        return QuantizedWeight(kind, (out, into), codes.to(torch.int8), scale)
    blocks = -(-weight.numel() // BLOCK)
    if weight.device.type == "meta":
        return QuantizedWeight(
            kind, (out, into), weight.new_empty(-(-weight.numel() // 2), 1, dtype=torch.uint8),
            weight.new_empty(blocks, dtype=torch.uint8),
            weight.new_empty(-(-blocks // SCALES_BLOCK), dtype=torch.float32),
            weight.new_empty((), dtype=torch.float32),
        )
    check_library(kind)
    from bitsandbytes.functional import quantize_4bit

    wide = weight.detach() if weight.dtype.itemsize <= 4 else weight.detach().float()
    codes, state = quantize_4bit(wide.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=kind)
    return QuantizedWeight(kind, (out, into), codes, state.absmax, state.state2.absmax, state.offset)


def weight_of(
    codes: Tensor, scale: Tensor, nested: Tensor | None, offset: Tensor | None, shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out, in] that codes stand for, rounded to `dtype` once."""
    if nested is None or offset is None:
        return codes.to(dtype).mul_(scale)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    inner = QuantState(absmax=nested, blocksize=SCALES_BLOCK, code=_table(codes.device), dtype=torch.float32)
    made = dtype if dtype.itemsize <= 4 else torch.float32
    state = QuantState(
        absmax=scale, shape=torch.Size(shape), blocksize=BLOCK, quant_type=NF4, dtype=made, offset=offset, state2=inner
    )
    weight: Tensor = dequantize_4bit(codes, state)
    return weight.to(dtype)


_TABLES: dict[torch.device, Tensor] = {}


def _table(device: torch.device) -> Tensor:
    """[256] float32: the values of the 8-bit codes of scales."""
    if device not in _TABLES:
        from bitsandbytes.functional import create_dynamic_map

        _TABLES[device] = create_dynamic_map().to(device)
    return _TABLES[device]


def check_library(kind: Kind) -> None:
    """Raise `UsageError` if the package that makes these codes is not installed."""
    if kind == NF4 and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "adapter.base = nf4 needs bitsandbytes, which is not installed; pip install 'flarec[quantized]', or set "
            "adapter.base=int8"
        )


@torch.library.custom_op("flarec::quantized_linear", mutates_args=())
def _forward(
    x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, nested: Tensor | None, offset: Tensor | None,
    out_features: int,
) -> Tensor:
    """x [..., in] times the weight [out, in], plus bias [out]: as `linear` over the weight in the dtype of x."""
    return functional.linear(x, weight_of(codes, scale, nested, offset, (out_features, x.shape[-1]), x.dtype), bias)


@_forward.register_fake
def _(
    x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, nested: Tensor | None, offset: Tensor | None,
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("flarec::quantized_linear_backward", mutates_args=())
def _backward(
    grad: Tensor, codes: Tensor, scale: Tensor, nested: Tensor | None, offset: Tensor | None, in_features: int
) -> Tensor:
    """The gradient [..., in] of what was read, from that of the result [..., out]."""
    return grad @ weight_of(codes, scale, nested, offset, (grad.shape[-1], in_features), grad.dtype)


@_backward.register_fake
def _(
    grad: Tensor, codes: Tensor, scale: Tensor, nested: Tensor | None, offset: Tensor | None, in_features: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, codes, scale, nested, offset, _ = inputs
    ctx.save_for_backward(codes, scale, nested, offset)
    ctx.in_features = x.shape[-1]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    by_x = _backward(grad, *ctx.saved_tensors, ctx.in_features) if ctx.needs_input_grad[0] else None
    by_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
    return by_x, by_bias, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
quantized_linear = _forward._opoverload
quantized_linear_backward = _backward._opoverload
