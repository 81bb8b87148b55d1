"""schedule-states: convolutions and recurrences read the layout; then a program over a layout is complete."""

from __future__ import annotations

import pytest
import torch

from flarec import ops
from tests.models import FAMILIES, shared_model
from tests.passes.snippets import before_and_after, example, on_layout, operands


@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_of_the_docstring(family: str) -> None:
    before, after = before_and_after("schedule-states", family)
    for mixer in (ops.SHORT_CONV, ops.LINEAR_ATTENTION):
        olds, news = before.calls(mixer.op), after.calls(mixer.call("reference"))
        assert olds and not after.calls(mixer.op)
        for was, node in zip(olds, news, strict=True):
            assert operands(node) == operands(was) | {"layout": "layout"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_references_give_the_source_model_on_every_document(family: str) -> None:
    """Before any lowering: the definition itself, against transformers."""
    _, after = before_and_after("schedule-states", family)
    ids, layout = example(seed=4)
    logits = on_layout(after, ids, layout)
    for row in range(layout.rows):
        documents = layout.clean_document[row]
        for document in documents[documents >= 0].unique():
            slots = (documents == document).nonzero().squeeze(1)
            with torch.no_grad():
                expected = shared_model(family)(ids[row, slots][None]).logits[0]
            assert torch.allclose(logits[row, slots], expected, atol=1e-4)
