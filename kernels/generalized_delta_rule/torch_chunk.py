"""Fast two-stream generalised delta rule in PyTorch: chunks of clean tokens and, side by side, the blocks. Any device.

Inside a chunk the vectors u_t = S_{t-1}^T a_t solve a triangular system, so that a chunk maps the state S before it to

    T S + R      [K, K] [K, V] + [K, V]

and only these maps are walked one after the other. Exponents are sums of the log decays between two tokens of a chunk,
not differences of sums from its start: never positive, and as exact for strong decays as for weak ones. Differentiable
by autograd; products over pairs of tokens and channels are computed again in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flarec.layout import PADDING, Layout

from .reference import clean_rows, compute_dtype
from .schedule import DeltaSchedule


@dataclass(frozen=True)
class DeltaRows:
    """Tokens of chunks or blocks, [m, H, C, .]; missing ones are 0, which changes no state."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Solved:
    """u = u0 + w S for the state S [m, H, K, V] before the chunk; `read` are the pair weights of the outputs."""

    u0: Tensor
    w: Tensor
    read_b: Tensor
    read_k: Tensor


def two_stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    schedule: DeltaSchedule,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    frozen_clean: int | None = None,
) -> Tensor:
    """Output [B, T, H, V] in q's dtype; the same arguments and meaning as `reference`, with its layout's schedule.

    Differentiable in all tensors. Padding slots are never read and output 0; their gradients are 0. frozen_clean (clean
    slots per row): clean tokens take no gradient.
    """
    return _run(q, k, v, g, a, b, schedule, scale, initial_state, frozen=frozen_clean is not None)[0]


@torch.no_grad()
def step(
    *,
    state: Tensor,
    pending_k: Tensor,
    pending_v: Tensor,
    pending_g: Tensor,
    pending_b: Tensor,
    pending_u: Tensor,
    accepted: Tensor,
    schedule: DeltaSchedule,
    layout: Layout,
    scale: float,
    **operands: Tensor,
) -> tuple[Tensor, ...]:
    """(o, state, pending_k, ..., pending_u): the arguments and meaning of `reference_step`. No gradients."""
    state = commit(state, pending_k, pending_v, pending_g, pending_b, pending_u, accepted)
    out, u = _run(**operands, schedule=schedule, scale=scale, initial_state=state, frozen=False)
    return (out, state, *clean_rows(operands, layout, state.dtype), u.to(state.dtype))


def commit(
    state: Tensor, k_rows: Tensor, v_rows: Tensor, g_rows: Tensor, b_rows: Tensor, u_rows: Tensor, accepted: Tensor
) -> Tensor:
    """State [B, H, K, V] after the first accepted[r] rows; 0 rows change nothing. Later rows may hold anything.

    k_rows, g_rows, b_rows [B, R, H, K], v_rows, u_rows [B, R, H, V]; accepted [B] int64, 0..R (R may be 0).
    """
    dtype = compute_dtype(state)
    behind = (torch.arange(k_rows.shape[1], device=state.device) >= accepted[:, None])[:, :, None, None]
    rows = (rows.to(dtype).masked_fill(behind, 0).transpose(1, 2) for rows in (k_rows, v_rows, g_rows, b_rows, u_rows))
    k, v, g, b, u = rows
    weight = _behind(g).exp()
    decay = g.sum(2).exp()[..., None]
    return decay * state.to(dtype) + (weight * k).mT @ v + (weight * b).mT @ u


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    schedule: DeltaSchedule,
    scale: float,
    initial_state: Tensor | None,
    frozen: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output [B, T, H, V] in q's dtype, u of the clean slots [B, Lc, H, V])."""
    dtype = compute_dtype(q, k, v, g, a, b)
    operands = (scale * q.to(dtype), *(x.to(dtype) for x in (k, v, g, a, b)))
    state = None if initial_state is None else initial_state.to(dtype)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        clean, u, entry, out_clean = _clean(operands, schedule, state)
    parts, places = [out_clean], [schedule.chunk_token.reshape(-1)]
    if schedule.block_token.shape[0]:
        parts.append(_blocks(operands, schedule, clean, u, entry))
        places.append(schedule.block_token.reshape(-1))
    tokens = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])  # [tokens, H, V]
    flat = tokens.new_zeros(schedule.rows * schedule.length + 1, *tokens.shape[1:])
    out = flat.index_copy(0, torch.cat(places), tokens)[:-1].unflatten(0, (schedule.rows, schedule.length))
    rows, chunks, size = schedule.chunk_token.shape
    of_slots = u.transpose(1, 2).reshape(rows, chunks * size, *u.shape[1:2], u.shape[3])
    return out.to(q.dtype), of_slots[:, : schedule.clean_length]


