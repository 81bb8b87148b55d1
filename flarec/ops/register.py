"""A function as an opaque differentiable torch op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIXERS: dict[str, Any] = {}
"""Every op of the table (`flarec.ops.Mixer`) by name; kept here because `opaque` may not import the table."""


def custom_op(name: str, body: Callable[..., Tensor], fake: Callable[..., Tensor]) -> torch._ops.OpOverload[..., Any]:
    """Make `body` the op `flarec::name`, its signature the schema. The backward re-runs the body under autograd."""

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
    return op._opoverload
