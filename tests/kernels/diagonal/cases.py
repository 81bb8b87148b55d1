"""What the tests of selective scan and gated recurrence share: random leaves, NaN on padding, gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flarec.layout import Block, Layout, build_layout

Leaves = dict[str, Tensor]

DENSE = build_layout(
    [[17, 6], [9]],
    [
        [
            *[Block(0, a, 3, view, "causal" if view else "block_end") for view in (0, 1) for a in range(5, 17, 3)],
            *(Block(1, 0, 2), Block(1, 6, 3), Block(1, 0, 3, 0, "causal")),
        ],
        [Block(0, 2, 1), Block(0, 4, 7), Block(0, 9, 2, 0, "causal")],
    ],
    cached=[0, 2],
    clean_length=25,
)
"""Two rows, two views, both readouts, blocks longer than a chunk of 4 and anchors at every kind of border."""

CONTINUED = build_layout([[0, 3]], [[Block(1, 0, 2), Block(0, 4, 2), Block(1, 0, 2, 0, "causal")]], cached=[4])
"""A cached document without a token in this layout: the next one starts at slot 0, and not from the cached state."""


def selective_leaves(layout: Layout, seed: int, dtype: torch.dtype = torch.float64) -> Leaves:
    """x, dt, a, b, c and initial_state with 3 channels and 4 states, as leaves."""
    gen = torch.Generator().manual_seed(seed)
    rows, length = layout.rows, layout.length
    tensors = {
        "x": torch.randn(rows, length, 3, generator=gen, dtype=torch.float64),
        "dt": torch.nn.functional.softplus(torch.randn(rows, length, 3, generator=gen, dtype=torch.float64)),
        "a": -torch.randn(3, 4, generator=gen, dtype=torch.float64).exp(),
        "b": torch.randn(rows, length, 4, generator=gen, dtype=torch.float64),
        "c": torch.randn(rows, length, 4, generator=gen, dtype=torch.float64),
        "initial_state": torch.randn(rows, 3, 4, generator=gen, dtype=torch.float64),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def gated_leaves(layout: Layout, seed: int, dtype: torch.dtype = torch.float64) -> Leaves:
    """x, a and initial_state with 5 channels, as leaves; some decays are exactly 0, others exactly 1."""
    gen = torch.Generator().manual_seed(seed)
    rows, length = layout.rows, layout.length
    decay = (4 * torch.randn(rows, length, 5, generator=gen, dtype=torch.float64)).sigmoid()
    tensors = {
        "x": torch.randn(rows, length, 5, generator=gen, dtype=torch.float64),
        "a": decay.masked_fill(decay < 0.05, 0).masked_fill(decay > 0.95, 1),
        "initial_state": torch.randn(rows, 5, generator=gen, dtype=torch.float64),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def poisoned(leaves: Leaves, layout: Layout) -> Leaves:
    """The same leaves with NaN on padding slots."""
    padding = (layout.token_document() < 0)[:, :, None]

    def poison(name: str, x: Tensor) -> Tensor:
        if name == "initial_state" or x.shape[:2] != padding.shape[:2]:
            return x
        return x.detach().masked_fill(padding, float("nan")).requires_grad_()

    return {name: poison(name, x) for name, x in leaves.items()}


def with_gradients(op: Callable[..., Tensor], leaves: Leaves, layout: Layout) -> tuple[Tensor, Leaves]:
    """(op(**leaves), gradient of each leaf from random weights; the weights of padding are NaN, which must not
    matter)."""
    out = op(**leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    weights = weights.masked_fill((layout.token_document() < 0)[:, :, None], float("nan"))
    grads = torch.autograd.grad(out, list(leaves.values()), weights, materialize_grads=True)
    return out.detach(), dict(zip(leaves, grads, strict=True))


def assert_same(got: tuple[Tensor, Leaves], wanted: tuple[Tensor, Leaves], atol: float = 1e-10) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=atol)
    for name, grad in wanted[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=0, atol=atol, msg=f"the gradient of {name} differs")
