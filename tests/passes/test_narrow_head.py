"""narrow-head: logits of the wanted rows only, in their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flarec.errors import PassError
from flarec.ir.pipeline import run_pipeline
from flarec.passes.narrow_head import NarrowHead, find_head
from flarec.passes.properties import CHECKS
from tests.models import FAMILIES
from tests.passes.snippets import before_and_after, example, on_layout

ATEN = torch.ops.aten


def test_before_and_after_of_the_docstring() -> None:
    before, after = before_and_after("narrow-head")
    head = find_head(after)
    assert head is not None
    picked: Any = head.args[0]
    assert picked.target is ATEN.index_select.default
    flat, dim, rows = picked.args
    assert (dim, rows) == (0, after.placeholder("head_rows"))
    assert flat.target is ATEN.reshape.default
    assert flat.args[1] == [-1, 64]
    assert "head_rows" not in [node.name for node in before.placeholders()]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_picked_in_order(family: str) -> None:
    before, after = before_and_after("narrow-head", family)
    ids, layout = example()
    whole = on_layout(before, ids, layout).flatten(0, 1)
    rows = torch.tensor([5, 0, 5, layout.length + 2])
    picked = on_layout(after, ids, layout, rows)
    assert picked.shape == (4, 512)
    assert torch.allclose(picked, whole[rows], atol=1e-5)
    assert on_layout(after, ids, layout, rows[:0]).shape == (0, 512)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_language_model_head(family: str) -> None:
    before, _ = before_and_after("narrow-head", family)
    head = find_head(before)
    assert head is not None
    assert head.args[1].target == "lm_head.weight"  # type: ignore[union-attr]


def test_a_head_behind_a_scaling_is_found() -> None:
    before, _ = before_and_after("narrow-head")
    logits: Any = before.output_node().args[0][0]  # type: ignore[index]
    with before.graph.inserting_after(logits):
        scaled = before.graph.call_function(ATEN.mul.Tensor, (logits, 0.5))
    before.output_node().args = ((scaled,),)
    assert find_head(before) is logits


def test_an_output_that_is_no_linear_layer_is_refused() -> None:
    before, _ = before_and_after("narrow-head")
    graph, logits = before.graph, before.output_node().args[0][0]  # type: ignore[index]
    with graph.inserting_before(before.output_node()):
        summed = graph.call_function(ATEN.add.Tensor, (logits, graph.call_function(ATEN.neg.default, (logits,))))
    before.output_node().args = ((summed,),)
    with pytest.raises(PassError, match="'narrow-head' found nothing"):
        run_pipeline(before, [NarrowHead()], CHECKS)
