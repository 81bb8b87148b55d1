"""The clean stream in chunk form: dense products inside chunks, one loop over the states between them.

Per head and chunk that starts in state S0, with gam the inclusive cumulative log decay and A the strictly lower decayed
key-key products: Z = (I + A diag(beta))^-1 (v - exp(gam) k S0), D = beta Z ("corrected values"), and the next state is
exp(gam_C) S0 + (exp(gam_C - gam) k)^T D. Without the delta rule Z = v. docs/kernels.md has the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import flat_input

from .pair_decay import PairDecay, Prefixes, log_gradient, pair_decay
from .rows import PanelRows
from .schedule import StateSchedule


@flat_input
@dataclass(frozen=True)
class CleanChunks:
    """Forward results of all chunks (leading axes [N, H]) that outputs, noisy panels and the backward read."""

    decay: PairDecay
    gam: Tensor  # [C, Kg] inclusive cumulative log decay
    grown: Tensor  # [C, Kg] exp(gam): from the chunk's start to after row i
    tail: Tensor  # [C, Kg] exp(gam_C - gam): from after row i to the chunk's end
    total: Tensor  # [Kg, 1] exp(gam_C)
    vectors: Tensor  # [s, C, K] key (delta only) and query of each row
    weights: Tensor  # [s, C, C] decayed products of `vectors` with the keys
    inverse: Tensor | None  # [C, C] (I + A diag(beta))^-1, delta only
    decayed_key: Tensor | None  # [C, K] inverse @ (exp(gam) k), delta only
    values: Tensor  # [C, V] Z
    corrected: Tensor  # [C, V] D
    states: Tensor  # [K, V] S0


@dataclass(frozen=True)
class FromNoisy:
    """What the noisy panels add to the gradients of clean chunks: of S0, D, keys (column use) and gam."""

    states: Tensor
    corrected: Tensor
    k: Tensor
    gam: Tensor


def _prefixes(schedule: StateSchedule, dtype: torch.dtype) -> Prefixes:
    known = schedule.derived.get(("clean", dtype))
    if not isinstance(known, Prefixes):
        device, size = schedule.clean_token.device, schedule.chunk_size
        base = torch.zeros(size, dtype=torch.int64, device=device)
        prefix = torch.arange(1, size + 1, device=device)[None, None, None]  # [1, 1, 1, C]: row i reads columns 0..i
        known = Prefixes.build(prefix, base, base, dtype)
        schedule.derived["clean", dtype] = known
    return known


def unit_lower_inverse(strictly_lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower L [..., n, n]; the upper triangle of the argument is not read."""
    size = strictly_lower.shape[-1]
    identity = torch.eye(size, dtype=strictly_lower.dtype, device=strictly_lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(
        strictly_lower, identity.expand_as(strictly_lower), upper=False, unitriangular=True
    )
    return inverse


def forward(rows: PanelRows, schedule: StateSchedule, *, delta: bool, initial_state: Tensor | None) -> CleanChunks:
    """States and corrected values of all chunks. initial_state [B, H, K, V] enters where document 0 of a row starts."""
    k, v, beta = rows.k, rows.v, rows.beta
    gam = rows.g.cumsum(dim=2)
    grown, last = gam.exp(), gam[:, :, -1:]
    tail, total = (last - gam).exp(), last.exp().mT
    decay = pair_decay(gam[:, :, None], gam, _prefixes(schedule, v.dtype))
    vectors = torch.stack([k, rows.q], dim=2) if delta else rows.q[:, :, None]
    weights = decay.product(vectors, k)

    states = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=v.dtype, device=v.device)
    if initial_state is not None:
        states.index_copy_(0, schedule.first_chunk, initial_state.index_select(0, schedule.first_row))
    to_state = (k * (tail * beta)).mT  # [K, C]
    inverse = decayed_key = None
    if delta:
        weights[:, :, 0].diagonal(dim1=-2, dim2=-1).zero_()
        inverse = unit_lower_inverse(weights[:, :, 0] * beta.mT)
        values, decayed_key = inverse @ v, inverse @ (k * grown)
    else:
        values, increments = v, to_state @ v
    for begin, end, carried in steps(schedule):
        if delta:
            assert decayed_key is not None
            values[begin:end] -= decayed_key[begin:end] @ states[begin:end]
        if carried:
            here, there = slice(begin, begin + carried), slice(end, end + carried)
            added = to_state[here] @ values[here] if delta else increments[here]
            torch.addcmul(added, states[here], total[here], out=states[there])
    return CleanChunks(
        decay, gam, grown, tail, total, vectors, weights, inverse, decayed_key, values, values * beta, states
    )


