"""Correctness before time: outputs and gradients against the float64 reference at a small size, with the same options.

The bar is that of the kernels' tests: an error of at most twice that of the reference computed in the same precision.
For 16-bit inputs that is the reference under autocast, whose products round their operands as tensor cores do, and one
rounding unit more: kernels keep states and corrected values in the inputs' dtype between their products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
SLACK = 1e-5
"""Relative error that is allowed beyond that in float32: below it a budget would be one of luck."""
BASELINE_BOUND = 0.03
"""Relative error that other people's kernels may have: enough to see that they compute the same thing."""


class CheckFailed(Exception):
    """A kernel does not compute what the reference defines; it is not timed."""


@dataclass(frozen=True)
class Check:
    """Relative errors ||out - reference|| / ||reference|| by tensor, and what is allowed."""

    errors: Mapping[str, float]
    budgets: Mapping[str, float]

    @property
    def worst(self) -> str:
        return max(self.errors, key=lambda name: _excess(self.errors[name], self.budgets[name]))

    @property
    def passed(self) -> bool:
        return all(self.errors[name] <= self.budgets[name] for name in self.errors)

    def text(self) -> str:
        name = self.worst
        return f"{name}: error {self.errors[name]:.1e}, allowed {self.budgets[name]:.1e}"


def _excess(error: float, budget: float) -> float:
    return float("inf") if error != error else error / budget


def relative_error(got: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def reference_precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """In which the reference computes as exactly as a kernel with such inputs should."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype=dtype)
    return nullcontext()


def compare(
    got: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    rough: Mapping[str, Tensor] | None = None,
    slack: float = SLACK,
) -> Check:
    """`rough`: the reference in the kernel's precision, which sets the budgets; None: those of a baseline."""
    errors = {name: relative_error(got[name], exact[name]) for name in exact}
    if rough is None:
        return Check(errors, dict.fromkeys(errors, BASELINE_BOUND))
    budgets = {name: FACTOR * relative_error(rough[name], exact[name]) + slack for name in exact}
    return Check(errors, budgets)


def with_gradients(
    op: Callable[..., Tensor], leaves: Sequence[Tensor], names: Sequence[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output and gradients of `op(*leaves)` for fixed weights of the outputs; computed in `dtype` if given."""
    copies = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out = op(*copies)
    generator = torch.Generator(device=out.device).manual_seed(2)
    # weights that bfloat16 holds exactly, so that all precisions differentiate the same function
    weights = torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype)
    gradients = torch.autograd.grad(out, copies, weights)
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(names, gradients, strict=True)}}


def check_training(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    names: Sequence[str],
    *,
    baseline: bool = False,
) -> Check:
    """Compare an op with its reference on `leaves`: outputs and every gradient. `baseline`: the wider bound."""
    got = with_gradients(ours, leaves, names)
    exact = with_gradients(reference, leaves, names, torch.float64)
    if baseline:
        return compare(got, exact)
    # float32 leaves: sums of many gradients are float32 in the kernels, too, and rounded once
    with reference_precision(leaves[0].dtype, leaves[0].device):
        rough = with_gradients(reference, leaves, names, torch.float32)
    rounded = {name: x.to(got[name].dtype) for name, x in rough.items()}
    return compare(got, exact, rounded, max(SLACK, torch.finfo(leaves[0].dtype).eps))