def _clean(
    operands: tuple[Tensor, ...], schedule: DeltaSchedule, initial_state: Tensor | None
) -> tuple[DeltaRows, Tensor, Tensor, Tensor]:
    """Of the clean chunks [B * N, H, ...]: their rows, u [C, V], the states before them [K, V], outputs [C, V]."""
    rows, chunks, size = schedule.chunk_token.shape
    clean = _gather(operands, schedule.chunk_token.view(rows * chunks, size))
    document, before = schedule.chunk_document.flatten(0, 1), schedule.chunk_before.flatten()
    same = (document[:, :, None] == document[:, None]) & (document != PADDING)[:, None]
    goes_on = (document == before[:, None]) & (document != PADDING)
    solved = _solve(clean, same, goes_on)

    # the state after a chunk is that of the document of its last slot
    last = _weights(clean.g, document == document[:, -1:])
    kept = goes_on[:, -1, None, None, None] * clean.g.sum(2).exp()[..., None]
    transition = torch.diag_embed(kept[..., 0]) + (last * clean.b).mT @ solved.w
    bias = (last * clean.b).mT @ solved.u0 + (last * clean.k).mT @ clean.v
    state = clean.k.new_zeros(rows, *bias.shape[1:]) if initial_state is None else initial_state
    states = []
    for number in range(chunks):
        states.append(state)
        state = transition.unflatten(0, (rows, chunks))[:, number] @ state
        state = state + bias.unflatten(0, (rows, chunks))[:, number]
    entry = torch.stack(states, dim=1).flatten(0, 1)  # [B * N, H, K, V]

    u = solved.u0 + solved.w @ entry
    return clean, u, entry, _outputs(clean, solved, u, entry, goes_on)


def _gather(operands: tuple[Tensor, ...], token: Tensor) -> DeltaRows:
    """Rows of the tokens [m, C] from operands [B, T, H, .]."""
    taken = []
    for x in operands:
        flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
        taken.append(flat.index_select(0, token.reshape(-1)).unflatten(0, token.shape).transpose(1, 2))
    return DeltaRows(*taken)


def _before(g: Tensor) -> Tensor:
    """Sums over the tokens before each token, along dimension 2."""
    return torch.cat([torch.zeros_like(g[:, :, :1]), g[:, :, :-1]], dim=2).cumsum(2)


def _behind(g: Tensor) -> Tensor:
    """Sums over the tokens behind each token, along dimension 2."""
    return _before(g.flip(2)).flip(2)


