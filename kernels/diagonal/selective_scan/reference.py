"""Selective scan (Mamba-1) as a loop over tokens: the specification (docs/semantics.md section 2).

h_t = exp(dt_t a) * h_{t-1} + (dt_t x_t) b_t^T        h [C, N], per channel a vector of N states
y_t = h_t c_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.kernels.diagonal.pending import pending_rows
from flarec.layout import BLOCK_END, PADDING, Layout


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """float32, or float64 if any operand is."""
    dtype = torch.float32
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    return dtype


def update(state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One step of the recurrence: state [C, N], x and dt [C], a [C, N], b [N]."""
    return state * (dt[:, None] * a).exp() + (dt * x)[:, None] * b


def reference(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    layout: Layout,
    *,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Output [B, T, C] in x's dtype; padding slots are 0.

    x, dt [B, T, C] (dt >= 0, after bias and softplus), a [C, N] (< 0), b, c [B, T, N].
    initial_state [B, C, N]: clean state of document 0 after `layout.cached` tokens; other documents start at zero.
    A token of a block_end block reads the state after the block's last token with its own c.
    Computes in float32, or float64 if any input is float64.
    """
    dtype = compute_dtype(x, dt, a, b, c)
    out_dtype = x.dtype
    x, dt, a, b, c = (operand.to(dtype) for operand in (x, dt, a, b, c))

    def step(state: Tensor, row: int, slot: int) -> Tensor:
        return update(state, x[row, slot], dt[row, slot], a, b[row, slot])

    zero_state = torch.zeros(a.shape, dtype=dtype, device=x.device)
    rows = []
    for row in range(layout.rows):
        outputs = [torch.zeros(a.shape[0], dtype=dtype, device=x.device)] * layout.length
        first = zero_state if initial_state is None else initial_state[row].to(dtype)
        states = {(0, int(layout.cached[row])): first}  # (document, clean tokens read) -> state
        for slot in range(layout.clean_length):
            document, position = int(layout.clean_document[row, slot]), int(layout.clean_position[row, slot])
            if document == PADDING:
                continue
            states[document, position + 1] = step(states.get((document, position), zero_state), row, slot)
            outputs[slot] = states[document, position + 1] @ c[row, slot]

        for block in range(layout.blocks):
            slots = [layout.clean_length + int(i) for i in (layout.noisy_block[row] == block).nonzero()]
            if not slots:
                continue
            document, anchor = int(layout.block_document[row, block]), int(layout.block_anchor[row, block])
            state = states[document, anchor] if (document, anchor) in states or anchor else zero_state
            block_states = []
            for slot in slots:
                state = step(state, row, slot)
                block_states.append(state)
            whole_block = int(layout.block_readout[row, block]) == BLOCK_END
            for slot, after in zip(slots, block_states, strict=True):
                outputs[slot] = (state if whole_block else after) @ c[row, slot]
        rows.append(torch.stack(outputs))
    return torch.stack(rows).to(out_dtype)


def reference_commit(
    state: Tensor, x_rows: Tensor, dt_rows: Tensor, b_rows: Tensor, a: Tensor, accepted: Tensor
) -> Tensor:
    """State [B, C, N] after the first `accepted[r]` pending rows (x, dt [B, R, C], b [B, R, N]); 0 keeps the state."""
    result = []
    for row in range(state.shape[0]):
        current = state[row]
        for slot in range(int(accepted[row])):
            operands = (x_rows[row, slot], dt_rows[row, slot], a, b_rows[row, slot])
            current = update(current, *(operand.to(state.dtype) for operand in operands))
        result.append(current)
    return torch.stack(result)


def reference_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    pending_x: Tensor,
    pending_dt: Tensor,
    pending_b: Tensor,
    accepted: Tensor,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Commit the accepted pending rows, run from that state, and leave this step's clean rows pending.

    state [B, C, N] float32; pending_x, pending_dt [B, R, C], pending_b [B, R, N]; accepted [B] int64, 0..R.
    Returns (y [B, T, C], state, pending_x, pending_dt, pending_b). Noisy tokens never change the state.
    """
    state = reference_commit(state, pending_x, pending_dt, pending_b, a, accepted)
    y = reference(x, dt, a, b, c, layout, initial_state=state)
    return (y, state, *(pending_rows(rows, layout, state.dtype) for rows in (x, dt, b)))
