"""Property checkers: every way to break a graph is found, and the error says where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from flarec import ops
from flarec.errors import PropertyError
from flarec.ir.pipeline import check_properties, names_of, run_pipeline
from flarec.ir.program import Program, placeholder_name
from flarec.passes import lower, pipeline
from flarec.passes.properties import CHECKERS, CHECKS
from tests.models import FAMILIES, captured

ATEN = torch.ops.aten


def after(name: str, target: str = "decode", family: str = "qwen3_5_text", *, vector: bool = False) -> Program:
    """The program behind the pass `name` of a pipeline."""
    steps = pipeline(target, mask_vector=vector)
    count = [step.name for step in steps].index(name) + 1
    return run_pipeline(captured(family), steps[:count], CHECKS)


def fails(program: Program, name: str) -> str:
    """The error of a property's checker, as the runner reports it."""
    with pytest.raises(PropertyError) as caught:
        check_properties(program, {**CHECKERS})
    text = str(caught.value)
    assert f"property '{name}' (claimed by " in text, text
    return text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["train", "decode"])
def test_every_property_holds_after_every_pass(family: str, target: str) -> None:
    program = lower(captured(family), target, mask_vector=True, debug=True)
    provided = {name for step in pipeline(target) for name in names_of(step.provides)}
    lost = {name for step in pipeline(target) for name in names_of(step.invalidates)}
    assert program.properties == (provided | {"captured"}) - lost
    assert lost == ({"logits"} if target == "train" else set())


def test_positions_must_come_from_the_layout() -> None:
    program = after("duplicate-streams")
    del program.derivations["position_ids"]
    assert "positions must come from the layout" in fails(program, "two-stream")


def test_captured_outputs() -> None:
    program = captured("bamba").clone()
    program.outputs = ("logits", "hidden")
    assert "returns other things than its outputs" in fails(program, "captured")
    program.outputs = ("hidden",)
    assert "first output is not 'logits'" in fails(program, "captured")


def test_captured_missing_parameter() -> None:
    program = captured("bamba").clone()
    node = next(n for n in program.graph.nodes if n.op == "get_attr")
    name, node.target = node.target, "model.no_such_weight"
    assert "reads 'model.no_such_weight', which the program does not have" in fails(program, "captured")
    node.target = name


def test_captured_module_call() -> None:
    program = captured("bamba").clone()
    with program.graph.inserting_before(program.output_node()):
        program.graph.call_method("relu", (program.calls(ATEN.linear.default)[-1],))
    assert "calls into a module" in fails(program, "captured")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda g, h: g.call_function(ATEN._assert_scalar.default, (1, "guard")), "is a guard"),
        (lambda g, h: g.call_function(ATEN.to.device, (h, torch.device("cpu"), torch.float32)), "fixes a device"),
        (lambda g, h: g.call_function(ATEN.neg.default, (h,)), "is dead"),
    ],
)
def test_canonical(make: Callable[[fx.Graph, fx.Node], fx.Node], words: str) -> None:
    program = after("canonicalize")
    hidden = program.calls(ATEN.linear.default)[3]
    with program.graph.inserting_after(hidden):
        node = make(program.graph, hidden)
    node.meta = dict(hidden.meta)
    text = fails(program, "canonical")
    assert words in text
    assert node.name in text


def test_masked_and_state_scheduled() -> None:
    """A mixer that a pass forgot still sees one causal document per row."""
    for family, name, forgotten in (
        ("qwen3_5_text", "masked", ops.SOFTMAX_ATTENTION.op),
        ("qwen3_5_text", "state-scheduled", ops.SHORT_CONV.op),
        ("qwen3_5_text", "state-scheduled", ops.LINEAR_ATTENTION.op),
        ("jamba", "state-scheduled", ops.SELECTIVE_SCAN.op),
        ("recurrent_gemma", "state-scheduled", ops.GATED_RECURRENCE.op),
    ):
        program = after("duplicate-streams", family=family).clone()
        done = after("schedule-states", family=family)
        for node, _ in ops.sites(program.graph):
            if node.target is not forgotten:
                node.target = ATEN.clone.default  # as good as gone for this checker
        program.properties |= {name}
        program.history = done.history
        text = fails(program, name)
        assert f"({str(forgotten).removesuffix('.default')})" in text
        assert "still sees one causal document per row" in text
        assert f"modeling_{family.removesuffix('_text')}.py:" in text


def test_narrowed() -> None:
    program = after("narrow-head")
    rows = program.placeholder("head_rows")
    gather = next(iter(rows.users))
    gather.target = ATEN.take.default
    assert "does not select rows" in fails(program, "narrowed")
    gather.args = (gather.args[0], 0, program.placeholder("input_ids"))
    assert "no node reads head_rows" in fails(program, "narrowed")


def test_mask_embedded() -> None:
    program = after("embed-mask", vector=True)
    where = program.calls(ATEN.where.self)[0]
    where.replace_all_uses_with(where.args[2])  # type: ignore[arg-type]
    program.graph.eliminate_dead_code()
    assert "'flarec_mask_vector' is not used" in fails(program, "mask-embedded")


def test_cached() -> None:
    program = after("thread-cache")
    slot = next(slot for slot in program.cache_slots if slot.kind == "state")
    outputs = program.outputs
    program.outputs = tuple("other" if name == slot.name else name for name in outputs)
    assert f"cache slot '{slot.name}' is not returned" in fails(program, "cached")
    program.outputs = outputs

    node = program.placeholder(placeholder_name(slot.name))
    node.name = "something"
    assert f"cache slot '{slot.name}' is not an input" in fails(program, "cached")

    program = after("thread-cache")
    program.cache_slots = ()
    assert "no cache slot" in fails(program, "cached")

    program = after("thread-cache")
    node = program.calls(ops.SOFTMAX_ATTENTION.call("reference", step=True))[0]
    node.target = ops.SOFTMAX_ATTENTION.call("reference")
    text = fails(program, "cached")
    assert "has no cache" in text
    assert "layers.3" in text


def test_lowered() -> None:
    program = lower(captured("qwen3_5_text"), "train")
    node = next(n for n in program.graph.nodes if "short_conv" in getattr(n.target, "__name__", ""))
    node.target = ops.SHORT_CONV.call("reference")
    assert "still runs the reference" in fails(program, "lowered")

    program = lower(captured("qwen3_5_text"), "train")
    name = "softmax_mask"
    program.placeholder(name).replace_all_uses_with(program.placeholder("conv_windows_4"))
    assert f"derived input '{name}' is not read" in fails(program, "lowered")


def test_the_reference_may_stay_if_it_was_asked_for() -> None:
    program = lower(captured("bamba"), "train", kernels="reference")
    assert program.calls(ops.LINEAR_ATTENTION.call("reference"))
    check_properties(program, CHECKERS)


def test_a_claim_without_a_checker_is_refused() -> None:
    program = captured("bamba").clone()
    program.properties |= {"blessed"}
    with pytest.raises(PropertyError, match="'blessed' has no checker"):
        check_properties(program, CHECKERS)
