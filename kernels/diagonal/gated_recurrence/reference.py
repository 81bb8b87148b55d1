"""Gated recurrence (RG-LRU) as a loop over tokens: the specification (docs/semantics.md section 2).

h_t = a_t * h_{t-1} + x_t        one number per channel
y_t = h_t
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


def reference(x: Tensor, a: Tensor, layout: Layout, *, initial_state: Tensor | None = None) -> Tensor:
    """Output [B, T, C] in x's dtype; padding slots are 0.

    x [B, T, C] the gated and normalised input, a [B, T, C] the decay in [0, 1]; a decay of 0 forgets everything.
    initial_state [B, C]: clean state of document 0 after `layout.cached` tokens; other documents start at zero.
    Every token of a block_end block outputs the state after the block's last token.
    Computes in float32, or float64 if any input is float64.
    """
    dtype = compute_dtype(x, a)
    out_dtype = x.dtype
    x, a = x.to(dtype), a.to(dtype)

    zero_state = torch.zeros(x.shape[2], dtype=dtype, device=x.device)
    rows = []
    for row in range(layout.rows):
        outputs = [zero_state] * layout.length
        first = zero_state if initial_state is None else initial_state[row].to(dtype)
        states = {(0, int(layout.cached[row])): first}  # (document, clean tokens read) -> state
        for slot in range(layout.clean_length):
            document, position = int(layout.clean_document[row, slot]), int(layout.clean_position[row, slot])
            if document == PADDING:
                continue
            before = states.get((document, position), zero_state)
            outputs[slot] = states[document, position + 1] = a[row, slot] * before + x[row, slot]

        for block in range(layout.blocks):
            slots = [layout.clean_length + int(i) for i in (layout.noisy_block[row] == block).nonzero()]
            if not slots:
                continue
            document, anchor = int(layout.block_document[row, block]), int(layout.block_anchor[row, block])
            state = states[document, anchor] if (document, anchor) in states or anchor else zero_state
            for slot in slots:
                outputs[slot] = state = a[row, slot] * state + x[row, slot]
            if int(layout.block_readout[row, block]) == BLOCK_END:
                for slot in slots:
                    outputs[slot] = state
        rows.append(torch.stack(outputs))
    return torch.stack(rows).to(out_dtype)


def reference_commit(state: Tensor, x_rows: Tensor, a_rows: Tensor, accepted: Tensor) -> Tensor:
    """State [B, C] after the first `accepted[r]` pending rows (x, a [B, R, C]); 0 keeps the state."""
    result = []
    for row in range(state.shape[0]):
        current = state[row]
        for slot in range(int(accepted[row])):
            current = a_rows[row, slot].to(state.dtype) * current + x_rows[row, slot].to(state.dtype)
        result.append(current)
    return torch.stack(result)


def reference_step(
    x: Tensor,
    a: Tensor,
    state: Tensor,
    pending_x: Tensor,
    pending_a: Tensor,
    accepted: Tensor,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Commit the accepted pending rows, run from that state, and leave this step's clean rows pending.

    state [B, C] float32; pending_x, pending_a [B, R, C]; accepted [B] int64, 0..R.
    Returns (y [B, T, C], state, pending_x, pending_a). Noisy tokens never change the state.
    """
    state = reference_commit(state, pending_x, pending_a, accepted)
    y = reference(x, a, layout, initial_state=state)
    return (y, state, *(pending_rows(rows, layout, state.dtype) for rows in (x, a)))
