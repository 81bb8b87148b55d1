"""split-head: the graph ends at the gathered rows, the head beside it gives the same logits; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from flarec.errors import PassError, PropertyError
from flarec.ir.pipeline import pipeline_text, run_pipeline
from flarec.ir.program import Program
from flarec.passes import lower, pipeline
from flarec.passes.properties import CHECKERS, CHECKS
from flarec.passes.split_head import SplitHead, head_refusal
from tests.models import captured
from tests.passes.snippets import before_and_after, example, on_layout

ATEN = torch.ops.aten


def logits_of(program: Program) -> Any:
    return program.output_node().args[0][0]  # type: ignore[index]


def test_before_and_after_of_the_docstring() -> None:
    before, after = before_and_after("split-head", "recurrent_gemma", "train")
    assert (before.outputs, after.outputs) == (("logits",), ("hidden",))
    rows = logits_of(after)
    assert rows.target is ATEN.index_select.default and after.placeholder("head_rows") in rows.all_input_nodes
    assert after.head is not None and after.head.bias is None
    assert after.head.describe() == "lm_head.weight -> div -> tanh -> mul"
    assert before.head is None, "a pass works on a copy"
    (embedding,) = after.calls(ATEN.embedding.default)
    assert embedding.args[0].target == after.head.weight, "tied to the embedding"  # type: ignore[union-attr]


def test_a_copy_has_the_head() -> None:
    _, after = before_and_after("split-head", target="train")
    copy = after.clone().clone()
    assert copy.head is not None and copy.parameters().keys() == after.parameters().keys()
    assert copy.head.parameters(copy.module)[0] is after.head.parameters(after.module)[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["qwen3_5_text", "recurrent_gemma"])
def test_logits_are_bit_equal(family: str) -> None:
    before, after = before_and_after("split-head", family, "train")
    ids, layout = example()
    rows = torch.tensor([5, 0, 7, layout.length + 2])
    assert torch.equal(on_layout(after, ids, layout, rows), on_layout(before, ids, layout, rows))
    hidden, *_ = after.results(ids, layout=layout, head_rows=rows)
    assert hidden.shape == (4, 64)


def change(program: Program, edit: Callable[[fx.Graph, fx.Node], fx.Node]) -> Program:
    """A clone whose output is what `edit` makes behind the logits."""
    program = program.clone()
    logits = logits_of(program)
    with program.graph.inserting_after(logits):
        program.output_node().args = ((edit(program.graph, logits),),)
    return program


def scaled_by_itself(graph: fx.Graph, logits: fx.Node) -> fx.Node:
    bent = graph.call_function(ATEN.tanh.default, (logits,))
    with graph.inserting_after(bent):
        return graph.call_function(ATEN.mul.Tensor, (logits, bent))


def cut(graph: fx.Graph, logits: fx.Node) -> fx.Node:
    return graph.call_function(ATEN.slice.Tensor, (logits, -1, 0, 300))


@pytest.mark.parametrize(
    ("edit", "why"), [(scaled_by_itself, "no linear layer makes the logits"), (cut, "is not elementwise")]
)
def test_what_is_not_known_stays_in_the_graph(edit: Callable[[fx.Graph, fx.Node], fx.Node], why: str) -> None:
    program = change(captured("qwen3_5_text"), edit)
    refusal = head_refusal(program)
    assert refusal is not None and why in refusal
    before = change(before_and_after("split-head", target="train")[0], edit)
    after = run_pipeline(before, [SplitHead()], CHECKS)
    assert after.head is None and after.outputs == ("logits",)
    assert after.history[-1].sites == ()
    ids, layout = example()
    rows = torch.tensor([3, 1])
    assert torch.equal(on_layout(after, ids, layout, rows), on_layout(before, ids, layout, rows))


def test_a_computed_weight_is_refused() -> None:
    program = captured("qwen3_5_text").clone()
    head = next(node for node in program.graph.nodes if node.target is ATEN.linear.default and
                node.args[1].target == "lm_head.weight")
    with program.graph.inserting_before(head):
        head.update_arg(1, program.graph.call_function(ATEN.mul.Tensor, (head.args[1], 2.0)))
    refusal = head_refusal(program)
    assert refusal is not None and "computed weight" in refusal


def test_logits_that_are_read_elsewhere_are_refused() -> None:
    program = change(captured("qwen3_5_text"), lambda g, x: g.call_function(ATEN.mul.Tensor, (x, 2.0)))
    program.output_node().args = ((logits_of(program), logits_of(program).args[0]),)
    refusal = head_refusal(program)
    assert refusal is not None and "read by more than the logits" in refusal


def test_the_implementation_is_that_of_the_mixers() -> None:
    assert "split-head()" in pipeline_text(pipeline("train"))
    stored = pipeline_text(pipeline("train", kernels="triton"))
    assert "split-head(implementation='triton')" in stored
    assert pipeline("train", kernels="torch", stored=stored) == pipeline("train")
    assert "split-head" not in pipeline_text(pipeline("decode"))
    with pytest.raises(PassError, match="unknown implementation 'cuda'"):
        run_pipeline(before_and_after("split-head", target="train")[0], [SplitHead("cuda")], CHECKS)


def test_the_pipeline_of_an_older_checkpoint_is_run_as_it_is() -> None:
    """Without what came later: its logits are made in the graph."""
    young = ("split-head", "count-experts")
    stored = "\n".join(step.text() for step in pipeline("train") if step.name not in young)
    steps = pipeline("train", stored=stored)
    assert [step.name for step in steps if step.name in young] == []
    program = lower(captured("qwen3_5_text"), "train", steps=steps)
    assert program.head is None and program.outputs == ("logits",)


def test_the_checker_sees_a_head_that_is_not_there() -> None:
    before, after = before_and_after("split-head", target="train")
    check = CHECKERS["head-split"]
    with pytest.raises(PropertyError, match="in the graph, although"):
        check(before)
    del after.module.get_submodule("lm_head").weight
    with pytest.raises(PropertyError, match=r"reads 'lm_head\.weight', which"):
        check(after)
