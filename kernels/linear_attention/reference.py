"""Linear attention with a decayed matrix state, as a loop over tokens: the specification (docs/semantics.md section 2).

S'  = exp(g_t) * S_{t-1}
S_t = S' + k_t (beta_t (v_t - [delta] S'^T k_t))^T
o_t = scale * S_t^T q_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.layout import BLOCK_END, PADDING, Layout

L2_EPSILON = 1e-6


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last axis, as the Gated DeltaNet models do."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + L2_EPSILON)


def update(state: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, delta: bool) -> Tensor:
    """One step of the recurrence: state [H, K, V], k [H, K], v [H, V], g None, [H] or [H, K], beta [H]."""
    if g is not None:
        state = state * (g[:, None, None] if g.ndim == 1 else g[:, :, None]).exp()
    if delta:
        v = v - torch.einsum("hkv,hk->hv", state, k)
    return state + torch.einsum("hk,hv->hkv", k, beta[:, None] * v)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    layout: Layout,
    *,
    scale: float,
    delta: bool,
    l2norm: bool,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Output [B, T, H, V] in q's dtype; padding slots are 0.

    q, k [B, T, Hk, K] (value head h reads key head h // (H // Hk)); v [B, T, H, V]; beta [B, T, H];
    g: log decay <= 0, None (no gate), [B, T, H] (per head) or [B, T, H, K] (per key channel).
    initial_state [B, H, K, V]: clean state of document 0 after `layout.cached` tokens; other documents start at zero.
    l2norm normalises q and k. Computes in float32, or float64 if any input is float64.
    """
    out, _ = _walk(q, k, v, g, beta, layout, scale=scale, delta=delta, l2norm=l2norm, initial_state=initial_state)
    return out.to(q.dtype)


def reference_states(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    layout: Layout,
    *,
    delta: bool,
    l2norm: bool,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Clean state of document 0 after the clean tokens of this layout, [B, H, K, V] (arguments as in `reference`)."""
    return _walk(k, k, v, g, beta, layout, scale=1.0, delta=delta, l2norm=l2norm, initial_state=initial_state)[1]


def _walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    layout: Layout,
    *,
    scale: float,
    delta: bool,
    l2norm: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    heads, group = v.shape[2], v.shape[2] // k.shape[2]
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    v, beta = v.to(dtype), beta.to(dtype)
    g = None if g is None else g.to(dtype)
    if l2norm:
        q, k = l2_normalise(q), l2_normalise(k)

    def step(state: Tensor, row: int, slot: int) -> Tensor:
        gate = None if g is None else g[row, slot]
        return update(state, k[row, slot], v[row, slot], gate, beta[row, slot], delta)

    def read(state: Tensor, row: int, slot: int) -> Tensor:
        return scale * torch.einsum("hkv,hk->hv", state, q[row, slot])

    zero_state = torch.zeros(heads, k.shape[3], v.shape[3], dtype=dtype, device=v.device)
    rows, finals = [], []
    for row in range(layout.rows):
        outputs = [torch.zeros(heads, v.shape[3], dtype=dtype, device=v.device)] * layout.length
        final = zero_state if initial_state is None else initial_state[row].to(dtype)
        states = {(0, int(layout.cached[row])): final}  # (document, clean tokens read) -> state
        for slot in range(layout.clean_length):
            document, position = int(layout.clean_document[row, slot]), int(layout.clean_position[row, slot])
            if document == PADDING:
                continue
            before = states.setdefault((document, position), zero_state)
            states[document, position + 1] = step(before, row, slot)
            outputs[slot] = read(states[document, position + 1], row, slot)
            if document == 0:
                final = states[document, position + 1]

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
                outputs[slot] = read(state if whole_block else after, row, slot)
        rows.append(torch.stack(outputs))
        finals.append(final)
    return torch.stack(rows), torch.stack(finals)
