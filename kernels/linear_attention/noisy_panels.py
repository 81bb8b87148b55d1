"""The noisy stream in panel form: no token walk and no boundary state, every panel independent of the others.

A noisy row at an anchor reads the clean state there as the chunk's entry state S0 and the chunk's clean rows before the
anchor; its block adds a small strictly lower system (delta rule) and the in-block readout. Names as in docs/kernel.md:
t is the in-block cumulative log decay, e the log decay at which a row's query reads the block, c = gam[anchor - 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .clean_chunks import CleanChunks, FromNoisy, unit_lower_inverse
from .pair_decay import PairDecay, Prefixes, pair_decay
from .rows import Rows
from .schedule import StateSchedule


@dataclass(frozen=True)
class NoisyPanels:
    """Forward results of all panels (leading axes [M, H]); tiles have the extra axis [tiles, ., r, .]."""

    key: Tensor  # [C, K] keys, corrected values and entry states of the panel's chunk
    corrected: Tensor
    states: Tensor
    anchored: Tensor  # [1, R, Kg] exp(c): from the chunk's start to the row's anchor
    grown: Tensor  # [s, R, Kg] exp(t) for keys (delta only) and exp(e) for queries
    vectors: Tensor  # [s, R, K] key and query, each times its `grown`
    clean_decay: PairDecay
    clean_weights: Tensor  # [s, R, C]
    tile_vectors: Tensor  # [tiles, s, r, K] key and query, undecayed
    tile_decay: PairDecay
    tile_weights: Tensor  # [tiles, s, r, r]
    inverse: Tensor | None  # [tiles, r, r], delta only
    values: Tensor  # [R, V] Z
    own: Tensor  # [R, V] beta Z


@dataclass(frozen=True)
class _Indices:
    """What the panels of a schedule share over layers."""

    clean: Prefixes
    tile: Prefixes
    whole_block: Tensor  # [M, 1, R, 1] bool
    anchor_row: Tensor  # [M, 1, R, 1] int64: the chunk row before the anchor (0 if there is none)
    at_start: Tensor  # [M, 1, R, 1] bool: anchored at the chunk's start


def _indices(schedule: StateSchedule, dtype: torch.dtype, delta: bool) -> _Indices:
    known = schedule.derived.get(("noisy", dtype, delta))
    if isinstance(known, _Indices):
        return known
    device, size, tile_rows = schedule.panel_token.device, schedule.chunk_size, schedule.tile_rows
    zeros = torch.zeros(max(size, schedule.panel_rows), dtype=torch.int64, device=device)
    anchor = schedule.panel_anchor
    clean = Prefixes.build(anchor[:, None], zeros[: schedule.panel_rows], zeros[:size], 1, dtype)

    row = torch.arange(tile_rows, device=device)
    offset, base = row % schedule.block_size, row - row % schedule.block_size
    causal = schedule.panel_causal.unflatten(1, (-1, tile_rows)) if schedule.panels else schedule.panel_causal[:, None, :0]
    query = torch.where(causal, offset + 1, schedule.block_size)[:, :, None]  # [M, tiles, 1, r]
    prefix = torch.cat([offset.expand_as(query), query], dim=2) if delta else query
    made = _Indices(
        clean=clean,
        tile=Prefixes.build(prefix, base, base, 1, dtype),
        whole_block=~schedule.panel_causal[:, None, :, None],
        anchor_row=(anchor - 1).clamp_min(0)[:, None, :, None],
        at_start=(anchor == 0)[:, None, :, None],
    )
    schedule.derived["noisy", dtype, delta] = made
    return made


def _by_block(x: Tensor, schedule: StateSchedule) -> Tensor:
    """[M, H, R, .] -> [M, H, blocks, B, .]"""
    return x.unflatten(2, (schedule.panel_slots, schedule.block_size))


def _by_tile(x: Tensor, schedule: StateSchedule) -> Tensor:
    """[M, H, R, .] -> [M, H, tiles, r, .]"""
    return x.unflatten(2, (-1, schedule.tile_rows))


def forward(
    rows: Rows, clean: Rows, chunks: CleanChunks, schedule: StateSchedule, *, delta: bool, scale: float
) -> tuple[Tensor, NoisyPanels]:
    """Outputs [M, H, R, V] of all noisy rows, and what the backward reads."""
    index = _indices(schedule, rows.v.dtype, delta)
    key, corrected, states, gam = (
        x.index_select(0, schedule.panel_chunk) for x in (clean.k, chunks.corrected, chunks.states, chunks.gam)
    )
    t = _by_block(rows.g, schedule).cumsum(dim=3)
    end = t[:, :, :, -1:].expand_as(t).flatten(2, 3)
    t = t.flatten(2, 3)
    e = torch.where(index.whole_block, end, t)
    at_anchor = gam.gather(2, index.anchor_row.expand(-1, gam.shape[1], -1, gam.shape[3]))
    c = at_anchor.masked_fill_(index.at_start, 0)[:, :, None]

    logs = torch.stack([t, e], dim=2) if delta else e[:, :, None]
    undecayed = torch.stack([rows.k, rows.q], dim=2) if delta else rows.q[:, :, None]
    grown, anchored = logs.exp(), c.exp()
    vectors = undecayed * grown
    clean_decay = pair_decay(c, gam, index.clean, key.shape[-1])
    clean_weights = clean_decay.product(vectors, key)
    read = clean_weights.flatten(2, 3) @ corrected
    read += (vectors * anchored).flatten(2, 3) @ states
    read = read.unflatten(2, (vectors.shape[2], -1))  # [M, H, s, R, V]: the clean state at the anchor, read by k and q

    tile_vectors = undecayed.unflatten(3, (-1, schedule.tile_rows)).transpose(2, 3).contiguous()
    tile_logs = logs.unflatten(3, (-1, schedule.tile_rows)).transpose(2, 3)
    tile_decay = pair_decay(tile_logs, _by_tile(t, schedule), index.tile, key.shape[-1])
    tile_weights = tile_decay.product(tile_vectors, _by_tile(rows.k, schedule))
    inverse = None
    if delta:
        inverse = unit_lower_inverse(tile_weights[:, :, :, 0] * _by_tile(rows.beta, schedule).mT)
        values = (inverse @ _by_tile(rows.v - read[:, :, 0], schedule)).flatten(2, 3)
    else:
        values = rows.v
    own = values * rows.beta
    out = (tile_weights[:, :, :, -1] @ _by_tile(own, schedule)).flatten(2, 3)
    out.add_(read[:, :, -1]).mul_(scale)
    panels = NoisyPanels(
        key, corrected, states, anchored, grown, vectors, clean_decay, clean_weights,
        tile_vectors, tile_decay, tile_weights, inverse, values, own,
    )
    return out, panels


def backward(
    grad_out: Tensor, rows: Rows, panels: NoisyPanels, schedule: StateSchedule, *, scale: float
) -> tuple[Rows, FromNoisy]:
    """Gradients of the noisy rows, and their contributions to the gradients of the clean chunks."""
    delta = panels.inverse is not None
    index = _indices(schedule, rows.v.dtype, delta)
    beta = rows.beta
    grad = scale * grad_out
    tile_grad, tile_own = _by_tile(grad, schedule), _by_tile(panels.own, schedule)
    grad_own = panels.tile_weights[:, :, :, -1].mT @ tile_grad  # [M, H, tiles, r, V]
    tile_weights_grad = torch.empty_like(panels.tile_weights)
    tile_weights_grad[:, :, :, -1] = tile_grad @ tile_own.mT
    if delta:
        assert panels.inverse is not None
        tile_v = panels.inverse.mT @ (_by_tile(beta, schedule) * grad_own)
        grad_own -= panels.tile_weights[:, :, :, 0].mT @ tile_v
        tile_weights_grad[:, :, :, 0] = -(tile_v @ tile_own.mT)
        grad_v = tile_v.flatten(2, 3)
        grad_read = torch.stack([-grad_v, grad], dim=2).flatten(2, 3)  # [M, H, s R, V]
    else:
        grad_v = beta * grad_own.flatten(2, 3)
        grad_read = grad
    grad_beta = (grad_own.flatten(2, 3) * panels.values).sum(dim=-1, keepdim=True)

    # through the clean state at the anchor
    stack = panels.vectors.shape[2:4]
    grad_vectors, grad_key = panels.clean_decay.backward(
        (grad_read @ panels.corrected.mT).unflatten(2, stack), panels.vectors, panels.key
    )
    grad_corrected = panels.clean_weights.flatten(2, 3).mT @ grad_read
    grad_states = (panels.vectors * panels.anchored).flatten(2, 3).mT @ grad_read
    grad_vectors += (grad_read @ panels.states.mT).unflatten(2, stack) * panels.anchored
    through_anchor = grad_vectors * panels.vectors  # [M, H, s, R, K]: gradient of c + t (key) and c + e (query)
    grad_vectors *= panels.grown

    # inside the block
    by_row, grad_k_cols = panels.tile_decay.backward(
        tile_weights_grad, panels.tile_vectors, _by_tile(rows.k, schedule)
    )
    by_row = by_row.transpose(2, 3).flatten(3, 4)  # [M, H, s, R, K]
    grad_k_cols = grad_k_cols.flatten(2, 3)
    grad_q = grad_vectors[:, :, -1] + by_row[:, :, -1]
    grad_e = through_anchor[:, :, -1] + rows.q * by_row[:, :, -1]
    grad_t = -rows.k * grad_k_cols
    grad_k = grad_k_cols
    if delta:
        grad_t += through_anchor[:, :, 0] + rows.k * by_row[:, :, 0]
        grad_k = grad_k_cols + grad_vectors[:, :, 0] + by_row[:, :, 0]
    grad_c = through_anchor.sum(dim=2)
    if rows.g.shape[-1] == 1:
        grad_c, grad_t, grad_e = (x.sum(dim=-1, keepdim=True) for x in (grad_c, grad_t, grad_e))

    # e is t at the block's end or at the row itself; t is a cumulative sum inside the block
    at_end = grad_e.masked_fill(~index.whole_block, 0)
    grad_t += grad_e - at_end
    blocks = _by_block(grad_t, schedule)
    blocks[:, :, :, -1] += _by_block(at_end, schedule).sum(dim=3)
    grad_g = blocks.flip(3).cumsum(dim=3).flip(3).flatten(2, 3)

    # columns are shared with the clean backward, which subtracts k * grad_k itself; here only the anchors' part
    grad_gam = torch.zeros(*grad_key.shape[:3], grad_c.shape[3], dtype=grad_c.dtype, device=grad_c.device)
    grad_c = grad_c.masked_fill(index.at_start, 0)
    grad_gam.scatter_add_(2, index.anchor_row.expand_as(grad_c), grad_c)

    def to_chunks(x: Tensor) -> Tensor:
        return torch.zeros(schedule.chunks, *x.shape[1:], dtype=x.dtype, device=x.device).index_add_(
            0, schedule.panel_chunk, x
        )

    shared = FromNoisy(*(to_chunks(x) for x in (grad_states, grad_corrected, grad_key, grad_gam)))
    return Rows(grad_q, grad_k, grad_v, grad_g, grad_beta), shared
