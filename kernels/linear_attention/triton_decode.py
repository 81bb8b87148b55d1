"""A decode step with Triton: one launch, or for the rows of a prefill the forward kernels of training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flarec.layout import PADDING, Layout, StepLayout

from .step.launch import linear_attention_step
from .step.schedule import StepSchedule
from .tiles.prefill import linear_attention_prefill
from .tiles.schedule import TileSchedule


def step(
    *,
    pending_g: Tensor | None = None,
    schedule: StepSchedule | TileSchedule,
    layout: Layout,
    **operands: Any,
) -> tuple[Tensor, ...]:
    """(o, state, pending_k, pending_d[, pending_g]): the arguments and meaning of `reference_step`. No gradients.

    The schedule decides: chunks (`TileSchedule`) make it a prefill. A layout that says so lets the next state take the
    place of `state`.
    """
    if isinstance(schedule, TileSchedule):
        padding = layout.clean_document == PADDING
        return linear_attention_prefill(pending_g=pending_g, schedule=schedule, clean_padding=padding, **operands)
    overwrites = isinstance(layout, StepLayout) and layout.overwrites and schedule.tiles == 1
    return linear_attention_step(
        pending_g=pending_g, schedule=schedule, clean_length=layout.clean_length, overwrites=overwrites, **operands
    )
