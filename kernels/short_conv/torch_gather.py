"""Short convolution as W row gathers, without a loop over tokens; differentiable; any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flarec.base.parts import requests_at_a_time
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
    if frozen_clean is None or frozen_clean == x.shape[2]:
        return _convolve(x, weight, bias, windows, activation, window).transpose(1, 2)
    old, new = windows.split([frozen_clean, x.shape[2] - frozen_clean], dim=1)
    with torch.no_grad():
        first = _convolve(x, weight, bias, old, activation, window)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        apart = torch.cat([x[:, :, :frozen_clean].detach(), x[:, :, frozen_clean:]], dim=2)
        second = _convolve(apart, weight, bias, new, activation, window)
    else:
        sums: Tensor = _NoisySums.apply(x[:, :, frozen_clean:], x.detach(), weight, bias, new, window)  # type: ignore[no-untyped-call]
        second = _activated(sums, new, x, activation)
    return torch.cat([first, second], dim=1).transpose(1, 2)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, activation: str | None, window: Tensor | None
) -> Tensor:
    """[B, t, C] of the tokens that windows [B, t, W] belong to."""
    return _activated(_sums(x, weight, bias, windows, window), windows, x, activation)


def _sums(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, window: Tensor | None) -> Tensor:
    """Sums over the taps [B * t, C], before the activation."""
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
    return out


def _activated(sums: Tensor, windows: Tensor, x: Tensor, activation: str | None) -> Tensor:
    """[B, t, C] in the dtype of x [B, C, T]; padding 0."""
    batch, channels, length = x.shape
    padding = (windows[:, :, 0] == windows.shape[2] - 1 + length).reshape(-1, 1)  # a real token reads itself at lag 0
    out = apply_activation(sums, activation).masked_fill(padding, 0)
    return out.reshape(batch, windows.shape[1], channels).to(x.dtype)


class _NoisySums(torch.autograd.Function):
    """`_sums` of noisy tokens, differentiable in these alone. noisy [B, C, Ln] are the last tokens of x [B, C, T]."""

    @staticmethod
    def forward(  # ctx is torch's own untyped object
        ctx: Any,
        noisy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        windows: Tensor,
        window: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, windows)
        ctx.shape, ctx.dtype, ctx.length = noisy.shape, noisy.dtype, x.shape[2]
        return _sums(x, weight, bias, windows, window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, windows = ctx.saved_tensors
        batch, channels, count = ctx.shape
        width = weight.shape[1]
        slot = windows - (width - 1) - (ctx.length - count)  # among noisy tokens
        first = count * torch.arange(batch, device=grad.device)[:, None, None]
        target = torch.where((slot >= 0) & (slot < count), slot + first, batch * count)
        taps = weight.to(grad.dtype).t()
        found = grad.new_zeros(batch * count + 1, channels)  # the last row takes what clean tokens would get
        for lag in reversed(range(width)):  # the order in which autograd adds
            found.index_add_(0, target[:, :, lag].reshape(-1), grad * taps[width - 1 - lag])
        noisy = found[:-1].view(batch, count, channels).transpose(1, 2)
        return noisy.to(ctx.dtype), None, None, None, None, None


def next_buffer(x: Tensor, window: Tensor, clean_length: int) -> Tensor:
    """Raw inputs [B, C, W-1+Lc] that a step keeps for its commit: the window before it and its clean slots."""
    rows = [part.transpose(1, 2) for part in (window.to(x.dtype), x[:, :, :clean_length])]
    return torch.cat(rows, dim=1).transpose(1, 2)  # channels next to each other, as models project them


def commit_window(buffer: Tensor, accepted: Tensor, width: int) -> Tensor:
    """The window [B, C, W-1] after the first `accepted[b]` clean slots of `buffer` [B, C, W-1+Lc]; 0 keeps the old."""
    batch, channels, length = buffer.shape
    first = accepted + length * torch.arange(batch, device=buffer.device)
    places = first[:, None] + torch.arange(width - 1, device=buffer.device)  # [B, W-1]
    rows = buffer.transpose(1, 2).reshape(-1, channels)  # a view of what `next_buffer` made
    return rows.index_select(0, places.reshape(-1)).view(batch, width - 1, channels).transpose(1, 2)


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
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    for part in requests_at_a_time(x.shape[0], x[0].numel() * 4, x.device):
        y[part] = _step_rows(x[part], weight, bias, windows[part], window[part], activation)
    return y.transpose(1, 2), next_buffer(x, window, layout.clean_length)


@torch.no_grad()
def _step_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, window: Tensor, activation: str | None
) -> Tensor:
    """`_convolve` without gradients: every tap is added in one pass over the sums, and a token's own is not
    gathered."""
    batch, channels, length = x.shape
    width, dtype = weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    own = x.transpose(1, 2).to(dtype)
    rows = torch.cat([window.transpose(1, 2).to(dtype), own, own.new_zeros(batch, 1, channels)], dim=1)
    first = (width + length) * torch.arange(batch, device=x.device)
    index = (windows + first[:, None, None]).view(-1, width).t().contiguous()
    taps, flat = weight.to(dtype).t(), rows.view(-1, channels)
    sums = (own * taps[-1]).reshape(-1, channels)
    if bias is not None:
        sums.add_(bias)
    for lag in range(1, width):
        sums.addcmul_(flat.index_select(0, index[lag]), taps[width - 1 - lag])
    padding = windows[:, :, 0] == width - 1 + length  # a real token reads itself at lag 0
    return apply_activation(sums, activation).masked_fill_(padding.reshape(-1, 1), 0).view(batch, length, channels)
