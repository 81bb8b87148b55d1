"""Linear attention of a prefill: many clean rows on a cached state, through the forward kernels of training."""

from __future__ import annotations

import torch
from torch import Tensor

from ..panels.commit import commit
from ..reference import l2_normalise
from . import launch
from .schedule import TileSchedule


@torch.no_grad()
def linear_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    pending_k: Tensor,
    pending_d: Tensor,
    pending_g: Tensor | None,
    accepted: Tensor,
    schedule: TileSchedule,
    *,
    clean_padding: Tensor,
    scale: float,
    delta: bool,
    l2norm: bool,
) -> tuple[Tensor, ...]:
    """As `step.launch.linear_attention_step`, with its arguments and results, for any number of clean slots.

    clean_padding [B, Lc] bool: clean slots that hold no token; their pending rows are 0. Computes in float32 whatever
    the inputs are, because what it leaves pending becomes the state. Inputs are bfloat16, float16 or float32.
    """
    state = commit(state, pending_k, pending_d, pending_g, accepted)
    clean = clean_padding.shape[1]
    dtype, single = q.dtype, torch.float32
    q, k, v = q.to(single), k.to(single), v.to(single)
    out, _, saved = launch.forward(
        q, k, v, g, beta, state, schedule, scale=scale, delta=delta, l2norm=l2norm, final=False
    )
    keys, values = k[:, :clean], (saved.values if delta else v)[:, :clean]
    keys = l2_normalise(keys) if l2norm else keys
    corrected = values * beta[:, :clean, :, None].to(single)
    rows = [keys, corrected] if g is None else [keys, corrected, g[:, :clean].to(single)]
    pending = [x.masked_fill(clean_padding.view(*clean_padding.shape, *[1] * (x.ndim - 2)), 0) for x in rows]
    return (out.to(dtype), state, *pending)
