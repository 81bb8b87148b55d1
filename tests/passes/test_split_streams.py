"""split-streams: the clean stream apart, without a backward; the gradients of the adapter stay what they were."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from flarec import ops
from flarec.errors import PropertyError
from flarec.ir.pipeline import check_properties, names_of
from flarec.ir.program import Program
from flarec.layout import Layout, build_layout
from flarec.ops.streams import clean_stream, join_rows, join_streams, noisy_stream
from flarec.passes import lower, pipeline
from flarec.passes.adapt_noisy_stream import adapter_parameters
from flarec.passes.embed_mask import PARAMETER
from flarec.passes.properties import CHECKERS
from tests.models import FAMILIES, VOCABULARY, captured_float64
from tests.passes.snippets import example
from tests.passes.test_adapt_noisy_stream import ADAPTER, adapted, clean_slots, every_row, source

ATEN = torch.ops.aten


@functools.cache
def float64(family: str) -> Program:
    return adapted(captured_float64(family))


FROZEN: list[Program] = []


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """The parameters are those of every program of the family: they learn again after a test."""
    yield
    for program in FROZEN:
        program.module.requires_grad_()
    FROZEN.clear()


def lowered(family: str, *, exact: bool = False, split: bool = True, kernels: str = "torch") -> Program:
    """The training program with logits, its model frozen. exact: in float64."""
    made = learning(family, exact, split, kernels)
    FROZEN.append(made)
    for name, parameter in made.parameters().items():
        parameter.requires_grad_(name in made.extra)
    return made


@functools.cache
def learning(family: str, exact: bool, split: bool, kernels: str) -> Program:
    left_out = {"split-head"} | (set() if split else {"split-streams"})
    steps = [
        step for step in pipeline("train", adapter=ADAPTER, mask_vector=True, kernels=kernels)
        if step.name not in left_out
    ]
    return lower((float64 if exact else source)(family), "train", steps=steps)


def masked_example(seed: int) -> tuple[Tensor, Layout]:
    """Every other noisy token is the mask vector's."""
    ids, layout = example(seed)
    ids[:, layout.clean_length :: 2] = VOCABULARY
    return ids, layout


def run(program: Program, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of all rows, and the gradients of a loss of the noisy ones by what is trained."""
    ids, layout = masked_example(seed)
    logits = program(ids, layout=layout, head_rows=every_row(layout))
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    weight[clean_slots(layout) | (layout.token_document() < 0).flatten()] = 0
    named = {name: value for name, value in program.parameters().items() if name in program.extra}
    found = torch.autograd.grad((logits * weight).sum(), list(named.values()))
    return logits.detach(), dict(zip(named, found, strict=True))


def test_before_and_after_of_the_docstring() -> None:
    program = lowered("qwen3_5_text")
    names = {node.name for node in program.placeholders()}
    assert {"clean_position_ids", "noisy_position_ids"} <= names
    assert names.isdisjoint({"position_ids", "noisy_rows"})
    assert len(program.calls(ATEN.where.self)) == 2, "only the mask vector is chosen"
    for node, mixer in ops.sites(program.graph):
        assert node.target.frozen_clean  # type: ignore[union-attr]
        assert {user.target for user in node.users} == {clean_stream, noisy_stream}
        for name in mixer.axes:
            value = node.kwargs[name]
            assert not isinstance(value, fx.Node) or value.target is join_streams
    adapters = {
        node for node in program.graph.nodes if node.op == "get_attr" and node.target in adapter_parameters(program)
    }
    assert len(adapters) == len(adapter_parameters(program))
    for node in adapters:
        (user,) = node.users
        assert "noisy" in str(user.meta["val"].shape)
    steps = [step.name for step in pipeline("train", adapter=ADAPTER)]
    assert steps.index("split-streams") == steps.index("lower-mixers") - 1
    assert "split-streams" not in [step.name for step in pipeline("decode", adapter=ADAPTER)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_program_with_both_streams(family: str) -> None:
    expected, gradients = run(lowered(family, exact=True, split=False))
    logits, found = run(lowered(family, exact=True))
    assert torch.allclose(logits, expected, rtol=1e-11, atol=1e-11)
    assert found.keys() == gradients.keys() == {*float64(family).extra, PARAMETER}
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-10 * float(gradient.abs().max())), name
        assert bool(gradient.any()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_rows_are_those_of_the_source_over_clean_rows_alone(family: str) -> None:
    """Bit for bit, experts too: no product holds rows of both streams."""
    program = lowered(family)
    steps = [step for step in pipeline("train") if step.name != "split-head"]
    plain = lower(source(family), "train", steps=steps)
    ids, layout = masked_example(6)
    clean = layout.clean_length
    documents = [[int((row == number).sum()) for number in range(int(row.max()) + 1)] for row in layout.clean_document]
    alone = build_layout(documents, [[]] * layout.rows, clean_length=clean)
    rows = torch.arange(layout.rows * layout.length).view(layout.rows, -1)[:, :clean].flatten()
    with torch.no_grad():
        expected = plain(ids[:, :clean], layout=alone, head_rows=every_row(alone))
        found = program(ids, layout=layout, head_rows=rows)
    real = (layout.clean_document >= 0).flatten()
    assert torch.equal(found[real], expected[real])


class Watched(fx.Interpreter):
    """Runs a program and notes every value of clean tokens."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.clean: dict[str, Tensor] = {}
        self.noisy: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        shape = getattr(n.meta.get("val"), "shape", ())
        for stream, kept in (("clean", self.clean), ("noisy", self.noisy)):
            if isinstance(value, Tensor) and any(stream in str(size).split("*") for size in shape):
                kept[n.name] = value
        return value


@pytest.mark.parametrize("family", FAMILIES)
def test_the_clean_stream_records_nothing(family: str) -> None:
    program = lowered(family)
    ids, layout = masked_example(2)
    watched = Watched(program)
    given = program.given(ids, layout=layout, head_rows=every_row(layout))
    watched.run(*[given[name] for name in program.inputs])
    assert len(watched.clean) > 40
    assert [name for name, value in watched.clean.items() if value.requires_grad or value.grad_fn is not None] == []
    assert sum(value.requires_grad for value in watched.noisy.values()) > 40


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "zamba2"])
def test_experts_and_shared_blocks(family: str) -> None:
    """Experts of each stream apart, their counts together; blocks that layers share."""
    program = lower(source(family), "train", adapter=ADAPTER, mask_vector=True, debug=True)
    sites = [node for node, mixer in ops.sites(program.graph) if mixer is ops.MOE_EXPERTS]
    counts = program.calls(ops.count_experts)
    assert len(sites) == 2 * len(counts)
    assert all(node.args[0].target is join_rows for node in counts)  # type: ignore[union-attr]
    assert "streams-split" in program.properties


