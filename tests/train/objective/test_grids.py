"""Grids in one row: the losses and gradients of a run of each grid alone (invariant 7 of docs/semantics.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flarec.ir.program import Program
from flarec.passes import lower
from flarec.recipe import load_recipe
from flarec.recipe.diffusion import Diffusion
from flarec.train.data.document import Document, PackedRow
from flarec.train.objective.batch import build_batch
from flarec.train.objective.head_loss import losses_of, plan_for
from flarec.train.objective.loss import Scales
from flarec.train.objective.noise import step_generator
from tests.models import FAMILIES, VOCABULARY, captured_float64
from tests.train.documents import make_document

MASK = VOCABULARY - 1
ROW = (make_document([(3, 9), (2, 4)]), make_document([(2, 7)], first=9))


def diffusion_sum(
    program: Program, documents: tuple[Document, ...], diffusion: Diffusion
) -> tuple[Tensor, int, Tensor]:
    """(sum over targets, their number, its gradient by every parameter) of the diffusion loss alone."""
    batch = build_batch([PackedRow(documents)], diffusion, MASK, step_generator(0, 0))
    scales = Scales(0.0, 1.0)
    rows, *_ = program.results(batch.input_ids, layout=batch.layout, head_rows=batch.head_rows)
    found = losses_of(rows, program, batch, plan_for(program, batch, scales), scales, suppress=MASK)
    parameters = list(program.parameters().values())
    gradients = torch.autograd.grad(found.total, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return found.total.detach(), batch.diffusion_count, torch.cat([g.flatten() for g in flat])


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_share_one_clean_stream_and_nothing_else(family: str) -> None:
    """A grid that starts `s` positions later is that of responses which begin so much later: the same blocks."""
    program = lower(captured_float64(family), "train")
    keys = ["diffusion.block_size=3", "diffusion.loss=el"]
    plain = load_recipe("draft").override(keys).diffusion
    gridded = load_recipe("draft").override([*keys, "diffusion.grids=3"]).diffusion
    total, count, gradient = diffusion_sum(program, ROW, gridded)
    each = []
    for shift in range(3):
        later = [Document(d.ids, tuple((start + shift, end) for start, end in d.responses)) for d in ROW]
        each.append(diffusion_sum(program, tuple(later), plain))
    assert count == sum(n for _, n, _ in each)
    torch.testing.assert_close(total, sum(value for value, _, _ in each), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, sum(value for _, _, value in each), rtol=1e-8, atol=1e-10)
    assert gradient.abs().max() > 1e-3
