"""Measurements of a decode step of linear attention, replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_attention.reference_step import reference_step
from ..kernels.linear_attention.step.schedule import StepSchedule
from .checks import BASELINE_BOUND, Check, compare
from .problems import DecodeStep
from .session import Session

COPIES = 4
"""Layers of a graph, each with its own state: together they are larger than an L2 cache."""


def _names(results: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("out", "state", "pending_k", "pending_d", "pending_g"), results, strict=True))


def step(problem: DecodeStep, device: torch.device, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """Our step on inputs and a cache of its own."""
    from ..kernels.linear_attention.step.launch import linear_attention_step

    layer, layout = problem.layer(), problem.layout("cpu")
    schedule = StepSchedule.from_layout(layout).to(device)
    q, k, v, g, beta = (x.detach() for x in layer.inputs(layout.length, device, seed=seed))
    state, *pending, accepted = problem.cache(device, seed)
    old_k, old_d, old_g = pending
    options: dict[str, Any] = {**layer.options(), "clean_length": problem.clean}
    return lambda: linear_attention_step(q, k, v, g, beta, state, old_k, old_d, old_g, accepted, schedule, **options)


def check_ours(session: Session, problem: DecodeStep) -> None:
    small = session.size(problem).small()

    def run() -> Check:
        layer, device = small.layer(), session.device
        layout = small.layout(device)
        operands = [x.detach() for x in layer.inputs(layout.length, device)]
        state, *pending, accepted = small.cache(device)

        def reference(dtype: torch.dtype) -> dict[str, Tensor]:
            names = ("q", "k", "v", "g", "beta", "state", "pending_k", "pending_d", "pending_g")
            tensors = zip(names, (*operands, state, *pending), strict=True)
            named = {name: x.to(dtype) for name, x in tensors}
            options = {"scale": layer.scale, "delta": layer.delta, "l2norm": False}
            return _names(reference_step(**named, accepted=accepted, layout=layout, **options))

        got = _names(step(small, device, 0)())
        rough = {name: x.to(got[name].dtype) for name, x in reference(torch.float32).items()}
        return compare(got, reference(torch.float64), rough)

    session.check(f"decode step, {small.text()}", run)


def ours(session: Session, problem: DecodeStep) -> float:
    """Milliseconds of one layer's step."""
    check_ours(session, problem)
    problem = session.size(problem)
    return session.measured(
        ("ours", problem),
        lambda: session.clock.graph_ms([step(problem, session.device, seed) for seed in range(COPIES)]),
    )


def recurrent_baseline(session: Session, problem: DecodeStep) -> float:
    """Milliseconds of flash-linear-attention's recurrent kernel for one row per request."""
    problem = session.size(problem)
    library = session.baselines

    def step(seed: int, which: DecodeStep = problem) -> Callable[[], tuple[Tensor, Tensor]]:
        layer = which.layer()
        q, k, v, g, beta = (x.detach() for x in layer.inputs(1, session.device, seed=seed))
        state = which.cache(session.device, seed)[0]
        return lambda: library.recurrent_step(q, k, v, g, beta, state, layer.scale)

    def check() -> Check:
        small = problem.small()
        layer = small.layer()
        q, k, v, g, beta = (x.detach().double()[:, 0] for x in layer.inputs(1, session.device))
        state = small.cache(session.device)[0].double() * g.exp()[..., None, None]
        value = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
        state = state + torch.einsum("bhk,bhv->bhkv", k, value)
        exact = {"out": layer.scale * torch.einsum("bhkv,bhk->bhv", state, q), "state": state}
        out, final = step(0, small)()
        return compare({"out": out[:, 0], "state": final}, exact)

    def run() -> float:
        session.check(f"baseline decode step, allowed {BASELINE_BOUND}", check)
        return session.clock.graph_ms([step(seed) for seed in range(COPIES)])

    return session.measured(("recurrent", problem), run)


def least_bytes(problem: DecodeStep) -> int:
    """Bytes that a step must move: the state is read and written; the rest is small."""
    return 2 * 4 * problem.batch * problem.heads * problem.key_dim * problem.value_dim
