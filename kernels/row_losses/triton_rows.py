"""Losses of rows of logits in Triton: a program per pair or single row, logits read twice, gradients in their place.

A row of a large vocabulary fits into no cache, so the first walk finds the largest logit and the norm, the second
everything else. Where a gradient depends on the whole pair or on other pairs, or a teacher has several students,
further kernels walk once more. With PyTorch operations (`torch_rows`) it is about ten walks over float32 copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .reference import MINUS_INFINITY, RowLosses, RowWeights


@dataclass(frozen=True)
class RowLaunch:
    """Columns of a tile, and warps of a program. Two rows of a pair are in registers at once."""

    block: int
    warps: int


def launch_of(vocab_size: int, dtype: torch.dtype) -> RowLaunch:
    """16 bytes a thread and row, at most 4 loads of them in flight."""
    block = min(triton.next_power_of_2(vocab_size), 16384 // dtype.itemsize)
    return RowLaunch(block, max(1, min(16, block // 256)))


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
def _alone(base, norm, target, ce, vocab, suppress, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of a row that is no student, in the place of its logits."""
    for start in range(0, vocab, BLOCK):
        x, columns, inside = _load(base, start, vocab, suppress, LOWEST, BLOCK)
        found = ce * (tl.exp(x - norm) - tl.where(columns == target, 1.0, 0.0))
        tl.store(base + columns, found.to(base.dtype.element_ty), mask=inside)


@triton.jit
def rows_kernel(
    logits_ptr, target_ptr, ce_ptr, kl_ptr, teacher_ptr, nll_ptr, hit_ptr, divergence_ptr, overlap_ptr, norm_ptr,
    lean_ptr, vocab, rows, pairs, learning, suppress,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr, KL: tl.constexpr, GRADIENT: tl.constexpr, NOW: tl.constexpr,
    LATER: tl.constexpr, SHARED: tl.constexpr,
):
    """Program p < pairs: student row p and its teacher, row rows - pairs + p; any other: the row p alone.

    GRADIENT: of single rows; NOW: of pairs, too; LATER: these are left to `pairs_kernel`, which needs norms and leans.
    SHARED: teachers have programs of their own, and `teacher` says which is whose.
    """
    program = tl.program_id(0)
    dtype: tl.constexpr = nll_ptr.dtype.element_ty
    base = logits_ptr + program.to(tl.int64) * vocab
    target, ce = tl.load(target_ptr + program), tl.load(ce_ptr + program)
    norm, place, aim = _norm(base, target, vocab, suppress, LOWEST, BLOCK, dtype)
    tl.store(nll_ptr + program, norm - aim)
    tl.store(hit_ptr + program, (place == target).to(dtype))
    tl.store(norm_ptr + program, norm)
    if program < pairs:
        row = (rows - pairs + program).to(tl.int64)
        if SHARED:
            row = tl.load(teacher_ptr + program)
        other = logits_ptr + row * vocab
        aim_row, ce_row = tl.load(target_ptr + row), tl.load(ce_ptr + row)
        norm_row, place_row, logit_row = _norm(other, aim_row, vocab, suppress, LOWEST, BLOCK, dtype)
        if not SHARED:
            tl.store(nll_ptr + row, norm_row - logit_row)
            tl.store(hit_ptr + row, (place_row == aim_row).to(dtype))
            tl.store(norm_ptr + row, norm_row)
        divergence, overlap, lean = tl.zeros((), dtype), tl.zeros((), dtype), tl.zeros((), dtype)
        kl = tl.zeros((), dtype)
        if KL:
            kl = tl.load(kl_ptr + program)
        for start in range(0, vocab, BLOCK):
            x, columns, inside = _load(other, start, vocab, suppress, LOWEST, BLOCK)
            y, _, _ = _load(base, start, vocab, suppress, LOWEST, BLOCK)
            p, q = tl.exp(x - norm_row), tl.exp(y - norm)
            overlap += tl.sum(tl.minimum(p, q), 0)
            if KL:
                divergence += tl.sum(p * ((x - norm_row) - (y - norm)), 0)
            if LATER:
                lean += tl.sum(tl.where(q > p, q, tl.where(q < p, -q, 0.0)), 0)
            if NOW:
                found = ce * (q - tl.where(columns == target, 1.0, 0.0)) + kl * (q - p)
                tl.store(base + columns, found.to(base.dtype.element_ty), mask=inside)
                if row < learning:
                    of_teacher = ce_row * (p - tl.where(columns == aim_row, 1.0, 0.0))
                    tl.store(other + columns, of_teacher.to(base.dtype.element_ty), mask=inside)
        tl.store(divergence_ptr + program, divergence)
        tl.store(overlap_ptr + program, overlap)
        if LATER:
            tl.store(lean_ptr + program, lean)
    elif GRADIENT:
        if program < learning:
            _alone(base, norm, target, ce, vocab, suppress, LOWEST, BLOCK)


