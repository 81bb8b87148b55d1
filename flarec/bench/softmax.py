"""Measurements of softmax attention: ours against causal attention of torch, per visible pair of tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.softmax_attention.attention_schedule import AttentionSchedule
from ..kernels.softmax_attention.reference import reference
from .checks import Check, check_training
from .measure import TrainingTime
from .problems import Softmax, StreamSizes
from .session import Session

NAMES = ["q", "k", "v"]


def check_ours(session: Session, problem: Softmax) -> None:
    small = session.size(problem).small(session.small_tokens)

    def run() -> Check:
        from ..kernels.softmax_attention import triton_attention

        layout = small.streams.layout("cpu")
        schedule = AttentionSchedule.from_layout(layout).to(session.device)
        return check_training(
            lambda *x: triton_attention.two_stream(x[0], x[1], x[2], schedule, scale=small.scale),
            lambda *x: reference(x[0], x[1], x[2], layout, scale=small.scale),
            small.inputs(layout.length, session.device),
            NAMES,
        )

    session.check(f"softmax attention, {small.text()}", run)


def ours(session: Session, problem: Softmax) -> TrainingTime:
    check_ours(session, problem)
    problem = session.size(problem)

    def run() -> TrainingTime:
        from ..kernels.softmax_attention import triton_attention

        layout = problem.streams.layout("cpu")
        schedule = AttentionSchedule.from_layout(layout).to(session.device)
        leaves = problem.inputs(layout.length, session.device)
        q, k, v = leaves
        return session.clock.training(
            lambda: [triton_attention.two_stream(q, k, v, schedule, scale=problem.scale)], leaves
        )

    return session.measured(("ours", problem), run)


def causal(session: Session, problem: Softmax) -> TrainingTime:
    """torch's own causal attention on the clean stream, by the backend that torch chooses."""
    problem = session.size(problem)

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = problem.heads != problem.key_heads
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=problem.scale, enable_gqa=grouped
        )

    def run() -> TrainingTime:
        small = problem.small(session.small_tokens)
        small = replace(small, streams=replace(small.streams, views=0))
        layout = small.streams.layout("cpu")
        session.check(
            f"causal attention of torch, {small.text()}",
            lambda: check_training(
                lambda *x: functional.scaled_dot_product_attention(
                    x[0], x[1], x[2], is_causal=True, scale=small.scale, enable_gqa=small.heads != 1
                ).transpose(1, 2),
                lambda *x: reference(x[0], x[1], x[2], layout, scale=small.scale),
                small.inputs(layout.length, session.device),
                NAMES,
                baseline=True,
            ),
        )
        leaves = problem.inputs(problem.streams.tokens, session.device)
        return session.clock.training(lambda: [op(*leaves)], leaves)

    return session.measured(("causal", problem), run)


def pairs_ratio(session: Session, problem: Softmax) -> float:
    """Visible (query, key) pairs of the layout per pair of the clean stream's causal attention."""
    streams: StreamSizes = session.size(problem).streams
    start, end, noisy_start, noisy_end = AttentionSchedule.from_layout(streams.layout("cpu")).intervals.to(torch.int64)
    visible = (end - start).clamp_min(0).sum() + (noisy_end - noisy_start).clamp_min(0).sum()
    causal_pairs = streams.rows * streams.tokens * (streams.tokens + 1) // 2
    return int(visible) / causal_pairs
