"""adapt-noisy-stream: noisy rows go through the adapter, clean rows keep every bit and get no gradient from it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor, fx, nn

from flarec import ops
from flarec.errors import FlarecError, PassError, PropertyError, UsageError
from flarec.ir.pipeline import check_properties, parse_pipeline, pipeline_text, run_pipeline
from flarec.ir.program import Program
from flarec.layout import Block, Layout, build_layout
from flarec.passes import PASSES, lower, pipeline
from flarec.passes.adapt_noisy_stream import (
    AdaptNoisyStream,
    NoisyRows,
    adapter_parameters,
    new_adapter,
    remarks,
)
from flarec.passes.narrow_head import find_head
from flarec.passes.properties import CHECKERS, CHECKS
from tests.models import FAMILIES, captured, captured_float64
from tests.passes.snippets import example

ATEN = torch.ops.aten
ADAPTER = AdaptNoisyStream(rank=4, alpha=6.0)


DENSE = ("qwen3_5_text", "bamba", "zamba2")
"""Families without experts."""


def adapted(program: Program) -> Program:
    """A captured program with an adapter whose B is not zero."""
    program = program.clone()
    program.extra |= new_adapter(program, ADAPTER, seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in program.extra.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return program


@functools.cache
def source(family: str) -> Program:
    return adapted(captured(family))


@functools.cache
def float64(family: str) -> Program:
    return adapted(captured_float64(family))


def with_logits(program: Program, adapter: AdaptNoisyStream | None = ADAPTER, target: str = "train") -> Program:
    """Without the passes that training has behind it."""
    left_out = ("split-head", "split-streams")
    steps = [step for step in pipeline(target, adapter=adapter) if step.name not in left_out]
    return lower(program, target, steps=steps, debug=True)


@functools.cache
def lowered(family: str, target: str = "train", adapter: AdaptNoisyStream | None = ADAPTER) -> Program:
    return with_logits(source(family), adapter, target)


def with_and_without(plain: Program, own: Program, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both for every token of one layout [rows * T, V], and which tokens are clean [rows * T]."""
    ids, layout = example(seed)
    with torch.no_grad():
        expected, found = (program(ids, layout=layout, head_rows=every_row(layout)) for program in (plain, own))
    return expected, found, clean_slots(layout)


def every_row(layout: Layout) -> Tensor:
    return torch.arange(layout.rows * layout.length)


def clean_slots(layout: Layout) -> Tensor:
    """[rows * T] bool"""
    return ~NoisyRows().build(layout, None).flatten()


def test_before_and_after_of_the_docstring() -> None:
    steps = pipeline("train", adapter=ADAPTER)
    index = [step.name for step in steps].index("adapt-noisy-stream")
    assert steps[index - 1].name == "embed-mask"
    before = run_pipeline(captured("qwen3_5_text"), steps[:index], CHECKS)
    after = run_pipeline(before, steps[index : index + 1], CHECKS)
    assert type(after.derivations["noisy_rows"]) is NoisyRows
    chosen = [node for node in after.calls(ATEN.where.self) if node.args[0] is after.placeholder("noisy_rows")]
    assert len(chosen) * 2 == len(adapter_parameters(after)) > 20
    for node in chosen:
        _, both, y = node.args
        assert isinstance(both, fx.Node)
        assert isinstance(y, fx.Node)
        assert both.target is ATEN.add.Tensor
        assert both.args[0] is y
        assert both.kwargs == {"alpha": 1.5}
        high = both.args[1]
        low = high.args[0]  # type: ignore[union-attr]
        module = str(y.args[1].target).removesuffix(".weight")  # type: ignore[union-attr]
        assert low.args[0] is y.args[0]  # type: ignore[union-attr]
        assert low.args[1].target == f"{module}.lora_A.weight"  # type: ignore[union-attr]
        assert high.args[1].target == f"{module}.lora_B.weight"  # type: ignore[union-attr]
        assert set(y.users) == {node, both}
    head = find_head(after)
    assert head is not None
    assert not any(user in chosen for user in head.users)


