"""Measurements of the short convolution."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.short_conv.readers import ConvSchedule
from ..kernels.short_conv.reference import reference
from .checks import Check, check_training
from .measure import TrainingTime
from .problems import Conv
from .session import Session


def check_ours(session: Session, problem: Conv) -> None:
    small = session.size(problem).small(session.small_tokens // 3)

    def run() -> Check:
        layout = small.streams.layout("cpu")
        schedule = ConvSchedule.from_layout(layout, small.width).to(session.device)
        return check_training(
            lambda x, weight: kernel(x, weight, schedule),
            lambda x, weight: reference(x.transpose(1, 2), weight, None, layout, activation="silu").transpose(1, 2),
            small.inputs(layout.length, session.device),
            ["x", "weight"],
        )

    session.check(f"short convolution, {small.text()}", run)


def kernel(x: Tensor, weight: Tensor, schedule: ConvSchedule) -> Tensor:
    """x [B, T, C] -> [B, T, C]; both are transposed views of what the op takes and gives, without a copy."""
    from ..kernels.short_conv import triton_conv

    return triton_conv.two_stream(x.transpose(1, 2), weight, None, schedule, activation="silu").transpose(1, 2)


def ours(session: Session, problem: Conv) -> TrainingTime:
    check_ours(session, problem)
    problem = session.size(problem)

    def run() -> TrainingTime:
        layout = problem.streams.layout("cpu")
        schedule = ConvSchedule.from_layout(layout, problem.width).to(session.device)
        leaves = problem.inputs(layout.length, session.device)
        return session.clock.training(lambda: [kernel(leaves[0], leaves[1], schedule)], leaves)

    return session.measured(("ours", problem), run)


def clean_baseline(session: Session, problem: Conv) -> TrainingTime:
    """flash-linear-attention's Triton convolution on the clean stream alone."""
    problem = session.size(problem)
    problem = replace(problem, streams=replace(problem.streams, views=0))
    op = session.baselines.short_conv

    def run() -> TrainingTime:
        leaves = problem.inputs(problem.streams.tokens, session.device)
        out = op(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))  # tunes at full size
        del out
        small = problem.small(session.small_tokens // 3)
        small = replace(small, channels=problem.channels)  # its autotuning is keyed by the number of channels
        layout = small.streams.layout("cpu")
        session.check(
            f"baseline convolution, {small.text()}",
            lambda: check_training(
                op,
                lambda x, weight: reference(x.transpose(1, 2), weight, None, layout, activation="silu").transpose(1, 2),
                small.inputs(layout.length, session.device),
                ["x", "weight"],
                baseline=True,
            ),
        )
        return session.clock.training(lambda: [op(*leaves)], leaves)

    return session.measured(("clean baseline", problem), run)


def least_bytes(problem: Conv) -> int:
    """Bytes that forward and backward must move: x and y, then x, dy and dx."""
    return 5 * problem.streams.rows * problem.streams.length * problem.channels * problem.dtype.itemsize
