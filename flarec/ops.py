"""Semantic ops: one opaque node per token mixer and per expert layer.

A captured graph holds the `flarec::*` custom ops below; between them everything is plain ATen that treats tokens
one by one. Passes match these ops, never classes of a model. The body of each op is its reference implementation (one
document per row, no noisy tokens), so a captured program runs and differentiates as it stands; the two-stream and
cached functions in `flarec.stream_ops` extend the same references over a layout.

Shapes: B rows, L tokens, H heads (value heads), Hk key heads, K key dim, V value dim, C channels, W conv width,
N states per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels.diagonal.gated_recurrence.reference import reference as gated_recurrence_reference
from .kernels.diagonal.selective_scan.reference import reference as selective_scan_reference
from .kernels.linear_attention.reference import reference as linear_attention_reference
from .kernels.moe_experts.reference import reference as moe_experts_reference
from .kernels.short_conv.reference import reference as short_conv_reference
from .kernels.softmax_attention.reference import reference as softmax_attention_reference
from .layout import Layout, build_layout


def plain_layout(rows: int, length: int, device: torch.device) -> Layout:
    """The layout of a plain causal forward: one document per row, no noisy tokens."""
    return build_layout([[length]] * rows, [[]] * rows, device=device)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    layout = plain_layout(q.shape[0], q.shape[2], q.device)
    return softmax_attention_reference(q, k, v, layout, scale=scale, window=window, softcap=softcap)


def _short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    layout = plain_layout(x.shape[0], x.shape[2], x.device)
    return short_conv_reference(x, weight, bias, layout, activation=activation)


def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, delta: bool, l2norm: bool
) -> Tensor:
    layout = plain_layout(q.shape[0], q.shape[1], q.device)
    return linear_attention_reference(q, k, v, g, beta, layout, scale=scale, delta=delta, l2norm=l2norm)


def _selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return selective_scan_reference(x, dt, a, b, c, plain_layout(x.shape[0], x.shape[1], x.device))


def _gated_recurrence(x: Tensor, a: Tensor) -> Tensor:
    return gated_recurrence_reference(x, a, plain_layout(x.shape[0], x.shape[1], x.device))


def _moe_experts(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool = True
) -> Tensor:
    return moe_experts_reference(x, index, weight, up, down, activation=activation, gated=gated)


def _softmax_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _short_conv_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    return x.new_empty(x.shape)


def _linear_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, delta: bool, l2norm: bool
) -> Tensor:
    return v.new_empty(v.shape)


def _selective_scan_fake(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gated_recurrence_fake(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _moe_experts_fake(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool = True
) -> Tensor:
    return x.new_empty(x.shape)


def _register(name: str, body: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make `body` the opaque differentiable op `flarec::name`. Its backward re-runs the reference under autograd."""

    def forward(*args: Any) -> Tensor:
        with torch.no_grad():
            return body(*args).clone(memory_format=torch.contiguous_format)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if flag else value for flag, value in zip(ctx.is_tensor, ctx.rest, strict=True)]
        wanted = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]
        with torch.enable_grad():
            for i in wanted:
                args[i] = args[i].detach().requires_grad_()
            output = body(*args)
            grads = torch.autograd.grad(output, [args[i] for i in wanted], grad, allow_unused=True)
        result: list[Tensor | None] = [None] * len(args)
        for i, value in zip(wanted, grads, strict=True):
            result[i] = torch.zeros_like(args[i]) if value is None else value
        return tuple(result)

    schema = torch.library.infer_schema(body, mutates_args=())
    op = torch.library.custom_op(f"flarec::{name}", forward, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)
    return op


softmax_attention = _register("softmax_attention", _softmax_attention, _softmax_attention_fake)
short_conv = _register("short_conv", _short_conv, _short_conv_fake)
linear_attention = _register("linear_attention", _linear_attention, _linear_attention_fake)
selective_scan = _register("selective_scan", _selective_scan, _selective_scan_fake)
gated_recurrence = _register("gated_recurrence", _gated_recurrence, _gated_recurrence_fake)
moe_experts = _register("moe_experts", _moe_experts, _moe_experts_fake)

SOFTMAX_ATTENTION = torch.ops.flarec.softmax_attention.default
SHORT_CONV = torch.ops.flarec.short_conv.default
LINEAR_ATTENTION = torch.ops.flarec.linear_attention.default
SELECTIVE_SCAN = torch.ops.flarec.selective_scan.default
GATED_RECURRENCE = torch.ops.flarec.gated_recurrence.default
MOE_EXPERTS = torch.ops.flarec.moe_experts.default

RECURRENCES = (LINEAR_ATTENTION, SELECTIVE_SCAN, GATED_RECURRENCE)
"""Ops that carry a state from token to token."""

TOKEN_MIXERS = (SOFTMAX_ATTENTION, SHORT_CONV, *RECURRENCES)
"""Ops that move information between tokens; everything else in a captured graph must not."""