@pytest.mark.parametrize("family", DENSE)
def test_clean_rows_keep_every_bit(family: str) -> None:
    """Same layout, so the same products over the same rows, whatever B is."""
    expected, found, clean = with_and_without(lowered(family, adapter=None), lowered(family))
    assert torch.equal(expected[clean], found[clean])
    assert not torch.equal(expected[~clean], found[~clean])


def test_experts_round_clean_rows_by_the_number_of_rows_beside_them() -> None:
    """An expert's product holds the clean and the noisy rows that chose it, and what noisy rows choose changes with the
    adapter: there clean rows are equal up to rounding."""
    exact = float64("kimi_linear")
    expected, found, clean = with_and_without(with_logits(exact, None), with_logits(exact, ADAPTER))
    assert not torch.allclose(expected[~clean], found[~clean], atol=0.1)
    difference = (expected[clean] - found[clean]).abs().max()
    assert difference < 1e-12 * expected.abs().max()


def test_a_choice_keeps_what_a_clean_row_held() -> None:
    """Minus zero and undefined values too, whatever the adapter gives."""
    rows = NoisyRows().build(build_layout([[4]], [[Block(0, 2, 2)]]), None)
    y = torch.tensor([-0.0, float("nan"), float("inf"), 1.0, 2.0, 3.0])[None, :, None].repeat(1, 1, 2)
    kept = torch.where(rows, y + float("nan"), y)
    assert rows.flatten().tolist() == [False] * 4 + [True] * 2
    assert torch.equal(kept[:, :4].view(torch.int32), y[:, :4].view(torch.int32))
    assert bool(kept[:, 4:].isnan().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_rows_have_no_gradient_by_the_adapter(family: str) -> None:
    program = lowered(family)
    ids, layout = example(4)
    clean = clean_slots(layout)
    parameters = list(adapter_parameters(program).values())
    logits = program(ids, layout=layout, head_rows=every_row(layout))
    by_clean = torch.autograd.grad(logits[clean].square().sum(), parameters, retain_graph=True, allow_unused=True)
    assert all(gradient is None or not bool(gradient.any()) for gradient in by_clean)
    by_noisy = torch.autograd.grad(logits[~clean].square().sum(), parameters)
    assert all(bool(gradient.any()) for gradient in by_noisy), "every parameter learns"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing(family: str) -> None:
    expected, found, _ = with_and_without(lowered(family, adapter=None), with_logits(captured(family)))
    assert torch.equal(expected, found)


def test_a_row_is_adapted_as_its_definition_says() -> None:
    """Noisy rows of the adapted program are all rows of one whose weights are W + alpha / rank B A, where they read no
    clean row: blocks at the start of their document."""
    program = float64("qwen3_5_text")
    own = with_logits(program)
    layout = build_layout([[3]], [[Block(0, 0, 5, readout="causal")]])
    ids = torch.randint(0, 300, (1, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = own(ids, layout=layout, head_rows=torch.arange(3, 8))
        merged = program.clone()  # with weights of its own for these modules
        for name in [name for name in program.extra if name.endswith(".lora_A.weight")]:
            module = name.removesuffix(".lora_A.weight")
            path, _, _ = f"{module}.weight".rpartition(".")
            weight = merged.module.get_parameter(f"{module}.weight")
            delta = program.extra[f"{module}.lora_B.weight"] @ program.extra[name]
            owner = merged.module.get_submodule(path)
            owner.weight = nn.Parameter(weight + 1.5 * delta)
        expected = merged(ids[:, 3:], position_ids=torch.arange(5)[None])[0]
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_pipelines_share_the_parameters_and_their_text_brings_them_back() -> None:
    train, decode = lowered("bamba"), lowered("bamba", "decode")
    own = adapter_parameters(train)
    assert own
    assert all(parameter is decode.parameters()[name] is train.parameters()[name] for name, parameter in own.items())
    text = pipeline_text(pipeline("decode", adapter=ADAPTER))
    assert "adapt-noisy-stream(rank=4, alpha=6.0, modules='all-linear')" in text.splitlines()
    assert parse_pipeline(text, PASSES) == pipeline("decode", adapter=ADAPTER)
    assert ADAPTER in pipeline("decode", stored=text, kernels="torch")


def test_a_start_depends_on_the_seed_alone() -> None:
    one, two, other = (new_adapter(captured("bamba"), ADAPTER, seed) for seed in (3, 3, 4))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all("lora_B" in name or not torch.equal(one[name], other[name]) for name in one)
    down = one["model.layers.0.feed_forward.down_proj.lora_A.weight"]
    assert down.abs().max() <= down.shape[1] ** -0.5
    assert not any(bool(parameter.any()) for name, parameter in one.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("q_proj+v_proj", {"q_proj", "v_proj"}),
        ("feed_forward.up_proj", {"up_proj"}),
        (r".*layers\.1\..*[kv]_proj", {"k_proj", "v_proj"}),
    ],
)
def test_targets(targets: str, modules: set[str]) -> None:
    names = new_adapter(captured("bamba"), dataclasses.replace(ADAPTER, modules=targets))
    assert {name.split(".")[-3] for name in names} == modules


def test_layers_that_share_a_block_share_its_adapter() -> None:
    program = lower(captured("zamba2"), "train", adapter=ADAPTER)
    own = adapter_parameters(program)
    reads = [node.target for node in program.graph.nodes if node.op == "get_attr" and node.target in own]
    (shared,) = [name for name in own if name.endswith("self_attn.q_proj.lora_A.weight")]
    assert reads.count(shared) == 2
    assert any("share their weights share an adapter" in text for text in remarks(captured("zamba2"), ADAPTER))


def test_what_has_no_adapter_is_named() -> None:
    text = "; ".join(remarks(captured("jamba"), ADAPTER))
    assert "dt_proj has no adapter: the model multiplies by its weight itself" in text
    assert "the experts have no adapter: their weights are one tensor" in text
    names = {name.split(".")[-3] for name in new_adapter(captured("jamba"), ADAPTER)}
    assert names.isdisjoint({"dt_proj", "router", "lm_head", "embed_tokens", "gate"})
    assert remarks(captured("bamba"), ADAPTER) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rank": 0}, "rank 0, alpha 6.0; take a rank of at least 1"),
        ({"modules": "q_proj*("}, "cannot be read as a regular expression"),
        ({"modules": "no_such"}, "'adapt-noisy-stream' found nothing to rewrite"),
        ({"rank": 5}, r"is \[4, 64\], and this program takes \[5, 64\]"),
    ],
)
def test_options_that_mean_nothing_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises((PassError, UsageError), match=words) as caught:
        lower(source("bamba"), "train", adapter=dataclasses.replace(ADAPTER, **changed))  # type: ignore[arg-type]
    assert isinstance(caught.value, FlarecError)


