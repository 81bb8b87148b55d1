"""The training objective from hidden rows: head, losses, metrics and gradients a chunk of rows at a time.

Of logits [N, V] there is never more than one chunk. The gradients of hidden rows and head are computed in the forward
pass beside the losses, so that no logits are computed twice; the backward pass scales them. Values are those of
`loss` on the logits. Contract: docs/semantics.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir.program import Program
from ...kernels.row_losses import RowLosses, implementation, row_losses
from .batch import Batch
from .head_plan import HeadPlan, plan_head
from .loss import Losses, Scales, loss, measured, sums

Tail = Callable[[Tensor], Tensor]
Rows = Callable[..., RowLosses]
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 30, "cuda, fewer": 1 << 28}
"""Logits of one chunk: on a CPU what its caches hold; on a GPU so many that the head's gradient is seldom added up, and
fewer where a frozen head has none, or where float32 copies are made of them."""


def chunk_rows(vocab_size: int, device: torch.device, implementation: str, *, frozen: bool = False) -> int:
    """Rows per chunk for a vocabulary. frozen: the head has no gradient."""
    many = implementation == "triton" and not frozen
    place = device.type if device.type != "cuda" or many else "cuda, fewer"
    return max(2, CHUNK_ELEMENTS[place] // vocab_size)


def head_rows_at_once(program: Program, device: torch.device | None = None) -> int:
    """Rows of logits that are made at a time on a device, by default that of the program."""
    device = device or program.device
    if program.head is None:
        return chunk_rows(program.vocab_size, device, "torch")
    weight, _ = program.head.parameters(program.module)
    frozen = not weight.requires_grad
    return chunk_rows(program.vocab_size, device, program.head.implementation, frozen=frozen)


def plan_for(program: Program, batch: Batch, scales: Scales, rows: int | None = None) -> HeadPlan | None:
    """The plan of a batch on the host; None if the head of `program` is in its graph. rows: of logits at a time,
    instead of `head_rows_at_once`."""
    if program.head is None:
        return None
    return plan_head(batch, scales, head_rows_at_once(program) if rows is None else rows)


def losses_of(
    results: Tensor, program: Program, batch: Batch, plan: HeadPlan | None, scales: Scales, *, suppress: int | None
) -> Losses:
    """The losses of `batch` from what the graph of `program` returned for its head rows: hidden rows if there is a
    plan (`plan_for`, moved to the device), else logits."""
    if plan is None:
        return loss(results, batch, suppress=suppress, scales=scales)
    assert program.head is not None
    weight, bias = program.head.parameters(program.module)
    rows = implementation(program.head.implementation)
    return head_loss(results, weight, bias, program.head.tail, batch, plan, suppress=suppress, rows=rows)


def head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tail: Tail | None, batch: Batch, plan: HeadPlan, *,
    suppress: int | None, rows: Rows = row_losses,
) -> Losses:
    """The losses of `batch` from `hidden` [N, D] and a head: weight [V, D], bias [V], and what is done to each logit.

    plan: of the batch, on its device; it holds the weights of the losses. suppress: token id whose logit counts as
    minus infinity, or None. rows: what computes a chunk (`flarec.kernels.row_losses`).
    """
    assert len(hidden) == len(batch.head_rows), f"{len(hidden)} hidden rows for {len(batch.head_rows)} head rows"
    def by_signal(pairs: Tensor) -> Tensor:
        return pairs.new_zeros(len(batch.noisy_index)).index_copy(0, plan.signal, pairs)

    def total_of(nll: Tensor, divergence: Tensor, overlap: Tensor) -> Tensor:
        ar, diffusion = sums(batch, nll, by_signal(divergence), by_signal(overlap))
        return plan.scales.ar * ar + plan.scales.diffusion * diffusion

    total, nll, hit, divergence, overlap = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, tail, plan, partial(rows, suppress=suppress), total_of, torch.is_grad_enabled()
    )
    return measured(total, batch, nll, hit, by_signal(divergence), by_signal(overlap))


class _HeadLoss(torch.autograd.Function):
    """(loss, nll [N], hit [N], divergence [P], overlap [P]); only the loss has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tail: Tail | None, plan: HeadPlan,
        losses: Rows, total_of: Callable[[Tensor, Tensor, Tensor], Tensor], training: bool,
    ) -> tuple[Tensor, ...]:
        rows = hidden.index_select(0, plan.order)
        training = training and any(ctx.needs_input_grad[:3])
        gradients = _Gradients(rows, weight, bias, len(plan.chunks), ctx.needs_input_grad[:3]) if training else None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        nll, hit = (torch.empty(len(rows), dtype=dtype, device=rows.device) for _ in range(2))
        divergence, overlap = (torch.empty(len(plan.signal), dtype=dtype, device=rows.device) for _ in range(2))
        plan = plan.in_dtype(dtype)
        for chunk in plan.chunks:
            part, pairs = slice(chunk.start, chunk.stop), slice(chunk.first, chunk.first + chunk.pairs)
            results = F.linear(rows[part], weight, bias)
            logits = results
            if tail is not None:
                with torch.enable_grad():
                    results.requires_grad_(training)
                    logits = tail(results)
            given = logits.detach() if tail is None else logits.detach().clone()
            learns = training and chunk.learning > 0
            found = losses(given, plan.target[part], plan.weights(chunk), gradient=learns)
            nll[part], hit[part], divergence[pairs], overlap[pairs] = found.nll, found.hit, found.kl, found.overlap
            if gradients is not None and learns:
                assert found.gradient is not None
                inner, learning = found.gradient, chunk.learning
                if tail is not None:
                    with torch.enable_grad():
                        (inner,) = torch.autograd.grad(logits[:learning], results, inner)
                    inner = inner[:learning]
                gradients.add(slice(chunk.start, chunk.start + learning), inner)
        outputs = nll.index_select(0, plan.place), hit.index_select(0, plan.place), divergence, overlap
        total = total_of(outputs[0], divergence, overlap)
        if gradients is not None:
            inputs = None if gradients.rows is None else gradients.rows.index_select(0, plan.place)
            ctx.save_for_backward(inputs, gradients.weight, gradients.bias)
        ctx.mark_non_differentiable(*outputs)
        ctx.dtype = weight.dtype
        return total, *outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if x is None else torch.mul(x, grad, out=torch.empty_like(x, dtype=ctx.dtype))
            for x in ctx.saved_tensors
        ]
        return *scaled, None, None, None, None, None


class _Gradients:
    """Of hidden rows [M, D], weight [V, D] and bias [V], those that are wanted, added up over chunks; several chunks
    add up in float32. A hidden row that is never added to has none: its gradient is 0."""

    def __init__(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, chunks: int, wanted: tuple[bool, bool, bool]
    ) -> None:
        self.inputs, self.matrix = rows, weight
        self.rows = torch.zeros_like(rows) if wanted[0] else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.dtype = weight.dtype if chunks == 1 else wide
        self.with_weight = wanted[1]
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None

    def add(self, part: slice, gradient: Tensor) -> None:
        """`gradient` [n, V] of the rows `part`."""
        if self.rows is not None:
            torch.mm(gradient, self.matrix, out=self.rows[part])
        if self.with_weight:
            self.weight = _plus_product(self.weight, gradient.t(), self.inputs[part], self.dtype)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`; `total` is used up. A GPU makes wide products of bfloat16 without rounding."""
    if left.dtype == dtype:
        return torch.mm(left, right) if total is None else total.addmm_(left, right)
    if left.device.type == "cuda":
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype)
    product = (left @ right).to(dtype)
    return product if total is None else total.add_(product)
