"""A decode step of few rows: one small triangular system per request and head, without chunks, panels and gathers.

With so few rows moving them costs more than their products. All rows of a request, clean ones first, are one matrix; a
row reads the state before the step and those rows before it that the layout shows it. G is the log decay from that
state to behind a row: the sum over the rows that it reads and itself. Names as in docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.layout import CAUSAL, Layout

from ..reference import L2_EPSILON
from .schedule import StateSchedule

MOST_ROWS = 32
"""Rows of a request up to which pairs of all of them cost less than what chunks and panels move."""


@dataclass(frozen=True)
class Reads:
    """Which rows of its request a row reads, itself among them; the first axis has size 1 where all requests agree.

    ones [B, T, T]: 1 where row l reads row j, else 0; bias [B, 1, T, T]: 0 there, else -infinity
    """

    ones: Tensor
    bias: Tensor


def reads_of(layout: Layout, schedule: StateSchedule, dtype: torch.dtype) -> Reads | None:
    """Of a step of few rows of one document each, without padding, whose blocks are causal, on the host; None for all
    others."""
    key = ("few rows", dtype)
    if key not in schedule.derived:
        schedule.derived[key] = _reads(layout, schedule, dtype)
    found = schedule.derived[key]
    assert found is None or isinstance(found, Reads)
    return found


def _reads(layout: Layout, schedule: StateSchedule, dtype: torch.dtype) -> Reads | None:
    clean, length = layout.clean_length, layout.length
    if layout.device.type != "cpu" or not 0 < clean <= length <= MOST_ROWS or schedule.tokens_padded:
        return None
    if layout.noisy_length and not bool((layout.per_noisy(layout.block_readout) == CAUSAL).all()):
        return None
    if bool(layout.token_document().any()):  # only document 0 goes on from the state
        return None
    slot, block = torch.arange(length), layout.noisy_block
    read = (slot <= slot[:, None]).repeat(layout.rows, 1, 1)
    anchor = layout.per_noisy(layout.block_anchor) - layout.cached[:, None]
    read[:, clean:, :clean] = slot[:clean] < anchor[:, :, None]
    read[:, clean:, clean:] &= block[:, :, None] == block[:, None, :]
    if bool((read == read[:1]).all()):
        read = read[:1]
    bias = torch.zeros(read.shape, dtype=dtype).masked_fill_(~read, float("-inf"))
    return Reads(read.to(dtype), bias[:, None])


@torch.no_grad()
def few_rows(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, reads: Reads, *, scale: float, delta: bool,
    l2norm: bool, initial_state: Tensor, clean_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What `two_stream_step` returns, of the same arguments: g is None or [B, T, H], and all are of one dtype."""
    batch, length, heads, width = v.shape
    keys, dim = k.shape[2:]
    vectors = v.new_empty(batch, heads, 2, length, dim)  # key and query of each row
    by_key_head = vectors.view(batch, keys, heads // keys, 2, length, dim)
    for place, x, factor in ((0, k, 1.0), (1, q, scale)):
        if l2norm:
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(L2_EPSILON).rsqrt_()
            factors = norm if factor == 1.0 else norm.mul_(factor)
            _spread(x, factors, by_key_head[:, :, :, place])
        else:
            _spread(x, factor, by_key_head[:, :, :, place])
    key = vectors[:, :, 0].flatten(0, 1)  # [B H, T, K]
    both = vectors.view(batch * heads, 2 * length, dim)
    pairs = (both @ key.mT).view(batch, heads, 2, length, length)
    read = (both @ initial_state.flatten(0, 1)).view(batch, heads, 2, length, width)
    if g is None:
        pairs.mul_(reads.ones[:, None, None])
    else:
        log = torch.matmul(reads.ones, g).transpose(1, 2)  # [B, H, T]
        decay = (log[..., None] - log[..., None, :]).add_(reads.bias).exp_()
        pairs.mul_(decay[:, :, None])
        read.mul_(log.exp()[:, :, None, :, None])

    share = beta.transpose(1, 2)[..., None]  # [B, H, T, 1]
    values = v.transpose(1, 2)
    if delta:
        values = values - read[:, :, 0]
        if length > 1:
            system = pairs[:, :, 0] * share.mT
            values = torch.linalg.solve_triangular(system, values, upper=False, unitriangular=True)
    corrected = values * share
    out = v.new_empty(batch, length, heads, width)
    inside = pairs[:, :, 1] @ corrected
    torch.add(inside, read[:, :, 1], out=out.transpose(1, 2))
    k_rows = vectors[:, :: heads // keys, 0, :clean_length].transpose(1, 2).contiguous()
    d_rows = corrected[:, :, :clean_length].transpose(1, 2).contiguous()
    return out, k_rows, d_rows, None if g is None else g[:, :clean_length].clone()


def _spread(x: Tensor, factor: Tensor | float, place: Tensor) -> None:
    """Write x [B, T, Hk, K] times its factors into place [B, Hk, heads of each, T, K]."""
    if place.shape[2] == 1:
        given = factor if isinstance(factor, float) else factor.transpose(1, 2)
        torch.mul(x.transpose(1, 2), given, out=place[:, :, 0])
    else:
        place.copy_((x * factor).transpose(1, 2)[:, :, None])
