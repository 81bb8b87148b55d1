"""Short causal depthwise convolution as a loop over tokens: the specification (docs/semantics.md section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flarec.errors import CaptureError
from flarec.layout import PADDING, Layout


def apply_activation(x: Tensor, activation: str | None) -> Tensor:
    """The activations that checkpoints use after their convolution: none, or SiLU (also called swish)."""
    if activation is None:
        return x
    if activation in ("silu", "swish"):
        return F.silu(x)
    raise CaptureError(f"short_conv has no activation {activation!r}; it knows None, 'silu' and 'swish'")


def lag_source(layout: Layout, row: int, slot: int, lag: int) -> tuple[str, int] | None:
    """What the token in `slot` reads at `lag`: ("slot", index), ("past", document position of document 0), or None
    (zero)."""
    if slot < layout.clean_length:
        document = int(layout.clean_document[row, slot])
        position = int(layout.clean_position[row, slot]) - lag
    else:
        noisy = slot - layout.clean_length
        block = int(layout.noisy_block[row, noisy])
        if block == PADDING:
            return None
        document, anchor = int(layout.block_document[row, block]), int(layout.block_anchor[row, block])
        position = int(layout.noisy_position[row, noisy]) - lag
        if position >= anchor:
            return "slot", slot - lag  # the block's own noisy token
    if document == PADDING or position < 0:
        return None
    if document == 0 and position < int(layout.cached[row]):
        return "past", position
    clean = zip(layout.clean_document[row].tolist(), layout.clean_position[row].tolist(), strict=True)
    return "slot", list(clean).index((document, position))


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    *,
    activation: str | None,
    window: Tensor | None = None,
) -> Tensor:
    """Convolution output [B, C, T] in x's dtype; padding slots are 0.

    x [B, C, T], weight [C, W] (the last column is lag 0), bias [C] or None.
    window [B, C, W-1]: raw inputs of document 0 at positions cached-W+1 .. cached-1 (zeros before the document starts).
    Computes in float32, or float64 for float64 inputs.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, width = weight.shape
    zero = torch.zeros(channels, dtype=dtype, device=x.device)
    rows = []
    for row in range(layout.rows):
        cached = int(layout.cached[row])
        outputs = []
        for slot in range(layout.length):
            if lag_source(layout, row, slot, 0) is None:
                outputs.append(zero)
                continue
            total = zero if bias is None else bias.to(dtype)
            for lag in range(width):
                source = lag_source(layout, row, slot, lag)
                if source is None:
                    continue
                where, index = source
                if where == "slot":
                    value = x[row, :, index]
                elif window is not None:
                    value = window[row, :, index - cached + width - 1]
                else:
                    continue
                total = total + weight[:, width - 1 - lag].to(dtype) * value.to(dtype)
            outputs.append(apply_activation(total, activation))
        rows.append(torch.stack(outputs, dim=1))
    return torch.stack(rows).to(x.dtype)


def reference_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffer: Tensor,
    accepted: Tensor,
    layout: Layout,
    *,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """(y [B, C, T], next buffer [B, C, W-1+Lc]) of a decode step.

    buffer [B, C, W-1+R]: raw inputs at the W-1 positions before the previous step and of its clean rows, of which the
    first `accepted[b]` count. The next buffer is the window that results, and this step's clean rows.
    """
    past = weight.shape[1] - 1
    window = torch.stack([buffer[row, :, count : count + past] for row, count in enumerate(accepted.tolist())])
    y = reference(x, weight, bias, layout, activation=activation, window=window)
    return y, torch.cat([window.to(x.dtype), x[:, :, : layout.clean_length]], dim=2)