@triton.jit
def pairs_kernel(
    logits_ptr, target_ptr, ce_ptr, teacher_ptr, student_ce_ptr, kl_ptr, tv_ptr, norm_ptr, lean_ptr,
    vocab, rows, pairs, learning, suppress,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
):
    """Gradients of pair p, once its weights are settled: TV by a logit is q (sign(q - p) - lean) / 2. A shared teacher
    is left to `rest_kernel`."""
    program = tl.program_id(0)
    row = (rows - pairs + program).to(tl.int64)
    if SHARED:
        row = tl.load(teacher_ptr + program)
    base, other = logits_ptr + program.to(tl.int64) * vocab, logits_ptr + row * vocab
    target, aim_row = tl.load(target_ptr + program), tl.load(target_ptr + row)
    ce, ce_row = tl.load(student_ce_ptr + program), tl.load(ce_ptr + row)
    kl, tv = tl.load(kl_ptr + program), tl.load(tv_ptr + program)
    norm, norm_row = tl.load(norm_ptr + program), tl.load(norm_ptr + row)
    lean = tl.load(lean_ptr + program)
    for start in range(0, vocab, BLOCK):
        x, columns, inside = _load(other, start, vocab, suppress, LOWEST, BLOCK)
        y, _, _ = _load(base, start, vocab, suppress, LOWEST, BLOCK)
        p, q = tl.exp(x - norm_row), tl.exp(y - norm)
        side = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0)) - lean
        found = ce * (q - tl.where(columns == target, 1.0, 0.0)) + kl * (q - p) + 0.5 * tv * q * side
        tl.store(base + columns, found.to(base.dtype.element_ty), mask=inside)
        if not SHARED:
            if row < learning:
                of_teacher = ce_row * (p - tl.where(columns == aim_row, 1.0, 0.0))
                tl.store(other + columns, of_teacher.to(base.dtype.element_ty), mask=inside)


@triton.jit
def rest_kernel(
    logits_ptr, target_ptr, ce_ptr, norm_ptr, vocab, pairs, suppress, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):
    """The gradient of row pairs + p, where all its students have been."""
    row = pairs + tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * vocab
    norm, target, ce = tl.load(norm_ptr + row), tl.load(target_ptr + row), tl.load(ce_ptr + row)
    _alone(base, norm, target, ce, vocab, suppress, LOWEST, BLOCK)


@torch.no_grad()
def row_losses(
    logits: Tensor, target: Tensor, weights: RowWeights, *, suppress: int | None, gradient: bool = True
) -> RowLosses:
    """As `reference`; the gradient takes the place of the logits, which must be contiguous."""
    assert logits.is_contiguous()
    rows, vocab = logits.shape
    pairs, learning, launch = weights.pairs, weights.rows, launch_of(vocab, logits.dtype)
    shared = weights.teacher is not None and pairs > 0
    dtype = torch.promote_types(logits.dtype, torch.float32)
    later = gradient and pairs > 0 and (weights.bends or shared)
    nll, hit, norm = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(3))
    divergence, overlap, lean = (torch.empty(pairs, dtype=dtype, device=logits.device) for _ in range(3))
    ce = weights.ce.to(dtype)
    kl = divergence if weights.kl is None else weights.kl.to(dtype)
    teacher = target if weights.teacher is None else weights.teacher
    suppressed = -1 if suppress is None else suppress
    sizes = vocab, rows, pairs, learning, suppressed
    options = {"LOWEST": MINUS_INFINITY, "BLOCK": launch.block, "num_warps": launch.warps}
    if isinstance(logits, FakeTensor):  # sizes alone are asked for: one walk that reads and writes stands for all
        return RowLosses(nll, hit, divergence, overlap, logits.neg_()[:learning] if gradient else None)
    if rows:
        rows_kernel[(rows if shared else rows - pairs,)](
            logits, target, ce, kl, teacher, nll, hit, divergence, overlap, norm, lean, *sizes,
            KL=weights.kl is not None, GRADIENT=gradient and not shared, NOW=gradient and not later, LATER=later,
            SHARED=shared, **options,
        )
    if later:
        settled = weights.settled(overlap)
        pairs_kernel[(pairs,)](logits, target, ce, teacher, *settled, norm, lean, *sizes, SHARED=shared, **options)
    if gradient and shared and learning > pairs:
        rest_kernel[(learning - pairs,)](logits, target, ce, norm, vocab, pairs, suppressed, **options)
    if weights.kl is None:
        divergence.zero_()
    return RowLosses(nll, hit, divergence, overlap, logits[:learning] if gradient else None)
