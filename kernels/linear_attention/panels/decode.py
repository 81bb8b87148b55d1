"""A decode step in PyTorch: commit, one pass over the step's rows, and the rows that it leaves pending. Any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flarec.layout import Layout

from .chunk import two_stream_step
from .commit import commit
from .few_rows import Reads, few_rows, reads_of
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
    given: dict[str, Any] = {"initial_state": state, "clean_length": layout.clean_length}
    reads = _few_rows(operands, state, schedule, layout)
    if reads is None:
        out, *rows = two_stream_step(**operands, schedule=schedule, **given)
    else:
        out, *rows = few_rows(**operands, reads=reads, **given)
    return (out, state, *(row for row in rows if row is not None))


def _few_rows(operands: dict[str, Any], state: Tensor, schedule: StateSchedule, layout: Layout) -> Reads | None:
    """What rows read where there are few of them, all of the state's dtype and without a decay per channel."""
    given = [operands[name] for name in ("q", "k", "v", "g", "beta") if operands[name] is not None]
    if any(x.dtype != state.dtype for x in given) or (operands["g"] is not None and operands["g"].ndim == 4):
        return None
    return reads_of(layout, schedule, state.dtype)
