"""The runner: order, text form, history, empty passes, debug mode, parameters shared with the source."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from flarec import ops
from flarec.errors import PassError, PropertyError, UsageError
from flarec.ir.pipeline import (
    Pass,
    check_order,
    dependency_graph,
    names_of,
    parse_pipeline,
    pipeline_text,
    run_pipeline,
)
from flarec.ir.program import Program
from flarec.passes import PASSES, PIPELINES, lower, pipeline
from flarec.passes.lower_mixers import LowerMixers
from flarec.passes.properties import CHECKS
from tests.models import FAMILIES, captured

CAPTURED = frozenset({"captured"})


@dataclass(frozen=True)
class Nothing(Pass):
    """Finds nothing."""

    name: ClassVar[str] = "nothing"

    def apply(self, program: Program) -> list[fx.Node]:
        return []


@dataclass(frozen=True)
class Claim(Pass):
    """Claims a property that it does not bring about."""

    claim: str = "narrowed"

    name: ClassVar[str] = "claim"
    provides: ClassVar[frozenset[str]] = frozenset({"narrowed"})

    def apply(self, program: Program) -> list[fx.Node]:
        return [program.output_node()]


@dataclass(frozen=True)
class Break(Pass):
    """Breaks a property that an earlier pass brought about."""

    name: ClassVar[str] = "break"

    def apply(self, program: Program) -> list[fx.Node]:
        node = program.calls(torch.ops.aten.linear.default)[0]
        with program.graph.inserting_after(node):
            dead = program.graph.call_function(torch.ops.aten.neg.default, (node,))
        return [dead]


@dataclass(frozen=True)
class Repair(Pass):
    """Removes what `Break` left."""

    name: ClassVar[str] = "repair"

    def apply(self, program: Program) -> list[fx.Node]:
        dead = [n for n in program.graph.nodes if n.op == "call_function" and not n.users and not n.is_impure()]
        for node in dead:
            program.graph.erase_node(node)
        return dead


@pytest.mark.parametrize("target", sorted(PIPELINES))
def test_the_pipelines_are_in_order(target: str) -> None:
    check_order(pipeline(target), CAPTURED)


@pytest.mark.parametrize("target", sorted(PIPELINES))
def test_every_pass_that_is_moved_before_what_it_needs_is_refused(target: str) -> None:
    steps = pipeline(target)
    refused = 0
    for late in range(1, len(steps)):
        for early in range(late):
            moved = [*steps[:early], steps[late], *steps[early:late], *steps[late + 1 :]]
            needed = names_of(steps[late].requires) - CAPTURED
            have = {name for step in steps[:early] for name in names_of(step.provides)}
            if needed <= have:
                check_order(moved, CAPTURED)
                continue
            with pytest.raises(PassError) as caught:
                check_order(moved, CAPTURED)
            missing = sorted(needed - have)[0]
            assert f"'{steps[late].name}' requires '{missing}': it is provided only later, by " in str(caught.value)
            refused += 1
    assert refused > 5


def test_a_missing_provider_is_named() -> None:
    with pytest.raises(PassError, match="'lower-mixers' requires 'masked': no pass provides it"):
        check_order([LowerMixers()], CAPTURED)


def test_nothing_runs_if_the_order_is_wrong() -> None:
    program = captured("bamba")
    before = program.op_counts()
    with pytest.raises(PassError):
        run_pipeline(program, list(reversed(pipeline("train"))), CHECKS)
    assert program.op_counts() == before


@pytest.mark.parametrize("target", sorted(PIPELINES))
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_text_round_trip(target: str, vector: bool, kernels: str) -> None:
    steps = pipeline(target, mask_vector=vector, kernels=kernels)
    text = pipeline_text(steps)
    assert parse_pipeline(text, PASSES) == steps
    assert ("vector=True" in text) == vector
    assert len(text.splitlines()) == len(steps)


@given(chunk=st.integers(1, 1 << 20), implementation=st.text())
def test_text_round_trip_of_any_option(chunk: int, implementation: str) -> None:
    steps = [LowerMixers(implementation=implementation, chunk_size=chunk)]
    text = pipeline_text(steps)
    assert "\n" not in text
    assert parse_pipeline(text, PASSES) == steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("canonicalise()", "unknown pass 'canonicalise'"),
        ("lower-mixers(chunks=3)", "cannot be read"),
        ("lower-mixers(chunk_size=3", "cannot be read"),
        ("lower-mixers(chunk_size=open('x'))", "cannot be read"),
        ("lower-mixers('reference')", "options have names"),
        ("lower-mixers()()", "cannot be read"),
    ],
)
def test_text_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_pipeline(text, PASSES)


def test_an_unknown_target_or_kernel_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown target 'serve'; choose one of train, decode"):
        pipeline("serve")
    with pytest.raises(UsageError, match="unknown kernels 'cuda'"):
        pipeline("train", kernels="cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_history_accounts_for_every_op(family: str) -> None:
    source = captured(family)
    program = lower(source, "decode")
    assert [record.step for record in program.history[1:]] == [step.text() for step in pipeline("decode")]
    total: Counter[str] = Counter()
    for record in program.history:
        total.update(record.delta)
    assert +total == program.op_counts()
    assert all(record.seconds >= 0 for record in program.history)
    rewritten = {record.step: len(record.sites) for record in program.history}
    assert rewritten["thread-cache()"] == sum(mixer.mixing != "none" for _, mixer in ops.sites(source.graph))
    assert rewritten["embed-mask()"] == 0, "a spare row needs no rewrite"


def test_the_history_does_not_depend_on_the_run() -> None:
    runs = [lower(captured("qwen3_5_text"), "train").history for _ in range(2)]
    assert [(r.step, r.sites, r.delta) for r in runs[0]] == [(r.step, r.sites, r.delta) for r in runs[1]]


def test_a_pass_that_finds_nothing_is_an_error() -> None:
    with pytest.raises(PassError, match="pass 'nothing' found nothing to rewrite"):
        run_pipeline(captured("bamba"), [Nothing()], CHECKS)


def test_passes_may_not_run_twice_unnoticed() -> None:
    """The second time there is nothing left to thread."""
    steps = pipeline("decode")
    thread = next(step for step in steps if step.name == "thread-cache")
    with pytest.raises(PassError, match="'thread-cache' found nothing"):
        run_pipeline(captured("bamba"), [*steps[: steps.index(thread) + 1], thread], CHECKS)


def test_a_false_claim_is_found_at_the_end() -> None:
    steps = [*pipeline("train")[:5], Claim()]
    with pytest.raises(PropertyError, match=r"'narrowed' \(claimed by claim\(\)\) does not hold: no node reads"):
        run_pipeline(captured("bamba"), steps, CHECKS)


def test_debug_finds_the_pass_that_broke_a_property() -> None:
    """Without debug only the end counts; with it the checkers run after each pass."""
    steps = [*pipeline("train")[:1], Break(), Repair()]
    run_pipeline(captured("bamba"), steps, CHECKS)
    with pytest.raises(PropertyError, match=r"property 'canonical'.*is dead"):
        run_pipeline(captured("bamba"), steps, CHECKS, debug=True)


def test_the_source_stays_as_it_was_and_parameters_are_shared() -> None:
    source = captured("qwen3_5_text")
    counts, properties = source.op_counts(), source.properties
    train, decode = lower(source, "train", mask_vector=True), lower(source, "decode", mask_vector=True)
    assert source.op_counts() == counts
    assert source.properties == properties == CAPTURED
    assert source.cache_slots == ()
    for name, parameter in source.parameters().items():
        assert train.parameters()[name] is parameter
        assert decode.parameters()[name] is parameter


def test_dependency_graph() -> None:
    graph = dependency_graph(pipeline("decode"), CAPTURED)
    assert nx.is_directed_acyclic_graph(graph)
    kinds = nx.get_node_attributes(graph, "kind")
    assert {name for name, kind in kinds.items() if kind == "pass"} == {step.text() for step in pipeline("decode")}
    for step in pipeline("decode"):
        assert set(graph.predecessors(step.text())) == step.requires
        assert nx.has_path(graph, "captured", step.text())
