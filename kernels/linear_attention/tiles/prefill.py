"""Linear attention of a prefill: many clean rows on a cached state, through the forward kernels of training."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..panels.commit import commit
from ..reference import l2_normalise
from . import launch
from .clean import clean_inverse_kernel, clean_outputs_kernel
from .noisy import noisy_outputs_kernel
from .prefill_states import pending_keys_kernel, prefill_states_kernel
from .problem import Problem
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

    clean_padding [B, Lc] bool: clean slots that hold no token; their pending rows are 0. Inputs are bfloat16, float16
    or float32; what is left pending is as good as float32 whatever they are, because it becomes the state.
    """
    state = commit(state, pending_k, pending_d, pending_g, accepted)
    run = _of_short_numbers if computes_in(q, k, v, g).itemsize == 2 else _in_float32
    out, *pending = run(
        q, k, v, g, beta, state, schedule, clean_padding=clean_padding, scale=scale, delta=delta, l2norm=l2norm
    )
    return (out, state, *pending)


def computes_in(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> torch.dtype:
    """The dtype of the inputs if it has 16 bits, no more than two axes of decay come with them, and products of it can
    be computed (Triton's interpreter takes the bits of bfloat16 for integers); else float32."""
    known = q.dtype == k.dtype == v.dtype and (g is None or g.ndim == 3)
    interpreted = q.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return q.dtype if known and q.dtype.itemsize == 2 and not interpreted else torch.float32


def _in_float32(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor, schedule: TileSchedule, *,
    clean_padding: Tensor, scale: float, delta: bool, l2norm: bool,
) -> tuple[Tensor, ...]:
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
    return out.to(dtype), *(_without(clean_padding, x) for x in rows)


def _of_short_numbers(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor, schedule: TileSchedule, *,
    clean_padding: Tensor, scale: float, delta: bool, l2norm: bool,
) -> tuple[Tensor, ...]:
    """16-bit rows as they lie in memory: what is left pending is as good as float32, what outputs read of it is rounded
    as in training."""
    p = Problem.of(q, v, g, schedule, delta, l2norm)
    chunks, heads, size, clean = schedule.chunks, p.heads, p.chunk_size, clean_padding.shape[1]
    q, k, v, beta = (launch.flat_tokens(x) for x in (q, k, v, beta))
    decay = None if g is None else launch.flat_tokens(g)
    values = torch.empty_like(v, memory_format=torch.contiguous_format) if delta else v
    operands = launch.operands_of(p, q, k, v, values, schedule, scale)
    launch.fill_gates(p, decay, beta, operands, schedule)
    make = torch.zeros if schedule.tokens_padded else torch.empty  # no kernel writes what belongs to padding
    kept_k, kept_d = (
        make(schedule.rows, clean, *x.shape[2:], dtype=torch.float32, device=q.device) for x in (k, v)
    )
    out = launch.new_tokens(q, schedule, heads, p.value_dim)
    operands |= {
        "states": q.new_empty(chunks, heads, p.key_dim, p.value_dim),
        "inverse": q.new_empty((chunks, heads, size, size) if delta else 0, dtype=torch.float32),
        "initial": state.contiguous(), "pending_k": kept_k, "pending_d": kept_d, "out": out, "noisy_values": values,
        "slots": schedule.length, "noisy_slots": schedule.length - clean,
    }
    if delta:
        p.launch("clean_inverse", clean_inverse_kernel, chunks * heads, operands, PRECISION="tf32x3")
    p.launch("prefill_states", prefill_states_kernel, schedule.documents * heads, operands)
    p.launch("pending_keys", pending_keys_kernel, chunks * k.shape[2], operands, KEY_HEADS=k.shape[2])
    p.launch("clean_outputs", clean_outputs_kernel, chunks * heads, operands)
    p.launch("noisy_outputs", noisy_outputs_kernel, schedule.tiles * heads, operands)
    if g is None:
        return out, kept_k, kept_d
    return out, kept_k, kept_d, _without(clean_padding, g[:, :clean].float())


def _without(padding: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, Lc, ...] with zeros in the slots that hold no token."""
    return rows.masked_fill(padding.view(*padding.shape, *[1] * (rows.ndim - 2)), 0)
