"""Gathers between the token-major tensors of a model and the schedule's rows (clean chunks, noisy panels)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import flat_input

from ..reference import L2_EPSILON
from .schedule import StateSchedule


@flat_input
@dataclass(frozen=True)
class PanelRows:
    """Inputs of chunks [N, H, C, .] or panels [M, H, R, .]; padding rows are 0. g has Kg = 1 or K channels; beta 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


@flat_input
@dataclass(frozen=True)
class Gathered:
    """All rows, and what the way back needs. `q_norm`, `k_norm` [rows, 1]: reciprocal norms, None without l2norm."""

    clean: PanelRows
    noisy: PanelRows
    q_norm: Tensor | None
    k_norm: Tensor | None


def split_rows(flat: Tensor, schedule: StateSchedule, heads: int) -> tuple[Tensor, Tensor]:
    """[N*H*C + M*H*R, D] -> views [N, H, C, D] and [M, H, R, D]."""
    chunk_rows = schedule.chunks * heads * schedule.chunk_size
    return (
        flat[:chunk_rows].view(schedule.chunks, heads, schedule.chunk_size, flat.shape[1]),
        flat[chunk_rows:].view(schedule.panels, heads, schedule.panel_rows, flat.shape[1]),
    )


def join_rows(clean: Tensor, noisy: Tensor) -> Tensor:
    """The inverse of `split_rows`."""
    return torch.cat([clean.reshape(-1, clean.shape[-1]), noisy.reshape(-1, noisy.shape[-1])])


def gather(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, schedule: StateSchedule, *, l2norm: bool
) -> Gathered:
    """Rows of all inputs (shapes as in `reference`), in the dtype of v, keys and queries normalised if l2norm."""
    heads = v.shape[2]
    index = schedule.heads(heads, k.shape[2])

    def take(x: Tensor, rows: Tensor) -> Tensor:
        taken = x.reshape(-1, x.shape[-1]).index_select(0, rows)
        return taken.index_fill_(0, index.padding, 0) if schedule.rows_padded else taken

    flat_q, flat_k, flat_v = take(q, index.key), take(k, index.key), take(v, index.value)
    flat_beta = take(beta[..., None], index.value)
    per_channel = g if g is None or g.ndim == 4 else g[..., None]
    flat_g = torch.zeros_like(flat_beta) if per_channel is None else take(per_channel, index.value)
    q_norm = k_norm = None
    if l2norm:
        q_norm, k_norm = _reciprocal_norm(flat_q), _reciprocal_norm(flat_k)
        flat_q.mul_(q_norm)
        flat_k.mul_(k_norm)
    pairs = [split_rows(x, schedule, heads) for x in (flat_q, flat_k, flat_v, flat_g, flat_beta)]
    clean_rows, noisy_rows = (PanelRows(*(pair[stream] for pair in pairs)) for stream in (0, 1))
    return Gathered(clean_rows, noisy_rows, q_norm, k_norm)


def scatter(clean: Tensor, noisy: Tensor, schedule: StateSchedule, key_heads: int | None = None) -> Tensor:
    """Rows back to tokens, [B, T, H, D], padding slots 0; with key_heads, summed over heads of a key head."""
    heads = clean.shape[1]
    tokens = (schedule.rows, schedule.length, heads, clean.shape[-1])
    if schedule.chunks == 0:
        out = clean.new_zeros(tokens)
    else:
        out = join_rows(clean, noisy).index_select(0, schedule.heads(heads, key_heads or heads).token)
        if schedule.tokens_padded:
            out.view(schedule.rows * schedule.length, -1).masked_fill_(schedule.token_padding, 0)
        out = out.view(tokens)
    if key_heads is not None and key_heads != heads:
        out = out.unflatten(2, (key_heads, heads // key_heads)).sum(dim=3)
    return out


@dataclass(frozen=True)
class NoisyIndex:
    """Gathers for a backward over noisy rows alone. value [M*H*R]: them, from tokens with H heads; padding [n]: those
    without a token; token [B*T*H]: the way back, M*H*R (a row of zeros) for clean tokens and padding."""

    value: Tensor
    padding: Tensor
    token: Tensor


def noisy_index(schedule: StateSchedule, heads: int) -> NoisyIndex:
    """Computed once for a number of heads."""
    known = schedule.derived.get(("noisy rows", heads))
    if isinstance(known, NoisyIndex):
        return known
    index = schedule.heads(heads, heads)
    first, count = (heads * n for n in (schedule.chunks * schedule.chunk_size, schedule.panels * schedule.panel_rows))
    token = (index.token - first).view(-1, heads).masked_fill(schedule.token_padding, -1).reshape(-1)
    empty = (schedule.panel_token < 0)[:, None].expand(-1, heads, -1).reshape(-1)
    made = NoisyIndex(index.value[first:], empty.nonzero().squeeze(1), torch.where(token < 0, count, token))
    schedule.derived["noisy rows", heads] = made
    return made


def take_noisy(x: Tensor, schedule: StateSchedule) -> Tensor:
    """The noisy rows [M, H, R, D] of [B, T, H, D]."""
    heads = x.shape[2]
    index = noisy_index(schedule, heads)
    taken = x.reshape(-1, x.shape[-1]).index_select(0, index.value)
    if schedule.rows_padded:
        taken.index_fill_(0, index.padding, 0)
    return taken.view(schedule.panels, heads, schedule.panel_rows, x.shape[-1])


def scatter_noisy(noisy: Tensor, schedule: StateSchedule, key_heads: int | None = None) -> Tensor:
    """`scatter` with clean tokens 0."""
    heads = noisy.shape[1]
    flat = torch.cat([noisy.reshape(-1, noisy.shape[-1]), noisy.new_zeros(1, noisy.shape[-1])])
    out = flat.index_select(0, noisy_index(schedule, heads).token)
    out = out.view(schedule.rows, schedule.length, heads, noisy.shape[-1])
    if key_heads is not None and key_heads != heads:
        out = out.unflatten(2, (key_heads, heads // key_heads)).sum(dim=3)
    return out


def _reciprocal_norm(x: Tensor) -> Tensor:
    """[rows, 1]"""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().add_(L2_EPSILON).rsqrt_()


def undo_normalise(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient of the raw vector from that of unit = raw * norm, norm = rsqrt(sum raw^2 + eps)."""
    along = (unit * grad).sum(dim=-1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1).mul_(norm)
