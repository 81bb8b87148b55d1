"""Where two streams that are computed apart meet and part: functions of a graph, known to the check of token-locality.

Lengths come from the position ids of one stream, [rows, Lc] or [rows, Ln]: sizes stay those of the graph's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join_streams(clean: Tensor, noisy: Tensor, dim: int) -> Tensor:
    """Clean tokens in front of noisy ones along `dim`; the clean ones without a gradient."""
    return torch.cat([clean.detach(), noisy], dim=dim)


def join_rows(clean: Tensor, noisy: Tensor, positions: Tensor) -> Tensor:
    """[rows * Lc, ...] and [rows * Ln, ...] -> [rows * T, ...], clean in front of noisy in each row; the clean ones
    without a gradient."""
    rows = positions.shape[0]
    parts = [x.reshape(rows, -1, *x.shape[1:]) for x in (clean.detach(), noisy)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def add_to_noisy(x: Tensor, noisy: Tensor, positions: Tensor, alpha: float) -> Tensor:
    """x [rows, T, ...], in place, with `alpha * noisy` [rows, Ln, ...] added to its noisy tokens; positions [rows, Ln].
    Nobody else may read x."""
    length = positions.shape[1]
    if length:
        x.narrow(1, x.shape[1] - length, length).add_(noisy, alpha=alpha)
    return x


def clean_stream(x: Tensor, positions: Tensor, dim: int) -> Tensor:
    """The clean tokens of both along `dim`, without a gradient; positions [rows, Lc]. A view."""
    return x.detach().narrow(dim, 0, positions.shape[1])


def noisy_stream(x: Tensor, positions: Tensor, dim: int) -> Tensor:
    """The noisy tokens of both along `dim`; positions [rows, Ln]. A view."""
    length = positions.shape[1]
    return x.narrow(dim, x.shape[dim] - length, length)
