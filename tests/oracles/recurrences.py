"""Diagonal recurrences as folds over what a token reads, from docs/semantics.md sections 1 and 2. Imports no kernel.

The state that a token reads is the fold of its update over the tokens that it may read, in order: the clean tokens,
then those of its block. Every token folds its own path from the start; equal beginnings of paths are folded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flarec.layout import Layout
from tests.oracles.visibility import tokens, visible_slots

Path = tuple[int, ...]


def paths(layout: Layout, row: int) -> dict[int, Path]:
    """Slot of every real token -> the slots that it reads: clean ones by position, then its block's."""
    by_slot = {token.slot: token for token in tokens(layout, row)}

    def order(slot: int) -> tuple[bool, int]:
        return by_slot[slot].block is not None, by_slot[slot].position

    return {slot: tuple(sorted(seen, key=order)) for slot, seen in visible_slots(layout, row).items()}


def folded(
    layout: Layout, first: Callable[[int, int], Tensor], update: Callable[[Tensor, int, int], Tensor]
) -> dict[tuple[int, int], Tensor]:
    """(row, slot) -> the state that the token there reads.

    first(row, document): the state before the layout's first clean token; update(state, row, slot): behind a token.
    """
    states = {}
    for row in range(layout.rows):
        document = {token.slot: token.document for token in tokens(layout, row)}
        known: dict[tuple[int, Path], Tensor] = {}
        for slot, path in paths(layout, row).items():
            state = first(row, document[slot])
            for length in range(1, len(path) + 1):
                key = (document[slot], path[:length])
                if key not in known:
                    known[key] = update(state, row, path[length - 1])
                state = known[key]
            states[row, slot] = state
    return states


def spread(values: dict[tuple[int, int], Tensor], layout: Layout, like: Tensor) -> Tensor:
    """[B, T, ...] of the values, 0 on padding."""
    zero = torch.zeros_like(like)
    return torch.stack(
        [torch.stack([values.get((row, s), zero) for s in range(layout.length)]) for row in range(layout.rows)]
    )


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, layout: Layout, initial_state: Tensor
) -> Tensor:
    """y [B, T, C]; x, dt [B, T, C], a [C, N], b, c [B, T, N], initial_state [B, C, N]."""

    def first(row: int, document: int) -> Tensor:
        return initial_state[row] if document == 0 else torch.zeros_like(a)

    def update(state: Tensor, row: int, slot: int) -> Tensor:
        step = dt[row, slot, :, None]
        return torch.exp(step * a) * state + step * x[row, slot, :, None] * b[row, slot]

    states = folded(layout, first, update)
    return spread({(r, s): (state * c[r, s]).sum(1) for (r, s), state in states.items()}, layout, a[:, 0])


def gated_recurrence(x: Tensor, a: Tensor, layout: Layout, initial_state: Tensor) -> Tensor:
    """y [B, T, C]; x, a [B, T, C], initial_state [B, C]."""

    def first(row: int, document: int) -> Tensor:
        return initial_state[row] if document == 0 else torch.zeros_like(initial_state[row])

    states = folded(layout, first, lambda state, row, slot: a[row, slot] * state + x[row, slot])
    return spread(states, layout, x[0, 0])
