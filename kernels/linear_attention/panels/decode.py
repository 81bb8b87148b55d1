"""A decode step in PyTorch: commit, one pass over the step's rows, and the rows that it leaves pending. Any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flarec.layout import Layout

from .chunk import two_stream_step
from .commit import commit
from .schedule import StateSchedule


def step(
    *,
    state: Tensor,
    pending_k: Tensor,
    pending_d: Tensor,
    pending_g: Tensor | None = None,
    accepted: Tensor,
    schedule: StateSchedule,
    layout: Layout,
    **operands: Any,
) -> tuple[Tensor, ...]:
    """(o, state, pending_k, pending_d[, pending_g]): the arguments and meaning of `reference_step`. No gradients."""
    state = commit(state, pending_k, pending_d, pending_g, accepted)
    out, *rows = two_stream_step(**operands, schedule=schedule, initial_state=state, clean_length=layout.clean_length)
    return (out, state, *(row for row in rows if row is not None))