def test_reference_mixers() -> None:
    """They compute all gradients; those of the clean stream are dropped."""
    expected, gradients = run(lowered("bamba", exact=True))
    logits, found = run(lowered("bamba", exact=True, kernels=ops.REFERENCE))
    _, layout = masked_example(3)
    real = (layout.token_document() >= 0).flatten()
    assert torch.allclose(logits[real], expected[real], rtol=1e-10, atol=1e-10)
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-9), name


def test_properties_of_the_pipeline() -> None:
    program = lower(source("bamba"), "train", adapter=ADAPTER, debug=True)
    provided = {name for step in pipeline("train", adapter=ADAPTER) for name in names_of(step.provides)}
    assert program.properties == (provided | {"captured"}) - {"logits"}


def broken() -> Iterator[tuple[Program, str]]:
    yield lowered("bamba"), ""
    program = lowered("bamba").clone()
    join = program.calls(join_streams)[3]
    with program.graph.inserting_after(join):
        copy = program.graph.call_function(ATEN.clone.default, (join,))
    join.replace_all_uses_with(copy, lambda user: user is not copy)
    copy.meta["val"] = join.meta["val"]
    yield program, "holds tokens of both streams"
    program = lowered("bamba").clone()
    node, _ = next(iter(ops.sites(program.graph)))
    node.target = dataclasses.replace(node.target, frozen_clean=False)  # type: ignore[type-var]
    yield program, "computes gradients of its clean stream"
    program = lowered("bamba").clone()
    stop = program.calls(ATEN.detach.default)[0]
    stop.replace_all_uses_with(stop.args[0])  # type: ignore[arg-type]
    yield program, "computes clean tokens from a trained parameter"
    program = lowered("bamba").clone()
    node, _ = next(iter(ops.sites(program.graph)))
    next(iter(node.users)).target = ATEN.clone.default
    yield program, "reads both streams of a mixer"


def test_every_way_to_break_it_is_found() -> None:
    for program, words in broken():
        checkers = {
            name: CHECKERS["streams-split"] if name == "streams-split" else lambda p: None
            for name in program.properties
        }
        if not words:
            check_properties(program, checkers)
            continue
        with pytest.raises(PropertyError, match=words):
            check_properties(program, checkers)


def test_an_adapter_in_the_clean_stream_is_found() -> None:
    program = lowered("bamba").clone()
    join = program.calls(join_streams)[0]
    join.args = (join.args[1], *join.args[1:])
    with pytest.raises(PropertyError, match="reads what is computed from an adapter on all rows"):
        CHECKERS["noisy-adapted"](program)
