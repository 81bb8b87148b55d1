"""embed-mask: the id `vocab_size` is embedded as a parameter of its own, every other id as before."""

from __future__ import annotations

import pytest
import torch

from flarec.errors import PassError
from flarec.ir.pipeline import run_pipeline
from flarec.passes.embed_mask import PARAMETER
from flarec.passes.properties import CHECKS
from tests.models import FAMILIES, VOCABULARY
from tests.passes.snippets import before_and_after, example, on_layout

ATEN = torch.ops.aten


def test_before_and_after_of_the_docstring() -> None:
    before, after = before_and_after("embed-mask", mask_vector=True)
    assert before.calls(ATEN.embedding.default)[0].args[1] is before.placeholder("input_ids")
    (where,) = after.calls(ATEN.where.self)
    column, vector, embedded = where.args
    assert column.target is ATEN.unsqueeze.default  # type: ignore[union-attr]
    assert column.args[0].args == (after.placeholder("input_ids"), VOCABULARY)  # type: ignore[union-attr]
    assert vector.target == PARAMETER  # type: ignore[union-attr]
    assert embedded.target is ATEN.embedding.default  # type: ignore[union-attr]
    assert embedded.args[1].target is ATEN.clamp.default  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vector_is_used_for_its_id_only(family: str) -> None:
    before, after = before_and_after("embed-mask", family, mask_vector=True)
    ids, layout = example()
    assert torch.equal(on_layout(before, ids, layout), on_layout(after, ids, layout))

    table = before.module.get_parameter(str(before.calls(ATEN.embedding.default)[0].args[0].target))  # type: ignore[union-attr]
    masked = ids.clone()
    masked[:, 3] = VOCABULARY
    row = table[7].clone()
    vector = after.extra[PARAMETER]
    assert vector.shape == row.shape
    assert torch.allclose(vector, table.detach().mean(0), atol=1e-6), "starts as the mean embedding"
    with torch.no_grad():
        saved = vector.clone()
        vector.copy_(row)
        logits = on_layout(after, masked, layout)
        vector.copy_(saved)
    same = ids.clone()
    same[:, 3] = 7
    assert torch.equal(logits, on_layout(before, same, layout))


def test_the_vector_is_trained_and_the_table_is_not_touched_by_it() -> None:
    _, after = before_and_after("embed-mask", "bamba", mask_vector=True)
    ids, layout = example()
    ids[:] = VOCABULARY
    logits = after(ids, layout=layout)
    table = after.module.get_parameter(str(after.calls(ATEN.embedding.default)[0].args[0].target))  # type: ignore[union-attr]
    vector_gradient, table_gradient = torch.autograd.grad(logits.sum(), [after.extra[PARAMETER], table])
    assert bool((vector_gradient != 0).any())
    assert not bool((table_gradient != 0).any())


def test_both_pipelines_share_the_vector() -> None:
    from flarec.passes import lower
    from tests.models import captured

    program = captured("bamba").clone()
    program.extra[PARAMETER] = torch.nn.Parameter(torch.zeros(64))
    for target in ("train", "decode"):
        assert lower(program, target, mask_vector=True).parameters()[PARAMETER] is program.extra[PARAMETER]


def test_nothing_happens_with_a_spare_row() -> None:
    before, after = before_and_after("embed-mask")
    assert before.op_counts() == after.op_counts()
    assert after.extra == {}


def test_a_model_that_embeds_other_ids_is_refused() -> None:
    before, _ = before_and_after("embed-mask", mask_vector=True)
    from flarec.passes.embed_mask import EmbedMask

    for node in before.calls(ATEN.embedding.default):
        with before.graph.inserting_before(node):
            copy = before.graph.call_function(ATEN.clone.default, (node.args[1],))
        node.args = (node.args[0], copy)
    with pytest.raises(PassError, match=r"pass 'embed-mask'.*'input_ids'.*spare vocabulary row"):
        run_pipeline(before, [EmbedMask(vector=True)], CHECKS)
