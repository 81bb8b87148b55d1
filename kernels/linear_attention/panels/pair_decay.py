"""Products of decayed row and column vectors: W[l, j] = sum_c rows[l, c] cols[j, c] exp(row_log[l, c] - col_log[j, c]).

Row l reads a prefix of its columns, j < prefix_l, and every exponent inside the prefix is <= 0. Outside it exponents
can be large and positive, so they are never exponentiated, and the exponential is never split into exp(row) *
exp(-col), which overflows float32 as soon as a partial sum of log decays passes -88.

* One decay per head: exponentiate the masked difference, one number per pair.
* One decay per channel: the number per pair and channel would not fit in memory. Split the prefix by its binary digits
  into aligned pieces of 2^p columns. Between piece end z and row and column both factors exp(row_log - col_log[z]) and
  exp(col_log[z] - col_log[j]) are <= 1, so each digit costs one dense product: log2(C) + 1 products in all.

Shapes: rows [batch, *places, K] with any number of place axes (tiles; key and query of a row; rows), cols [batch, C,
K], W [batch, *places, C], row_log broadcastable to [batch, *places, Kg], col_log [batch, C, Kg]; Kg = 1 (per head) or
K (per channel). The batch axes are those of cols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flarec.base.flat import flat_input


class PairDecay(Protocol):
    """Both directions of the product above."""

    def product(self, rows: Tensor, cols: Tensor) -> Tensor:
        """W [batch, *places, C]."""

    def backward(self, grad: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of rows and cols from the gradient of W (its entries outside the prefix are ignored)."""

    def backward_rows(self, grad: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """That of rows alone."""


@flat_input
@dataclass(frozen=True)
class Prefixes:
    """Which columns every row reads; independent of heads and values, shared by all layers.

    bias: 0 where read, -inf elsewhere; like `prefix` it has size 1 on the head axis and on axes that share a prefix.
    """

    prefix: Tensor  # [.., *places] int64: columns read, counted from row_base
    row_base: Tensor  # [R] int64, R the last place axis: column index of the row's local column 0
    col_base: Tensor  # [C] int64: the same for columns
    bias: Tensor  # [.., *places, C]

    @staticmethod
    def build(prefix: Tensor, row_base: Tensor, col_base: Tensor, dtype: torch.dtype) -> Prefixes:
        """A row reads column j if both have the same base and j - base < prefix."""
        columns = torch.arange(col_base.shape[0], device=prefix.device)
        read = (columns - col_base < prefix[..., None]) & (row_base[:, None] == col_base)
        bias = torch.zeros(read.shape, dtype=dtype, device=prefix.device).masked_fill_(~read, float("-inf"))
        return Prefixes(prefix, row_base, col_base, bias)


def pair_decay(row_log: Tensor, col_log: Tensor, prefixes: Prefixes) -> PairDecay:
    """The decay of these log decays, per head (Kg = 1) or per channel."""
    if row_log.shape[-1] > 1:
        return ChannelDecay(row_log, col_log, prefixes)
    places = row_log.ndim - col_log.ndim + 1
    return ScalarDecay(
        (row_log - col_log.mT[(..., *[None] * (places - 1), slice(None), slice(None))]).add_(prefixes.bias).exp_()
    )


def flatten_places(x: Tensor, cols: Tensor) -> Tensor:
    """[batch, *places, D] -> [batch, all places, D]; the batch axes are those of cols [batch, C, K]."""
    return x.flatten(cols.ndim - 2, -2)


@flat_input
@dataclass(frozen=True)
class ScalarDecay:
    """One number per pair: `factor`, broadcastable to [batch, *places, C], 0 outside the prefix."""

    factor: Tensor

    def product(self, rows: Tensor, cols: Tensor) -> Tensor:
        return (flatten_places(rows, cols) @ cols.mT).view(*rows.shape[:-1], -1).mul_(self.factor)

    def backward(self, grad: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        grad = flatten_places(grad * self.factor, cols)
        return (grad @ cols).view(rows.shape), grad.mT @ flatten_places(rows, cols)

    def backward_rows(self, grad: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return (flatten_places(grad * self.factor, cols) @ cols).view(rows.shape)


@flat_input
@dataclass(frozen=True)
class ChannelDecay:
    """One number per pair and channel, as one dense product per binary digit of the prefix."""

    row_log: Tensor
    col_log: Tensor
    prefixes: Prefixes

    def _digits(self) -> range:
        return range(int(self.prefixes.col_base.shape[0]).bit_length())

    def _factors(self, digit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row factor [batch, *places, K], column factor [batch, C, K] and mask [.., *places, C] of one digit."""
        p, columns = self.prefixes, self.col_log.shape[-2]
        column = torch.arange(columns, device=self.col_log.device)
        piece_of_row = p.prefix >> digit  # the row reads piece number (this - 1) if the digit is set
        used = (piece_of_row & 1).bool()
        row_end = (p.row_base + (piece_of_row << digit) - 1).clamp_min(0)  # last column of that piece
        piece_of_col = (column - p.col_base) >> digit
        col_end = (p.col_base + ((piece_of_col + 1) << digit) - 1).clamp_max(columns - 1)

        batch, channels = self.col_log.shape[:-2], self.col_log.shape[-1]
        end = torch.broadcast_to(row_end, (*batch, *row_end.shape[len(batch) :]))
        flat_end = end.reshape(*batch, -1, 1).expand(*batch, -1, channels)
        at_end = self.col_log.gather(-2, flat_end).view(*end.shape, channels)
        row_log = (self.row_log - at_end).masked_fill(~used[..., None], float("-inf"))
        # a piece that is cut off by the next base or the last column is read by no row; clamping keeps its factor
        # finite
        col_log = (self.col_log.index_select(-2, col_end) - self.col_log).clamp_max(0)
        same = (p.row_base[:, None] == p.col_base) & (piece_of_col == piece_of_row[..., None] - 1)
        return row_log.exp(), col_log.exp(), same.to(self.col_log.dtype)

    def product(self, rows: Tensor, cols: Tensor) -> Tensor:
        total = rows.new_zeros(*rows.shape[:-1], cols.shape[-2])
        for digit in self._digits():
            row, col, mask = self._factors(digit)
            total += (flatten_places(rows * row, cols) @ (cols * col).mT).view(total.shape) * mask
        return total

    def backward(self, grad: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        grad_rows, grad_cols = torch.zeros_like(rows), torch.zeros_like(cols)
        for digit in self._digits():
            row, col, mask = self._factors(digit)
            part = flatten_places(grad * mask, cols)
            grad_rows += (part @ (cols * col)).view(rows.shape) * row
            grad_cols += (part.mT @ flatten_places(rows * row, cols)) * col
        return grad_rows, grad_cols

    def backward_rows(self, grad: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        grad_rows = torch.zeros_like(rows)
        for digit in self._digits():
            row, col, mask = self._factors(digit)
            grad_rows += (flatten_places(grad * mask, cols) @ (cols * col)).view(rows.shape) * row
        return grad_rows


def log_gradient(value: Tensor, grad: Tensor, log_decay: Tensor) -> Tensor:
    """Gradient of the log of a decay that multiplies `value`: value * grad, summed over channels if it is per head."""
    product = value * grad
    return product.sum(dim=-1, keepdim=True) if log_decay.shape[-1] == 1 else product