def steps(schedule: StateSchedule) -> list[tuple[int, int, int]]:
    """Per step of the state loop: first chunk, one past the last chunk, and how many documents go on to the next
    step."""
    counts, begin, out = schedule.step_counts, 0, []
    for i, count in enumerate(counts):
        out.append((begin, begin + count, counts[i + 1] if i + 1 < len(counts) else 0))
        begin += count
    return out


def outputs(rows: PanelRows, chunks: CleanChunks, scale: float) -> Tensor:
    """[N, H, C, V]"""
    return ((rows.q * chunks.grown) @ chunks.states).add_(chunks.weights[:, :, -1] @ chunks.corrected).mul_(scale)


def _walk_back(
    grad_states: Tensor,
    grad_corrected: Tensor,
    k: Tensor,
    beta: Tensor,
    tail_key: Tensor,
    chunks: CleanChunks,
    schedule: StateSchedule,
) -> tuple[Tensor, Tensor | None]:
    """The loop over states, backwards; adds to `grad_states` what later chunks read.

    Returns the gradient of the state after each chunk [N, H, K, V], and that of v - R (delta rule only, else None).
    """
    grad_next, grad_values = torch.zeros_like(chunks.states), None
    if chunks.inverse is not None:
        transposed = chunks.inverse.mT
        grad_values = transposed @ (beta * grad_corrected)
        from_next = transposed @ (beta * tail_key)
        key_grown = (k * chunks.grown).mT
    for begin, end, carried in reversed(steps(schedule)):
        if carried:
            here, there = slice(begin, begin + carried), slice(end, end + carried)
            grad_next[here] = grad_states[there]
            if grad_values is not None:
                grad_values[here] += from_next[here] @ grad_next[here]
            grad_states[here] += grad_next[here] * chunks.total[here]
        if grad_values is not None:
            grad_states[begin:end] -= key_grown[begin:end] @ grad_values[begin:end]
    return grad_next, grad_values


def backward(
    grad_out: Tensor,
    rows: PanelRows,
    chunks: CleanChunks,
    noisy: FromNoisy | None,
    schedule: StateSchedule,
    *,
    scale: float,
) -> tuple[PanelRows, Tensor]:
    """Gradients of the chunk rows, and of the states that documents start in ([documents, H, K, V])."""
    q, k, beta = rows.q, rows.k, rows.beta
    grad = scale * grad_out
    query_weights = chunks.weights[:, :, -1]
    grad_corrected = query_weights.mT @ grad
    grad_states = (q * chunks.grown).mT @ grad
    if noisy is not None:
        grad_corrected += noisy.corrected
        grad_states += noisy.states
    tail_key = k * chunks.tail
    grad_next, grad_values = _walk_back(grad_states, grad_corrected, k, beta, tail_key, chunks, schedule)
    grad_corrected += tail_key @ grad_next

    corrected = chunks.corrected
    tail_grad = (corrected @ grad_next.mT) * chunks.tail
    grad_weights = torch.empty_like(chunks.weights)
    grad_weights[:, :, -1] = grad @ corrected.mT
    if grad_values is not None:
        grad_weights[:, :, 0] = -(grad_values @ corrected.mT)
        grad_weights[:, :, 0].diagonal(dim1=-2, dim2=-1).zero_()
        grad_corrected -= chunks.weights[:, :, 0].mT @ grad_values
        grad_v = grad_values
    else:
        grad_v = beta * grad_corrected
    grad_beta = (grad_corrected * chunks.values).sum(dim=-1, keepdim=True)
    by_row, grad_k = chunks.decay.backward(grad_weights, chunks.vectors, k)
    grad_k += tail_grad
    if noisy is not None:
        grad_k += noisy.k
    grad_q = by_row[:, :, -1] + (grad @ chunks.states.mT) * chunks.grown

    # every decay multiplies q or k: rows grow with gam, columns shrink with it, the chunk's end grows with gam_C
    gam = chunks.gam
    grad_gam = log_gradient(q, grad_q, gam) - log_gradient(k, grad_k, gam)
    if grad_values is not None:
        key_rows = by_row[:, :, 0] - (grad_values @ chunks.states.mT) * chunks.grown
        grad_gam += log_gradient(k, key_rows, gam)
        grad_k += key_rows
    at_end = (chunks.states * chunks.total * grad_next).sum(dim=-1)[:, :, None]  # [N, H, 1, K]
    at_end = at_end.sum(dim=-1, keepdim=True) if gam.shape[-1] == 1 else at_end
    grad_gam[:, :, -1:] += at_end + log_gradient(k, tail_grad, gam).sum(dim=2, keepdim=True)
    if noisy is not None:
        grad_gam += noisy.gam
    grad_g = grad_gam.flip(2).cumsum(dim=2).flip(2)
    starts = grad_states[: schedule.step_counts[0]] if schedule.step_counts else grad_states
    return PanelRows(grad_q, grad_k, grad_v, grad_g, grad_beta), starts
