"""Short convolution as W row gathers, without a loop over tokens; differentiable; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from flarec.layout import Layout

from .reference import apply_activation


def two_stream(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    windows: Tensor,
    *,
    activation: str | None,
    window: Tensor | None = None,
    frozen_clean: int | None = None,
) -> Tensor:
    """Convolution output [B, C, T] in x's dtype, laid out token-major in memory (`y.transpose(1, 2)` is contiguous).

    x [B, C, T], weight [C, W], bias [C] or None, windows [B, T, W] from `conv_windows`, window [B, C, W-1] as in
    `reference` (None: zeros). Padding slots output 0 and are never read. Computes in float32 (float64 for float64
    inputs). frozen_clean (clean slots per row): clean tokens take no gradient.
    """
    if frozen_clean is not None and frozen_clean < x.shape[2]:
        clean = slice(None, frozen_clean)
        with torch.no_grad():
            first = _convolve(x, weight, bias, windows[:, clean], activation, window)
        apart = torch.cat([x[:, :, clean].detach(), x[:, :, frozen_clean:]], dim=2)
        second = _convolve(apart, weight, bias, windows[:, frozen_clean:], activation, window)
        return torch.cat([first, second], dim=1).transpose(1, 2)
    return _convolve(x, weight, bias, windows, activation, window).transpose(1, 2)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, activation: str | None, window: Tensor | None
) -> Tensor:
    """[B, t, C] of the tokens that windows [B, t, W] belong to."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    past = x.new_zeros(batch, width - 1, channels) if window is None else window.to(x.dtype).transpose(1, 2)
    zero = x.new_zeros(batch, 1, channels)
    rows = torch.cat([past, x.transpose(1, 2), zero], dim=1).to(dtype).reshape(-1, channels)
    stride = width + length
    index = windows + stride * torch.arange(batch, device=x.device)[:, None, None]
    taps = weight.to(dtype).t()  # [W, C]

    out = torch.zeros(channels, dtype=dtype, device=x.device) if bias is None else bias.to(dtype)
    for lag in range(width):
        out = out + rows.index_select(0, index[:, :, lag].reshape(-1)) * taps[width - 1 - lag]
    padding = (windows[:, :, 0] == width - 1 + length).reshape(-1, 1)  # a real token reads itself at lag 0
    out = apply_activation(out, activation).masked_fill(padding, 0)
    return out.reshape(batch, windows.shape[1], channels).to(x.dtype)


def next_buffer(x: Tensor, window: Tensor, clean_length: int) -> Tensor:
    """Raw inputs [B, C, W-1+Lc] that a step keeps for its commit: the window before it and its clean slots."""
    return torch.cat([window.to(x.dtype), x[:, :, :clean_length]], dim=2)


def commit_window(buffer: Tensor, accepted: Tensor, width: int) -> Tensor:
    """The window [B, C, W-1] after the first `accepted[b]` clean slots of `buffer` [B, C, W-1+Lc]; 0 keeps the old."""
    columns = accepted[:, None] + torch.arange(width - 1, device=buffer.device)  # [B, W-1]
    return buffer.gather(2, columns[:, None, :].expand(-1, buffer.shape[1], -1))


def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffer: Tensor,
    accepted: Tensor,
    windows: Tensor,
    layout: Layout,
    *,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """(y [B, C, T], next buffer) of a decode step: the arguments and meaning of `reference_step`."""
    window = commit_window(buffer, accepted, weight.shape[-1])
    y = two_stream(x, weight, bias, windows, activation=activation, window=window)
    return y, next_buffer(x, window, layout.clean_length)
