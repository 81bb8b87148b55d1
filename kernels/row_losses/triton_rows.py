"""Losses of rows of logits in Triton: a program per pair or single row, logits read twice, gradients in their place.

A row of a large vocabulary fits into no cache, so the first walk finds the largest logit and the norm, the second
everything else. With PyTorch operations (`torch_rows`) it is about ten walks over float32 copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import MINUS_INFINITY, RowLosses


@dataclass(frozen=True)
class Launch:
    """Columns of a tile, and warps of a program. Two rows of a pair are in registers at once."""

    block: int
    warps: int


def launch_of(vocab_size: int, dtype: torch.dtype) -> Launch:
    """16 bytes a thread and row, at most 4 loads of them in flight."""
    block = min(triton.next_power_of_2(vocab_size), 16384 // dtype.itemsize)
    return Launch(block, max(1, min(16, block // 256)))


@triton.jit
def _load(base, start, vocab, suppress, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of a row in float32 (float64); the suppressed column and those beyond the end have probability 0."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < vocab
    x = tl.load(base + columns, mask=inside, other=LOWEST)
    x = x.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32)
    return tl.where(columns == suppress, LOWEST, x), columns, inside


@triton.jit
def _norm(base, target, vocab, suppress, LOWEST: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """(logarithm of the sum of exponentials, column of the largest logit (the first of equal ones), target's logit).

    The target's logit is picked here, by a sum: read on its own it could meet the gradient of a faster warp.
    """
    largest, total, place = tl.full((), float("-inf"), dtype), tl.zeros((), dtype), tl.zeros((), tl.int32)
    aim = tl.zeros((), dtype)
    for start in range(0, vocab, BLOCK):
        x, columns, _ = _load(base, start, vocab, suppress, LOWEST, BLOCK)
        aim += tl.sum(tl.where(columns == target, x, 0.0), 0)
        high, at = tl.max(x, 0, return_indices=True)
        place = tl.where(high > largest, start + at, place)
        above = tl.maximum(largest, high)
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above), 0)
        largest = above
    return largest + tl.log(total), place, aim


@triton.jit
def rows_kernel(
    logits_ptr, target_ptr, ce_ptr, kl_ptr, nll_ptr, hit_ptr, divergence_ptr, overlap_ptr,
    vocab, pairs, suppress,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Program p < pairs: student row p and teacher row pairs + p; any other: the single row pairs + p."""
    program = tl.program_id(0)
    dtype: tl.constexpr = nll_ptr.dtype.element_ty
    row = pairs + program
    base = logits_ptr + row.to(tl.int64) * vocab
    target, ce = tl.load(target_ptr + row), tl.load(ce_ptr + row)
    norm, place, aim = _norm(base, target, vocab, suppress, LOWEST, BLOCK, dtype)
    tl.store(nll_ptr + row, norm - aim)
    tl.store(hit_ptr + row, (place == target).to(dtype))
    if program < pairs:
        own_base = logits_ptr + program.to(tl.int64) * vocab
        own_target, own_ce, kl = tl.load(target_ptr + program), tl.load(ce_ptr + program), tl.load(kl_ptr + program)
        own_norm, own_place, own_aim = _norm(own_base, own_target, vocab, suppress, LOWEST, BLOCK, dtype)
        tl.store(nll_ptr + program, own_norm - own_aim)
        tl.store(hit_ptr + program, (own_place == own_target).to(dtype))
        divergence, overlap = tl.zeros((), dtype), tl.zeros((), dtype)
        for start in range(0, vocab, BLOCK):
            x, columns, inside = _load(base, start, vocab, suppress, LOWEST, BLOCK)
            y, _, _ = _load(own_base, start, vocab, suppress, LOWEST, BLOCK)
            p, q = tl.exp(x - norm), tl.exp(y - own_norm)
            divergence += tl.sum(p * ((x - norm) - (y - own_norm)), 0)
            overlap += tl.sum(tl.minimum(p, q), 0)
            if GRADIENT:
                of_teacher = ce * (p - tl.where(columns == target, 1.0, 0.0))
                of_student = own_ce * (q - tl.where(columns == own_target, 1.0, 0.0)) + kl * (q - p)
                tl.store(base + columns, of_teacher.to(base.dtype.element_ty), mask=inside)
                tl.store(own_base + columns, of_student.to(base.dtype.element_ty), mask=inside)
        tl.store(divergence_ptr + program, divergence)
        tl.store(overlap_ptr + program, overlap)
    elif GRADIENT:
        for start in range(0, vocab, BLOCK):
            x, columns, inside = _load(base, start, vocab, suppress, LOWEST, BLOCK)
            found = ce * (tl.exp(x - norm) - tl.where(columns == target, 1.0, 0.0))
            tl.store(base + columns, found.to(base.dtype.element_ty), mask=inside)


@torch.no_grad()
def row_losses(
    logits: Tensor, target: Tensor, ce: Tensor, kl: Tensor, *, suppress: int | None, gradient: bool = True
) -> RowLosses:
    """As `reference`; the gradient takes the place of the logits, which must be contiguous."""
    assert logits.is_contiguous()
    rows, vocab = logits.shape
    pairs, launch = len(kl), launch_of(vocab, logits.dtype)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    nll, hit = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(2))
    divergence, overlap = (torch.empty(pairs, dtype=dtype, device=logits.device) for _ in range(2))
    if rows:
        rows_kernel[(rows - pairs,)](
            logits, target, ce.to(dtype), kl.to(dtype), nll, hit, divergence, overlap,
            vocab, pairs, -1 if suppress is None else suppress,
            LOWEST=MINUS_INFINITY, BLOCK=launch.block, GRADIENT=gradient, num_warps=launch.warps,
        )  # fmt: skip
    return RowLosses(nll, hit, divergence, overlap, logits if gradient else None)
