"""The noisy stream in panel form: no token walk and no boundary state, every panel independent of the others.

A noisy row at an anchor reads the clean state there as the chunk's entry state S0 and the chunk's clean rows before the
anchor; its block adds a small strictly lower system (delta rule) and the in-block readout. Names as in docs/kernels.md:
t is the in-block cumulative log decay, e the log decay at which a row's query reads the block, c = gam[anchor - 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import flat_input

from .clean import CleanChunks, FromNoisy, unit_lower_inverse
from .pair_decay import PairDecay, Prefixes, log_gradient, pair_decay
from .rows import PanelRows
from .schedule import StateSchedule


@flat_input
@dataclass(frozen=True)
class NoisyPanels:
    """Forward results of all panels (leading axes [M, H]). Rows are kept by tile, [tiles, s, r, .]: R = tiles * r rows,
    and s = 2 vectors of each row, key and query (s = 1, the query, without the delta rule)."""

    key: Tensor  # [C, K] keys, corrected values and entry states of the panel's chunk
    corrected: Tensor
    states: Tensor
    anchored: Tensor  # [tiles, 1, r, Kg] exp(c): from the chunk's start to the row's anchor
    grown: Tensor  # [tiles, s, r, Kg] exp(t) for keys and exp(e) for queries
    undecayed: Tensor  # [tiles, s, r, K] key and query
    vectors: Tensor  # [tiles, s, r, K] undecayed * grown
    clean_decay: PairDecay
    clean_weights: Tensor  # [tiles, s, r, C]
    tile_decay: PairDecay
    tile_weights: Tensor  # [tiles, s, r, r]
    inverse: Tensor | None  # [tiles, r, r], delta only
    values: Tensor  # [tiles, r, V] Z
    own: Tensor  # [tiles, r, V] beta Z


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
    anchor = schedule.panel_anchor
    zeros = torch.zeros(max(size, tile_rows), dtype=torch.int64, device=device)
    by_tile = (1, -1, 1, tile_rows)  # axes H, tiles, s, r
    clean = Prefixes.build(anchor.unflatten(1, by_tile), zeros[:tile_rows], zeros[:size], dtype)

    row = torch.arange(tile_rows, device=device)
    offset, base = row % schedule.block_size, row - row % schedule.block_size
    query = torch.where(schedule.panel_causal.unflatten(1, by_tile), offset + 1, schedule.block_size)
    prefix = torch.cat([offset.expand_as(query), query], dim=3) if delta else query
    made = _Indices(
        clean=clean,
        tile=Prefixes.build(prefix, base, base, dtype),
        whole_block=~schedule.panel_causal[:, None, :, None],
        anchor_row=(anchor - 1).clamp_min(0)[:, None, :, None],
        at_start=(anchor == 0)[:, None, :, None],
    )
    schedule.derived["noisy", dtype, delta] = made
    return made


def _by_block(x: Tensor, schedule: StateSchedule) -> Tensor:
    """[M, H, R, .] -> [M, H, blocks, B, .]"""
    return x.view(*x.shape[:2], schedule.panel_slots, schedule.block_size, x.shape[3])


def _by_tile(x: Tensor, schedule: StateSchedule) -> Tensor:
    """[M, H, R, .] -> [M, H, tiles, r, .]"""
    return x.view(*x.shape[:2], -1, schedule.tile_rows, x.shape[3])


def forward(
    rows: PanelRows, clean: PanelRows, chunks: CleanChunks, schedule: StateSchedule, *, delta: bool, scale: float
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
    c = _by_tile(at_anchor.masked_fill_(index.at_start, 0), schedule)[:, :, :, None]

    def stack(key_part: Tensor, query_part: Tensor) -> Tensor:
        if not delta:
            return _by_tile(query_part, schedule)[:, :, :, None]
        return torch.stack([_by_tile(key_part, schedule), _by_tile(query_part, schedule)], dim=3)

    logs, undecayed = stack(t, e), stack(rows.k, rows.q)
    grown, anchored = logs.exp(), c.exp()
    vectors = undecayed * grown
    clean_decay = pair_decay(c, gam, index.clean)
    clean_weights = clean_decay.product(vectors, key)
    read = clean_weights.flatten(2, 4) @ corrected
    read += (vectors * anchored).flatten(2, 4) @ states
    read = read.view(*vectors.shape[:-1], -1)  # [M, H, tiles, s, r, V]: the clean state at the anchor, read by k and q

    tile_decay = pair_decay(logs, _by_tile(t, schedule), index.tile)
    tile_weights = tile_decay.product(undecayed, _by_tile(rows.k, schedule))
    values, beta, inverse = _by_tile(rows.v, schedule), _by_tile(rows.beta, schedule), None
    if delta:
        inverse = unit_lower_inverse(tile_weights[:, :, :, 0] * beta.mT)
        values = inverse @ (values - read[:, :, :, 0])
    own = values * beta
    out = tile_weights[:, :, :, -1] @ own
    out.add_(read[:, :, :, -1]).mul_(scale)
    panels = NoisyPanels(
        key,
        corrected,
        states,
        anchored,
        grown,
        undecayed,
        vectors,
        clean_decay,
        clean_weights,
        tile_decay,
        tile_weights,
        inverse,
        values,
        own,
    )
    return out.flatten(2, 3), panels


def backward(
    grad_out: Tensor,
    rows: PanelRows,
    panels: NoisyPanels,
    schedule: StateSchedule,
    *,
    scale: float,
    frozen: bool = False,
) -> tuple[PanelRows, FromNoisy | None]:
    """Gradients of the noisy rows, and their contributions to the gradients of the clean chunks (not if these are
    frozen)."""
    delta = panels.inverse is not None
    index = _indices(schedule, rows.v.dtype, delta)
    beta = _by_tile(rows.beta, schedule)
    # gradient of what key and query read from the clean state: [M, H, tiles, s, r, V]
    grad_read = rows.v.new_empty(*panels.vectors.shape[:-1], rows.v.shape[-1])
    grad = torch.mul(_by_tile(grad_out, schedule), scale, out=grad_read[:, :, :, -1])
    grad_own = panels.tile_weights[:, :, :, -1].mT @ grad
    grad_weights = torch.empty_like(panels.tile_weights)
    grad_weights[:, :, :, -1] = grad @ panels.own.mT
    if delta:
        assert panels.inverse is not None
        grad_v = panels.inverse.mT @ (beta * grad_own)
        torch.neg(grad_v, out=grad_read[:, :, :, 0])
        grad_own -= panels.tile_weights[:, :, :, 0].mT @ grad_v
        grad_weights[:, :, :, 0] = grad_read[:, :, :, 0] @ panels.own.mT
    else:
        grad_v = beta * grad_own
    grad_beta = (grad_own * panels.values).sum(dim=-1, keepdim=True)

    # through the clean state at the anchor
    flat_grad = grad_read.flatten(2, 4)
    places = panels.vectors.shape[:-1]
    grad_clean_weights = (flat_grad @ panels.corrected.mT).view(*places, -1)
    grad_key = panels.key  # not read if the clean chunks are frozen
    if frozen:
        grad_vectors = panels.clean_decay.backward_rows(grad_clean_weights, panels.vectors, panels.key)
    else:
        grad_vectors, grad_key = panels.clean_decay.backward(grad_clean_weights, panels.vectors, panels.key)
    grad_vectors.addcmul_((flat_grad @ panels.states.mT).view(*places, -1), panels.anchored)
    through_anchor = log_gradient(panels.vectors, grad_vectors, rows.g)  # gradient of c + t (key) and c + e (query)

    # inside the block: rows grow with t (key) or e (query), columns shrink with t
    by_row, by_col = panels.tile_decay.backward(grad_weights, panels.undecayed, _by_tile(rows.k, schedule))
    by_col = by_col.flatten(2, 3)
    grad_logs = log_gradient(panels.undecayed, by_row, rows.g).add_(through_anchor)
    grad_rows = by_row.addcmul_(grad_vectors, panels.grown)
    grad_q = grad_rows[:, :, :, -1].flatten(2, 3)
    grad_e = grad_logs[:, :, :, -1].flatten(2, 3)
    grad_t = -log_gradient(rows.k, by_col, rows.g)
    grad_k = by_col
    if delta:
        grad_t += grad_logs[:, :, :, 0].flatten(2, 3)
        grad_k = by_col + grad_rows[:, :, :, 0].flatten(2, 3)

    grad_g = _gate_gradient(grad_t, grad_e, index, schedule)
    found = PanelRows(grad_q, grad_k, grad_v.flatten(2, 3), grad_g, grad_beta.flatten(2, 3))
    return found, None if frozen else _for_clean(flat_grad, grad_key, through_anchor, panels, schedule)


def _for_clean(
    flat_grad: Tensor, grad_key: Tensor, through_anchor: Tensor, panels: NoisyPanels, schedule: StateSchedule
) -> FromNoisy:
    """What the panels add to the gradients of the clean chunks, from the gradient of what they read of these."""
    index = _indices(schedule, flat_grad.dtype, panels.inverse is not None)
    grad_corrected = panels.clean_weights.flatten(2, 4).mT @ flat_grad
    grad_states = (panels.vectors * panels.anchored).flatten(2, 4).mT @ flat_grad
    # columns are shared with the clean backward, which subtracts k * grad_k itself; here only the anchors' part
    grad_c = through_anchor.sum(dim=3).flatten(2, 3)
    grad_gam = grad_c.new_zeros(*grad_key.shape[:3], grad_c.shape[3])
    grad_c = grad_c.masked_fill(index.at_start, 0)
    grad_gam.scatter_add_(2, index.anchor_row.expand_as(grad_c), grad_c)

    def to_chunks(x: Tensor) -> Tensor:
        return x.new_zeros(schedule.chunks, *x.shape[1:]).index_add_(0, schedule.panel_chunk, x)

    return FromNoisy(*(to_chunks(x) for x in (grad_states, grad_corrected, grad_key, grad_gam)))


def _gate_gradient(grad_t: Tensor, grad_e: Tensor, index: _Indices, schedule: StateSchedule) -> Tensor:
    """[M, H, R, Kg]: e is t at the block's end or at the row itself; t is a cumulative sum inside the block."""
    at_end = grad_e.masked_fill(~index.whole_block, 0)
    grad_t += grad_e - at_end
    blocks = _by_block(grad_t, schedule)
    blocks[:, :, :, -1] += _by_block(at_end, schedule).sum(dim=3)
    return blocks.flip(3).cumsum(dim=3).flip(3).flatten(2, 3)
