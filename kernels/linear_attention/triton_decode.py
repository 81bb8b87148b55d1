"""A decode step with Triton: one launch, or for the rows of a prefill the forward kernels of training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flarec.layout import PADDING, Layout

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

    The schedule decides: chunks (`TileSchedule`) make it a prefill.
    """
    if isinstance(schedule, TileSchedule):
        padding = layout.clean_document == PADDING
        return linear_attention_prefill(pending_g=pending_g, schedule=schedule, clean_padding=padding, **operands)
    return linear_attention_step(pending_g=pending_g, schedule=schedule, clean_length=layout.clean_length, **operands)
