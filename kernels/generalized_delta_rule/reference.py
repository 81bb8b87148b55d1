"""Generalised delta rule (RWKV-7) as a loop over tokens: the specification (docs/semantics.md section 2).

S_t = exp(g_t) * S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T        S [H, K, V]
o_t = scale S_t^T q_t
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flarec.layout import BLOCK_END, PADDING, Layout


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """float32, or float64 if any operand is."""
    dtype = torch.float32
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    return dtype


def erased(state: Tensor, a: Tensor) -> Tensor:
    """What a token's vector `a` [H, K] reads from the state [H, K, V] before it: u = S^T a, [H, V]."""
    return torch.einsum("hkv,hk->hv", state, a)


def update(state: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """One step of the recurrence: state [H, K, V], k, g, b [H, K], v and u (of `erased`) [H, V]."""
    return g.exp()[..., None] * state + b[..., None] * u[:, None] + k[..., None] * v[:, None]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    layout: Layout,
    *,
    scale: float,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Output [B, T, H, V] in q's dtype; padding slots are 0.

    q, k, a, b [B, T, H, K], v [B, T, H, V], g [B, T, H, K] log decay (<= 0, finite).
    initial_state [B, H, K, V]: clean state of document 0 after `layout.cached` tokens; other documents start at zero.
    A token of a block_end block reads the state after the block's last token with its own q.
    Computes in float32, or float64 if any input is float64.
    """
    out, _ = _walk(q, k, v, g, a, b, layout, scale=scale, initial_state=initial_state)
    return out.to(q.dtype)


def _walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    layout: Layout,
    *,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(output [B, T, H, V], what clean tokens erase [B, Lc, H, V]; padding slots are 0)."""
    dtype = compute_dtype(q, k, v, g, a, b)
    q, k, v, g, a, b = (operand.to(dtype) for operand in (q, k, v, g, a, b))

    def step(state: Tensor, row: int, slot: int) -> tuple[Tensor, Tensor]:
        u = erased(state, a[row, slot])
        return update(state, k[row, slot], v[row, slot], g[row, slot], b[row, slot], u), u

    def read(state: Tensor, row: int, slot: int) -> Tensor:
        return scale * torch.einsum("hkv,hk->hv", state, q[row, slot])

    zero_state = torch.zeros(*k.shape[2:], v.shape[3], dtype=dtype, device=v.device)
    nothing = zero_state[:, 0]
    rows, reads = [], []
    for row in range(layout.rows):
        outputs, erases = [nothing] * layout.length, [nothing] * layout.clean_length
        first = zero_state if initial_state is None else initial_state[row].to(dtype)
        states = {(0, int(layout.cached[row])): first}  # (document, clean tokens read) -> state
        for slot in range(layout.clean_length):
            document, position = int(layout.clean_document[row, slot]), int(layout.clean_position[row, slot])
            if document == PADDING:
                continue
            state, erases[slot] = step(states.get((document, position), zero_state), row, slot)
            states[document, position + 1] = state
            outputs[slot] = read(state, row, slot)

        for block in range(layout.blocks):
            slots = [layout.clean_length + int(i) for i in (layout.noisy_block[row] == block).nonzero()]
            if not slots:
                continue
            document, anchor = int(layout.block_document[row, block]), int(layout.block_anchor[row, block])
            state = states[document, anchor] if (document, anchor) in states or anchor else zero_state
            block_states = []
            for slot in slots:
                state, _ = step(state, row, slot)
                block_states.append(state)
            whole_block = int(layout.block_readout[row, block]) == BLOCK_END
            for slot, after in zip(slots, block_states, strict=True):
                outputs[slot] = read(state if whole_block else after, row, slot)
        rows.append(torch.stack(outputs))
        reads.append(torch.stack(erases) if erases else nothing.new_zeros(0, *nothing.shape))
    return torch.stack(rows), torch.stack(reads)


def reference_commit(
    state: Tensor, k_rows: Tensor, v_rows: Tensor, g_rows: Tensor, b_rows: Tensor, u_rows: Tensor, accepted: Tensor
) -> Tensor:
    """State [B, H, K, V] after the first `accepted[r]` pending rows (k, g, b [B, R, H, K], v, u [B, R, H, V]); 0 keeps
    the state."""
    result = []
    for row in range(state.shape[0]):
        current = state[row]
        for slot in range(int(accepted[row])):
            operands = (rows[row, slot].to(state.dtype) for rows in (k_rows, v_rows, g_rows, b_rows, u_rows))
            current = update(current, *operands)
        result.append(current)
    return torch.stack(result)


def reference_step(
    *,
    state: Tensor,
    pending_k: Tensor,
    pending_v: Tensor,
    pending_g: Tensor,
    pending_b: Tensor,
    pending_u: Tensor,
    accepted: Tensor,
    layout: Layout,
    **operands: Any,
) -> tuple[Tensor, ...]:
    """Commit the accepted pending rows, run from that state, and leave this step's clean rows pending.

    operands: those of `reference`, by name. state [B, H, K, V] float32; pending_k, pending_g, pending_b [B, R, H, K],
    pending_v, pending_u [B, R, H, V]; accepted [B] int64, 0..R. A row's u is what it erases (`erased`), known once it
    is run, because the rows before it are accepted whenever it is.
    Returns (o [B, T, H, V], state, pending_k, pending_v, pending_g, pending_b, pending_u).
    """
    state = reference_commit(state, pending_k, pending_v, pending_g, pending_b, pending_u, accepted)
    out, u = _walk(**operands, layout=layout, initial_state=state)
    return (out.to(operands["q"].dtype), state, *clean_rows(operands, layout, state.dtype), u.to(state.dtype))


def clean_rows(operands: dict[str, Any], layout: Layout, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """k, v, g, b of the clean slots, [B, Lc, H, .] in `dtype`; padding slots hold 0."""
    padding = (layout.clean_document == PADDING)[:, :, None, None]
    return tuple(operands[name][:, : layout.clean_length].to(dtype).masked_fill(padding, 0) for name in "kvgb")
