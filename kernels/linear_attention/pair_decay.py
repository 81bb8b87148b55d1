"""Products of decayed row and column vectors: W[l, j] = sum_c rows[l, c] cols[j, c] exp(row_log[l, c] - col_log[j, c]).

Row l reads a prefix of its columns, j < prefix_l, and every exponent inside the prefix is <= 0. Outside it exponents can
be large and positive, so they are never exponentiated, and the exponential is never split into exp(row) * exp(-col),
which overflows float32 as soon as a partial sum of log decays passes -88.

* One decay per head: exponentiate the masked difference, one number per pair.
* One decay per channel: the number per pair and channel would not fit in memory. Split the prefix by its binary digits into
  aligned pieces of 2^p columns. Between piece end z and row and column both factors exp(row_log - col_log[z]) and
  exp(col_log[z] - col_log[j]) are <= 1, so each digit costs one dense product: log2(C) + 1 products in all.

Shapes: rows [..., s, R, K] (s vectors that share a row's place, e.g. key and query), cols [..., C, K], W [..., s, R, C],
row_log [..., s or 1, R, Kg], col_log [..., C, Kg], Kg = 1 (per head) or K (per channel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class PairDecay(Protocol):
    """Both directions of the product above."""

    def product(self, rows: Tensor, cols: Tensor) -> Tensor:
        """W [..., s, R, C]."""

    def backward(self, grad: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of rows and cols from the gradient of W (its entries outside the prefix are ignored)."""


@dataclass(frozen=True)
class Prefixes:
    """Which columns every row reads, as masks; independent of heads and values, shared by all layers.

    bias [..., 1, s or 1, R, C]: 0 where read, -inf elsewhere (the extra axis is the head axis).
    """

    prefix: Tensor  # [..., s or 1, R] int64: columns read, counted from row_base
    row_base: Tensor  # [R] int64: column index of the row's local column 0
    col_base: Tensor  # [C] int64: the same for columns
    bias: Tensor

    @staticmethod
    def build(prefix: Tensor, row_base: Tensor, col_base: Tensor, head_axis: int, dtype: torch.dtype) -> Prefixes:
        """A row reads column j if both have the same base and j - base < prefix."""
        columns = torch.arange(col_base.shape[0], device=prefix.device)
        read = (columns - col_base < prefix[..., None]) & (row_base[:, None] == col_base)
        bias = torch.zeros(read.shape, dtype=dtype, device=prefix.device).masked_fill_(~read, float("-inf"))
        return Prefixes(prefix.unsqueeze(head_axis), row_base, col_base, bias.unsqueeze(head_axis))


def pair_decay(row_log: Tensor, col_log: Tensor, prefixes: Prefixes, channels: int) -> PairDecay:
    """The decay of these log decays, per head (Kg = 1) or per channel (Kg = channels > 1)."""
    if row_log.shape[-1] == 1:
        return ScalarDecay((row_log - col_log.unsqueeze(-3).mT).add_(prefixes.bias).exp_())
    assert row_log.shape[-1] == channels
    return ChannelDecay(row_log, col_log, prefixes)


@dataclass(frozen=True)
class ScalarDecay:
    """One number per pair: `factor` [..., s or 1, R, C], 0 outside the prefix."""

    factor: Tensor

    def product(self, rows: Tensor, cols: Tensor) -> Tensor:
        stack = rows.shape[-3:-1]
        return (rows.flatten(-3, -2) @ cols.mT).unflatten(-2, stack).mul_(self.factor)

    def backward(self, grad: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        stack = rows.shape[-3:-1]
        grad = (grad * self.factor).flatten(-3, -2)
        return (grad @ cols).unflatten(-2, stack), grad.mT @ rows.flatten(-3, -2)


@dataclass(frozen=True)
class ChannelDecay:
    """One number per pair and channel, as one dense product per binary digit of the prefix."""

    row_log: Tensor
    col_log: Tensor
    prefixes: Prefixes

    def _digits(self) -> range:
        return range(int(self.prefixes.col_base.shape[0]).bit_length())

    def _factors(self, digit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row factor [..., s, R, K], column factor [..., C, K] and mask [..., s, R, C] of one digit."""
        p, columns = self.prefixes, self.col_log.shape[-2]
        column = torch.arange(columns, device=self.col_log.device)
        piece_of_row = p.prefix >> digit  # the row reads piece number (this - 1) if the digit is set
        used = (piece_of_row & 1).bool()
        row_end = (p.row_base + (piece_of_row << digit) - 1).clamp_min(0)  # last column of that piece
        piece_of_col = (column - p.col_base) >> digit
        col_end = (p.col_base + ((piece_of_col + 1) << digit) - 1).clamp_max(columns - 1)

        end = torch.broadcast_to(row_end, (*self.col_log.shape[:-2], *row_end.shape[-2:]))  # [..., s, R]
        at_end = self.col_log.gather(-2, end.flatten(-2)[..., None].expand(*end.shape[:-2], -1, self.col_log.shape[-1]))
        row_log = (self.row_log - at_end.unflatten(-2, end.shape[-2:])).masked_fill(~used[..., None], float("-inf"))
        # a piece that is cut off by the next base or the last column is read by no row; min keeps its factor finite
        col_log = (self.col_log.index_select(-2, col_end) - self.col_log).clamp_max(0)
        same = (p.row_base[:, None] == p.col_base) & (piece_of_col == piece_of_row[..., None] - 1)
        return row_log.exp(), col_log.exp(), same.to(self.col_log.dtype)

    def product(self, rows: Tensor, cols: Tensor) -> Tensor:
        stack, total = rows.shape[-3:-1], None
        for digit in self._digits():
            row, col, mask = self._factors(digit)
            part = ((rows * row).flatten(-3, -2) @ (cols * col).mT).unflatten(-2, stack) * mask
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def backward(self, grad: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        stack = rows.shape[-3:-1]
        grad_rows, grad_cols = torch.zeros_like(rows), torch.zeros_like(cols)
        for digit in self._digits():
            row, col, mask = self._factors(digit)
            part = (grad * mask).flatten(-3, -2)
            grad_rows += (part @ (cols * col)).unflatten(-2, stack) * row
            grad_cols += (part.mT @ (rows * row).flatten(-3, -2)) * col
        return grad_rows, grad_cols
