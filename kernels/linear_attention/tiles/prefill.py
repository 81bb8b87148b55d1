"""Linear attention of a prefill: many clean rows on a cached state, through the forward kernels of training."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..panels.commit import commit
from ..reference import l2_normalise
from . import launch
from .clean import clean_outputs_kernel
from .noisy import noisy_outputs_kernel
from .prefill_kernels import pending_keys_kernel, prefill_solve_kernel, prefill_states_kernel
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
    or float32. What is left pending becomes the state: it is computed in float32, or, where all inputs are bfloat16 and
    there is no more than one decay per head, from numbers of 16 bits (`prefill_kernels`).
    """
    state = commit(state, pending_k, pending_d, pending_g, accepted)
    short = all(x.dtype == torch.bfloat16 for x in (q, k, v)) and (g is None or g.ndim == 3)
    run = _in_bfloat16 if short else _in_float32
    out, *pending = run(
        q, k, v, g, beta, state, schedule, clean_padding=clean_padding, scale=scale, delta=delta, l2norm=l2norm
    )
    return (out, state, *pending)


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


def _in_bfloat16(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor, schedule: TileSchedule, *,
    clean_padding: Tensor, scale: float, delta: bool, l2norm: bool,
) -> tuple[Tensor, ...]:
    """Rows as they lie in memory; see `prefill_kernels`."""
    dtype, device, clean = q.dtype, q.device, clean_padding.shape[1]
    if triton.knobs.runtime.interpret:  # it takes the bits of bfloat16 for integers in the kernels of training
        q, k, v = q.float(), k.float(), v.float()
    p = Problem.of(q, v, g, schedule, delta, l2norm)
    chunks, heads, size = schedule.chunks, p.heads, p.chunk_size
    q, k, v, beta = (launch.flat_tokens(x) for x in (q, k, v, beta))
    decay = None if g is None else launch.flat_tokens(g)
    values = v.new_empty(v.shape) if delta else v
    operands = launch.operands_of(p, q, k, v, values, schedule, scale)
    launch.fill_gates(p, decay, beta, operands, schedule)
    make = torch.zeros if schedule.tokens_padded else torch.empty  # no kernel writes what belongs to padding
    kept_k, kept_d = (make(schedule.rows, clean, *x.shape[2:], dtype=torch.float32, device=device) for x in (k, v))
    solved = chunks * heads if delta else 0
    operands |= {
        "states": q.new_empty(chunks, heads, p.key_dim, p.value_dim),
        "solved_k": torch.empty(solved, 2, size, p.key_dim, dtype=torch.bfloat16, device=device),
        "solved_v": torch.empty(solved, size, p.value_dim, dtype=torch.float32, device=device),
        "out": launch.new_tokens(q, schedule, heads, p.value_dim),
        "initial": state.contiguous(), "noisy_values": values, "pending_k": kept_k, "pending_d": kept_d,
        "slots": schedule.length, "noisy_slots": schedule.length - clean, "KEY_HEADS": k.shape[2],
    }
    p.launch("pending_keys", pending_keys_kernel, chunks * k.shape[2], operands)
    if delta:
        p.launch("prefill_solve", prefill_solve_kernel, solved, operands)
    p.launch("prefill_states", prefill_states_kernel, schedule.documents * heads, operands)
    p.launch("clean_outputs", clean_outputs_kernel, chunks * heads, operands)
    p.launch("noisy_outputs", noisy_outputs_kernel, schedule.tiles * heads, operands)
    rows = [kept_k, kept_d] if g is None else [kept_k, kept_d, _without(clean_padding, g[:, :clean].float())]
    return operands["out"].to(dtype), *rows


def _without(padding: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, Lc, ...] with zeros in the slots that hold no token."""
    return rows.masked_fill(padding.view(*padding.shape, *[1] * (rows.ndim - 2)), 0)
