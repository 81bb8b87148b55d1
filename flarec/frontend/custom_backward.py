"""Custom backwards that capture would lose: `torch.export` keeps the forward of an `autograd.Function`, nothing else.

The gradients of such a program would be wrong without any error, so the functions are looked for in the autograd graph
of the traced forward: whatever way a model calls one, its backward is a node there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..errors import CaptureError

_OPS = "torch._library.autograd"
"""Module of the classes behind custom ops: those stay in the graph as ops, with their backward."""


def custom_functions(output: Tensor) -> set[type]:
    """The `autograd.Function` classes in the autograd graph of `output`, those of custom ops left out."""
    found: set[type] = set()
    stack: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            function = getattr(type(node), "_forward_cls")  # noqa: B009 - set on generated classes, unknown to mypy
            if function.__module__ != _OPS:
                found.add(function)
        stack.extend(following for following, _ in node.next_functions)
    return found


@contextlib.contextmanager
def refuse_custom_functions(model: nn.Module) -> Iterator[None]:
    """Within the context, a forward of the model through an `autograd.Function` raises `CaptureError` at its end.

    Parameters require gradients meanwhile: a frozen model has no autograd graph to look at.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]

    def check(module: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            return
        for function in sorted(custom_functions(logits), key=lambda f: f.__qualname__):
            raise CaptureError(
                f"{type(module).__name__} computes with {function.__module__}.{function.__qualname__}, an "
                "autograd.Function whose backward a captured graph would lose; put a custom op in its place in the "
                "model's row in flarec/frontend/families.py"
            )

    handle = model.register_forward_hook(check)
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