def broken() -> Program:
    return lowered("bamba").clone()


def test_an_adapter_on_all_rows_is_found() -> None:
    """Each way past the choice by `noisy_rows`."""

    def fails(program: Program, words: str) -> None:
        with pytest.raises(PropertyError, match=words):
            check_properties(program, {"noisy-adapted": CHECKERS["noisy-adapted"]} | dict.fromkeys(
                program.properties - {"noisy-adapted"}, lambda program: None))

    def first(program: Program) -> fx.Node:
        return next(n for n in program.calls(ATEN.where.self) if n.args[0] is program.placeholder("noisy_rows"))

    program = broken()
    node = first(program)
    node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
    fails(program, "reads what is computed from an adapter on all rows")
    program = broken()
    node = first(program)
    node.args = (node.args[0], node.args[2], node.args[1])
    fails(program, "computed from an adapter on all rows")
    program = broken()
    program.derivations["noisy_rows"] = dataclasses.make_dataclass("AllRows", [])()
    fails(program, "computed from an adapter on all rows")
    program = broken()
    last = [n for n in program.calls(ATEN.where.self) if n.args[0] is program.placeholder("noisy_rows")][-1]
    last.replace_all_uses_with(last.args[1])  # type: ignore[arg-type]
    fails(program, "and is returned")
    program = broken()
    node = first(program)
    node.replace_all_uses_with(node.args[2])  # type: ignore[arg-type]
    program.graph.eliminate_dead_code()
    fails(program, "is not read")


def test_reference_mixers_take_it_too() -> None:
    assert lower(captured("bamba"), "train", kernels=ops.REFERENCE, adapter=ADAPTER).properties >= {"noisy-adapted"}
