"""Measurements of linear attention in training: ours, flash-linear-attention's, and routes out of library calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_attention.reference import reference
from ..kernels.linear_attention.tiles.schedule import TileSchedule
from .checks import Check, check_training
from .measure import TrainingTime
from .problems import Linear
from .session import Session

CHUNK = 64


def kernel(problem: Linear, schedule: TileSchedule) -> Callable[..., Tensor]:
    """Our op on leaves in the order of `Linear.inputs`."""
    from ..kernels.linear_attention.tiles import train

    def op(*leaves: Tensor) -> Tensor:
        out: Tensor = train.two_stream(**problem.named(leaves), schedule=schedule, **problem.options())
        return out

    return op


def check_ours(session: Session, problem: Linear) -> None:
    small = session.size(problem).small(session.small_tokens)

    def run() -> Check:
        layout = small.streams.layout("cpu")
        schedule = TileSchedule.from_layout(layout, CHUNK).to(session.device)
        leaves = small.inputs(layout.length, session.device)
        return check_training(
            kernel(small, schedule),
            lambda *x: reference(**small.named(x), layout=layout, **small.options()),
            leaves,
            _names(small),
        )

    session.check(f"linear attention, {small.text()}", run)


def ours(session: Session, problem: Linear) -> TrainingTime:
    check_ours(session, problem)
    problem = session.size(problem)

    def run() -> TrainingTime:
        layout = problem.streams.layout("cpu")
        op = kernel(problem, TileSchedule.from_layout(layout, CHUNK).to(session.device))
        leaves = problem.inputs(layout.length, session.device)
        return session.clock.training(lambda: [op(*leaves)], leaves)

    return session.measured(("ours", problem), run)


def clean_baseline(session: Session, problem: Linear) -> TrainingTime:
    """flash-linear-attention's kernel for this kind of layer on the clean stream alone, `views` ignored."""
    problem = session.size(problem).clean_only()
    library = session.baselines

    def op(*leaves: Tensor) -> Tensor:
        x = problem.named(leaves)
        if problem.gate == "channel":
            return library.kda(**x, scale=problem.scale)
        if not problem.delta:  # it has no beta, which is less work
            return library.simple_gla(x["q"], x["k"], x["v"], x["g"], scale=problem.scale)
        return library.gated_delta_rule(**x, scale=problem.scale)

    def run() -> TrainingTime:
        leaves = problem.inputs(problem.streams.tokens, session.device)
        if not problem.delta:
            leaves = [*leaves[:-1], leaves[-1].detach()]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]

        def step() -> list[Tensor]:
            return [op(*leaves)]

        _tune(step, wanted)
        _check_baseline(session, problem, op)
        return session.clock.training(step, wanted)

    return session.measured(("clean baseline", problem), run)


def _tune(step: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> None:
    """One forward and backward at full size. Autotuning is not keyed by length: the check's would serve short rows."""
    outputs = step()
    torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


def _check_baseline(session: Session, problem: Linear, op: Callable[..., Tensor]) -> None:
    small = problem.small(session.small_tokens)
    layout = small.streams.layout("cpu")
    leaves = small.inputs(layout.length, session.device)
    names, beta = _names(small), leaves[-1].detach()
    if not small.delta:
        leaves, names = leaves[:-1], names[:-1]

    def plain(*x: Tensor) -> Tensor:
        operands = [*x, beta.new_ones(beta.shape)] if not small.delta else x
        return reference(**small.named(operands), layout=layout, **small.options())

    def theirs(*x: Tensor) -> Tensor:
        return op(*x, beta) if not small.delta else op(*x)

    session.check(
        f"baseline, {small.text()}", lambda: check_training(theirs, plain, leaves, names, baseline=True)
    )


def route(session: Session, problem: Linear, name: str) -> TrainingTime:
    """`library_routes.simple_route` or `virtual_query_route` on the same batch; scalar gate, delta, no prompt."""
    problem = session.size(problem)
    assert session.baselines
    from . import library_routes

    routes: dict[str, Any] = {
        "simple": library_routes.simple_route,
        "virtual queries": library_routes.virtual_query_route,
    }

    def forward(streams: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        outputs: list[Tensor] = routes[name](streams[0], streams[1:], problem.streams.block, problem.scale)
        return outputs

    def run() -> TrainingTime:
        tokens, views = problem.streams.tokens, problem.streams.views
        streams = [problem.inputs(tokens, session.device, seed=seed) for seed in range(1 + views)]
        leaves = [leaf for stream in streams for leaf in stream]
        _tune(lambda: forward(streams), leaves)
        _check_route(session, problem, name, forward)
        return session.clock.training(lambda: forward(streams), leaves)

    return session.measured((name, problem), run)


def _check_route(
    session: Session, problem: Linear, name: str, forward: Callable[[Sequence[Sequence[Tensor]]], list[Tensor]]
) -> None:
    tokens = 2 * CHUNK
    small = replace(problem, streams=replace(problem.streams, rows=1, tokens=tokens))
    layout = small.streams.layout("cpu")

    def joined(*x: Tensor) -> Tensor:
        parts = [leaf.split(tokens, dim=1) for leaf in x]
        return torch.cat(forward([[part[i] for part in parts] for i in range(1 + small.streams.views)]), dim=1)

    session.check(
        f"route '{name}', {small.text()}",
        lambda: check_training(
            joined,
            lambda *x: reference(**small.named(x), layout=layout, **small.options()),
            small.inputs(layout.length, session.device),
            _names(small),
            baseline=True,
        ),
    )


def _names(problem: Linear) -> list[str]:
    return ["q", "k", "v", *(["g"] if problem.gate != "none" else []), "beta"]


def least_bytes(problem: Linear) -> tuple[int, int]:
    """Bytes that a forward and a backward must move: inputs and outputs once, nothing in between."""
    size = problem.dtype.itemsize
    keys, values = problem.key_dim * size, problem.value_dim * size
    gates = 4 + {"none": 0, "scalar": 4, "channel": 4 * problem.key_dim}[problem.gate]
    tokens = problem.streams.rows * problem.streams.length * problem.heads
    return tokens * (2 * keys + 2 * values + gates), tokens * (4 * keys + 3 * values + 2 * gates)


def dense_flops(problem: Linear) -> tuple[float, float]:
    """Arithmetic of the chunk form with dense tiles of 64 rows (docs/kernels.md), forward and backward.

    Per clean row: state in, state out and query, the products of a chunk's rows with each other and with the values; a
    noisy row the same against the chunk and against its tile. The backward has two products for each.
    """
    k, v = problem.key_dim, problem.value_dim
    state = (6 if problem.delta else 4) * k * v
    pairs = (2 if problem.delta else 1) * 2 * CHUNK * (k + v)
    clean = problem.streams.clean_tokens * (state + pairs)
    noisy_rows = problem.streams.rows * (problem.streams.length - problem.streams.tokens)
    noisy = noisy_rows * ((4 if problem.delta else 2) * k * v + 2 * pairs)
    forward = float(problem.heads * (clean + noisy))
    return forward, 2 * forward
