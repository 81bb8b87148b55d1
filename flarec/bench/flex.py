"""The same two-stream attention through PyTorch's flex attention, a baseline that nothing else in flarec uses.

Flex attention has no backward on the CPU and compiles anew for every shape.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..kernels.softmax_attention.reference import reference
from ..layout import CAUSAL, Layout
from .checks import check_training
from .measure import TrainingTime
from .problems import Softmax
from .session import Session


def block_mask(layout: Layout, window: int | None = None) -> BlockMask:
    """Who reads whom (docs/semantics.md section 1) as a block mask; derive it once per batch, as a schedule.

    A padding query reads itself, so that its softmax is finite.
    """
    document, position = layout.token_document(), layout.position_ids()
    padded = torch.full_like(layout.clean_document, -1)
    block = torch.cat([padded, layout.noisy_block], dim=1)
    readable = torch.cat([layout.clean_position + 1, layout.per_noisy(layout.block_anchor)], dim=1)
    causal = torch.cat([padded == -1, layout.per_noisy(layout.block_readout) == CAUSAL], dim=1)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_document = (document[row, query] == document[row, key]) & (document[row, query] >= 0)
        to_clean = (block[row, key] < 0) & (position[row, key] < readable[row, query])
        own_block = (block[row, key] >= 0) & (block[row, key] == block[row, query])
        to_noisy = own_block & (~causal[row, query] | (position[row, key] <= position[row, query]))
        mask = same_document & (to_clean | to_noisy)
        if window is not None:
            mask = mask & (position[row, key] > position[row, query] - window)
        return mask | ((document[row, query] < 0) & (query == key))

    make: Any = torch.compile(create_block_mask) if layout.device.type == "cuda" else create_block_mask
    mask: BlockMask = make(visible, layout.rows, None, layout.length, layout.length, device=str(layout.device))
    return mask


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def flex_two_stream(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, mask: BlockMask | None = None
) -> Tensor:
    """Attention output [B, T, H, Dv]; q [B, H, T, Dqk], k [B, Hkv, T, Dqk], v [B, Hkv, T, Dv]. Pass `mask` from
    `block_mask` when timing: it does not belong to a layer. Padding must hold finite numbers; its output means nothing.
    """
    attend = _compiled() if q.device.type == "cuda" else flex_attention
    mask = block_mask(layout) if mask is None else mask
    out: Tensor = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def flex(session: Session, problem: Softmax) -> TrainingTime:
    """Forward and backward of `flex_two_stream` on the batch, its block mask made before."""
    problem = session.size(problem)

    def run() -> TrainingTime:
        small = problem.small(session.small_tokens)
        layout = small.streams.layout(session.device)
        session.check(
            f"flex attention of torch, {small.text()}",
            lambda: check_training(
                lambda *x: flex_two_stream(x[0], x[1], x[2], layout, small.scale),
                lambda *x: reference(x[0], x[1], x[2], layout, scale=small.scale),
                small.inputs(layout.length, session.device),
                ["q", "k", "v"],
                baseline=True,
            ),
        )
        layout = problem.streams.layout(session.device)
        mask = block_mask(layout)
        leaves = problem.inputs(layout.length, session.device)
        q, k, v = leaves
        return session.clock.training(lambda: [flex_two_stream(q, k, v, layout, problem.scale, mask)], leaves)

    return session.measured(("flex", problem), run)