def _pairs(rows: DeltaRows, same: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pair weights [m, H, C, C]: what a token t erases of an earlier j's b and k, what it reads of them.

    With d_tj = exp(sum of g over j+1 .. t): a_t d_{t-1,j} b_j and k_j for j < t, q_t d_tj b_j and k_j for j <= t,
    summed over channels, where same [m, C, C], else 0.
    """
    size = same.shape[-1]
    upto = torch.ones(size, size, dtype=torch.bool, device=same.device).tril()
    between = rows.g[:, :, :, None].masked_fill(~upto.tril(-1)[..., None], 0).cumsum(2)  # [m, H, t, j, K]
    earlier = torch.cat([torch.zeros_like(between[:, :, :1]), between[:, :, :-1]], dim=2)
    masks = ((same & upto.tril(-1))[:, None, :, :, None], (same & upto)[:, None, :, :, None])
    exponents = (earlier, between)
    decays = [x.masked_fill(~mask, float("-inf")).exp() for x, mask in zip(exponents, masks, strict=True)]
    a, q = (left[:, :, :, None] * decay for left, decay in zip((rows.a, rows.q), decays, strict=True))
    erase_b, erase_k, read_b, read_k = (
        torch.einsum("mhtjk,mhjk->mhtj", left, right) for left in (a, q) for right in (rows.b, rows.k)
    )
    return erase_b, erase_k, read_b, read_k


def _solve(rows: DeltaRows, same: Tensor, goes_on: Tensor) -> Solved:
    """same [m, C, C]: tokens of one document; goes_on [m, C]: tokens that read the state before the chunk."""
    recomputed = torch.is_grad_enabled()
    pairs = checkpoint(_pairs, rows, same, use_reentrant=False) if recomputed else _pairs(rows, same)
    erase_b, erase_k, read_b, read_k = pairs
    from_state = rows.a * _before(rows.g).exp() * goes_on[:, None, :, None]
    right = torch.cat([erase_k @ rows.v, from_state], dim=-1)
    system = torch.eye(same.shape[-1], dtype=right.dtype, device=right.device) - erase_b
    solution = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u0, w = solution.split([rows.v.shape[-1], rows.k.shape[-1]], dim=-1)
    return Solved(u0, w, read_b, read_k)


def _weights(g: Tensor, mask: Tensor) -> Tensor:
    """[m, H, C, K]: the decay of each token's contribution by the tokens behind it; 0 outside mask [m, C]."""
    return _behind(g).masked_fill(~mask[:, None, :, None], float("-inf")).exp()


def _outputs(rows: DeltaRows, solved: Solved, u: Tensor, state: Tensor, goes_on: Tensor) -> Tensor:
    """Each token's own state, read by its query: [m, H, C, V]."""
    from_state = rows.q * rows.g.cumsum(2).exp() * goes_on[:, None, :, None]
    return from_state @ state + solved.read_b @ u + solved.read_k @ rows.v


def _blocks(
    operands: tuple[Tensor, ...], schedule: DeltaSchedule, clean: DeltaRows, u: Tensor, entry: Tensor
) -> Tensor:
    """Outputs of the blocks [n, H, S, V], each from the clean state at its anchor."""
    chunk, inside = schedule.block_chunk, schedule.block_inside
    home = DeltaRows(*(getattr(clean, name).index_select(0, chunk) for name in ("q", "k", "v", "g", "a", "b")))
    own = schedule.block_document[:, None]
    document = schedule.chunk_document.flatten(0, 1).index_select(0, chunk)
    slots = torch.arange(document.shape[1], device=document.device)
    mask = (document == own) & (own != PADDING) & (slots < inside[:, None])
    g = home.g.masked_fill(~mask[:, None, :, None], 0)
    weight = _weights(g, mask)
    goes_on = schedule.chunk_before.flatten().index_select(0, chunk) == schedule.block_document
    start = goes_on[:, None, None, None] * g.sum(2).exp()[..., None] * entry.index_select(0, chunk)
    start = start + (weight * home.k).mT @ home.v + (weight * home.b).mT @ u.index_select(0, chunk)

    rows = _gather(operands, schedule.block_token)
    real = schedule.block_token < schedule.rows * schedule.length
    solved = _solve(rows, real[:, :, None] & real[:, None], real)
    mine = solved.u0 + solved.w @ start
    causal = _outputs(rows, solved, mine, start, real)
    left = _weights(rows.g, real)
    after = rows.g.sum(2).exp()[..., None] * start + (left * rows.k).mT @ rows.v + (left * rows.b).mT @ mine
    return torch.where(schedule.block_causal[:, None, None, None], causal, rows.q @ after)
