"""Property checkers and the token-local analysis: every way to break a graph is found, and the error says where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from flarec import ops
from flarec.errors import PropertyError
from flarec.ir.pipeline import check_properties, run_pipeline
from flarec.ir.program import Program, placeholder_name
from flarec.ir.spec import TensorSpec
from flarec.passes import lower, pipeline
from flarec.passes.properties import CHECKERS
from flarec.passes.token_local import has_token_dimension, mixing_reason
from tests.models import FAMILIES, captured

ATEN = torch.ops.aten


def after(name: str, target: str = "decode", family: str = "qwen3_5_text", *, vector: bool = False) -> Program:
    """The program behind the pass `name` of a pipeline."""
    steps = pipeline(target, mask_vector=vector)
    count = [step.name for step in steps].index(name) + 1
    return run_pipeline(captured(family), steps[:count], CHECKERS)


def insert(program: Program, layer: int, make: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.Node:
    """Put a node behind the first residual addition of a layer, with the metadata of a node of the model."""
    found = [n for n in program.calls(ATEN.add.Tensor) if n.meta["modules"] and _is_residual(n, layer)]
    hidden = found[0]
    users = list(hidden.users)
    with program.graph.inserting_after(hidden):
        new = make(program.graph, hidden)
    new.meta = dict(hidden.meta)
    for user in users:
        user.replace_input_with(hidden, new)
    program.finish()
    return new


def _is_residual(node: fx.Node, layer: int) -> bool:
    path, _ = node.meta["modules"][-1]
    return bool(path.endswith(f"layers.{layer}"))


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
    provided = {name for step in pipeline(target) for name in step.provides}
    assert program.properties == provided | {"captured"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda g, h: g.call_function(ATEN.flip.default, (h, [1])), "token dimension"),
        (lambda g, h: g.call_function(ATEN.roll.default, (h, [1], [1])), "token dimension"),
        (lambda g, h: g.call_function(ATEN.cumsum.default, (h, 1)), "token dimension"),
        (lambda g, h: g.call_function(ATEN.mean.dim, (h, [-2], True)), "token dimension"),
        (lambda g, h: g.call_function(ATEN.softmax.int, (h, 1)), "token dimension"),
        (lambda g, h: g.call_function(ATEN.repeat.default, (h, [1, 2, 1])), "repeats tokens"),
        (lambda g, h: g.call_function(ATEN.constant_pad_nd.default, (h, [0, 0, 1, -1])), "not known to be token-local"),
        (lambda g, h: g.call_function(ATEN.conv1d.default, (h, h)), "not known to be token-local"),
        (lambda g, h: g.call_function(len, (h,)), "not known"),
    ],
)
def test_a_node_that_mixes_tokens_is_found(make: Callable[[fx.Graph, fx.Node], fx.Node], words: str) -> None:
    program = after("duplicate-streams")
    node = insert(program, 1, make)
    text = fails(program, "two-stream")
    assert words in text
    assert f"%{node.name}" in text or f"'{node.name}'" in text or node.name in text
    assert "layers.1" in text, "the module is named"
    assert "modeling_qwen3_5.py:" in text, "the source line is named"
    assert "duplicate-streams" in text, "the pass that claimed it is named"
    assert "semantic op" in text, "the cure is named"


def test_a_product_over_tokens_is_found() -> None:
    program = after("duplicate-streams")

    def gram(graph: fx.Graph, node: fx.Node) -> fx.Node:
        rows, length, width = node.meta["val"].shape
        turned = graph.call_function(ATEN.transpose.int, (node, 1, 2))
        turned.meta = {**node.meta, "val": TensorSpec((rows, width, length), torch.float32)}
        with graph.inserting_after(turned):
            return graph.call_function(ATEN.matmul.default, (turned, node))

    node = insert(program, 1, gram)
    rows, _, width = node.meta["val"].shape
    node.meta["val"] = TensorSpec((rows, width, width), torch.float32)
    assert "contracts over tokens" in fails(program, "two-stream")


def test_a_mask_of_its_own_is_found() -> None:
    """A model that builds its own causal mask makes a tensor over pairs of tokens."""
    program = after("duplicate-streams")
    node = insert(program, 0, lambda g, h: g.call_function(ATEN.mul.Tensor, (h, h)))
    rows, length, _ = node.meta["val"].shape
    node.meta["val"] = TensorSpec((rows, length, length), torch.float32)
    assert mixing_reason(node) == "makes a tensor over pairs of tokens"


def test_slot_numbers_instead_of_positions_are_found() -> None:
    program = after("duplicate-streams")
    ids = program.placeholder("input_ids")
    with program.graph.inserting_after(program.placeholders()[-1]):
        node = program.graph.call_function(ATEN.arange.default, (24,))
    node.meta = {"val": TensorSpec(ids.meta["val"].shape[1:], torch.int64)}
    reason = mixing_reason(node)
    assert reason is not None
    assert "token slots" in reason


def test_positions_must_come_from_the_layout() -> None:
    program = after("duplicate-streams")
    del program.derivations["position_ids"]
    assert "positions must come from the layout" in fails(program, "two-stream")


def test_a_specialised_length_is_found() -> None:
    program = after("duplicate-streams")
    program.placeholder("input_ids").meta["val"] = TensorSpec((2, 24), torch.int64)
    assert "not symbolic" in fails(program, "two-stream")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_of_a_canonical_graph_is_token_local(family: str) -> None:
    program = after("canonicalize", family=family)
    assert has_token_dimension(program)
    reasons = [mixing_reason(node) for node in program.graph.nodes if node.op == "call_function"]
    assert [reason for reason in reasons if reason] == []
    assert len(reasons) > 100


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
