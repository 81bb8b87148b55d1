"""`torch.compile(program, fullgraph=True)`: one graph for every kind of mixer, with the eager program's numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec import ops
from flarec.decode.cache import Cache
from flarec.frontend.export import capture
from flarec.ir.program import Program
from flarec.layout import Block, Layout, build_layout
from flarec.ops.opaque import _forward, _of_their_own, pack
from flarec.passes import lower
from tests.models import FEW_LAYERS, captured_few_float64, captured_float64, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = {
    "qwen3_5_text": {"softmax_attention", "short_conv", "linear_attention"},  # delta rule, a gate per head
    "kimi_linear": {"linear_attention", "moe_experts"},  # a gate per channel
    "bamba": {"linear_attention"},  # no delta rule
    "jamba": {"selective_scan", "moe_experts"},
    "recurrent_gemma": {"gated_recurrence"},
}
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}
"""In float64: other kernels may sum in another order, nothing else."""

LAYOUT = build_layout([[5, 4], [8]], [[Block(0, 2, 3), Block(1, 3, 3)], [Block(0, 4, 2, readout="causal")]])


def arguments(program: Program, layout: Layout, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, program.vocab_size - 1, (layout.rows, layout.length), generator=generator)
    return ids, {"layout": layout, "head_rows": torch.arange(ids.numel())}


def trained(program: Any, module: torch.nn.Module, ids: Tensor, given: dict[str, Any]) -> list[Tensor]:
    """Logits, and the gradient of every parameter that has one."""
    logits = program(ids, **given)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    return [logits.detach(), *(gradient for gradient in gradients if gradient is not None)]


def assert_equal(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=ROUNDING["rtol"], atol=ROUNDING["atol"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_one_graph(family: str) -> None:
    program = lower(captured_few_float64(family), "train")
    assert FAMILIES[family] <= {mixer.name for _, mixer in ops.sites(program.graph)}
    ids, given = arguments(program, LAYOUT)
    given["derived"] = program.derive(LAYOUT)
    torch._dynamo.reset()
    fast = torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_equal(trained(fast, program.module, ids, given), trained(program, program.module, ids, given))


@pytest.mark.parametrize("family", ["kimi_linear", "jamba"])
def test_a_decode_step_is_one_graph(family: str) -> None:
    program = lower(captured_few_float64(family), "decode")
    torch._dynamo.reset()
    fast = program.compiled(backend="aot_eager", dynamic=False)
    cache = Cache.allocate(program.cache_slots, 2, 64, "cpu")
    prefill = build_layout([[6], [6]], [[], []])
    ids, given = arguments(program, prefill)
    program.step(ids, prefill, given["head_rows"], cache)
    cache.accept(torch.tensor([6, 5]))
    step = build_layout([[3], [2]], [[Block(0, 8, 2)], [Block(0, 5, 2)]], cached=[6, 5])
    ids, given = arguments(program, step, seed=1)
    mine, other = copy.deepcopy(cache), copy.deepcopy(cache)
    real = (step.token_document() >= 0).flatten()
    logits = [one.step(ids, step, given["head_rows"], kept)[real] for one, kept in ((fast, mine), (program, other))]
    assert_equal([logits[0], *mine.tensors.values()], [logits[1], *other.tensors.values()])
    assert any(not torch.equal(now, cache.tensors[name]) for name, now in mine.tensors.items())


def test_a_decode_step_with_triton_kernels_is_one_graph() -> None:
    """No launcher breaks it: each is one op, and none of its results is copied that is a tensor of its own."""
    model = tiny_model("qwen3_5_text", **FEW_LAYERS["qwen3_5_text"]).to(DEVICE)
    program = lower(capture(model, cache=True), "decode", kernels="triton")
    cache = Cache.allocate(program.cache_slots, 1, 64, DEVICE)
    prefill = build_layout([[5]], [[]], device=DEVICE)
    ids, given = arguments(program, prefill)
    program.step(ids.to(DEVICE), prefill, given["head_rows"].to(DEVICE), cache)
    cache.accept(torch.tensor([5], device=DEVICE))
    step = build_layout([[2]], [[Block(0, 6, 2)]], cached=[5], device=DEVICE)
    ids, given = arguments(program, step, seed=1)
    mine, other = copy.deepcopy(cache), copy.deepcopy(cache)
    torch._dynamo.reset()
    fast = program.compiled(backend="aot_eager", dynamic=False)
    logits = [one.step(ids.to(DEVICE), step, given["head_rows"].to(DEVICE), kept) for one, kept in
              ((fast, mine), (program, other))]
    for ours, theirs in zip([logits[0], *mine.tensors.values()], [logits[1], *other.tensors.values()], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(now, cache.tensors[name]) for name, now in mine.tensors.items())


def test_only_results_that_are_views_are_copied() -> None:
    x = torch.randn(4, 6)
    fresh, turned, twice = torch.randn(2, 3), torch.randn(3, 2).t(), torch.randn(8)
    found = _of_their_own([fresh, turned, x[1:], twice[:4], twice[4:]], [x])
    assert found[0] is fresh and found[3].data_ptr() == twice.data_ptr()
    assert all(result.is_contiguous() for result in found)
    assert len({result.untyped_storage().data_ptr() for result in [x, *found]}) == 6


@pytest.mark.slow
def test_inductor_compiles_a_training_step() -> None:
    """All three mixers of most models in one layer: a kernel of inductor is a process of the C++ compiler."""
    family = "falcon_h1"
    program = lower(captured_few_float64(family), "train")
    for node in program.graph.nodes:  # rotary angles, which inductor's own float32 cosine rounds differently
        if torch.float32 in node.args:
            node.args = tuple(torch.float64 if argument is torch.float32 else argument for argument in node.args)
    program.finish()
    ids, given = arguments(program, LAYOUT)
    torch._dynamo.reset()
    fast = program.compiled(backend="inductor", dynamic=False)
    assert_equal(trained(fast, fast.module, ids, given), trained(program, program.module, ids, given))


def test_another_layout_is_not_taken_for_the_first() -> None:
    program = lower(captured_float64("bamba"), "train")
    torch._dynamo.reset()
    fast = program.compiled(backend="eager", dynamic=False)
    # as many tokens and blocks, but other chunks and panels
    other = build_layout([[7, 2], [8]], [[Block(0, 6, 3), Block(0, 1, 3)], [Block(0, 8, 2)]])
    for layout in (LAYOUT, other, LAYOUT):
        ids, given = arguments(program, layout)
        with torch.no_grad():
            assert_equal([fast(ids, **given)], [program(ids, **given)])


def test_without_what_is_derived_a_compiler_is_told_what_to_do() -> None:
    program = lower(captured_float64("qwen3"), "train")
    ids, given = arguments(program, LAYOUT)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"program\.compiled\(\)"):
        torch.compile(program, fullgraph=True, backend="eager")(ids, **given)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["train", "decode"])
def test_inputs_are_tensors_and_integers(family: str, target: str) -> None:
    program = lower(captured_float64(family), target)
    cache = Cache.allocate(program.cache_slots, 2, 64, "cpu") if target == "decode" else None
    layout = LAYOUT if cache is None else build_layout([[5], [4]], [[Block(0, 2, 2)], []])
    ids, given = arguments(program, layout)
    named = program.given(ids, cache=cache, **given)
    module, leaves = program.flat(named)
    assert {isinstance(leaf, (Tensor, int)) for leaf in leaves} == {True}
    with torch.no_grad():
        flat = module(*leaves)
        if cache is None:
            assert_equal([flat[0]], [program.results(ids, **given)[0]])


def test_a_flat_program_can_be_exported() -> None:
    program = lower(captured_float64("qwen3_5_text"), "train")
    ids, given = arguments(program, LAYOUT)
    module, leaves = program.flat(program.given(ids, **given))
    exported = torch.export.export(module, tuple(leaves), strict=False)
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert torch.ops.flarec.mixer_call.default in called
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(*leaves)[0], program.results(ids, **given)[0])


def test_the_reference_of_a_step_that_writes_its_cache_is_refused() -> None:
    program = lower(captured_float64("qwen3"), "decode", kernels="reference").compiled(backend="aot_eager")
    cache = Cache.allocate(program.cache_slots, 1, 64, "cpu")
    layout = build_layout([[3]], [[]])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="--kernels torch"):
        program.step(torch.zeros(1, 3, dtype=torch.int64), layout, torch.arange(3), cache)


def test_an_operand_may_be_absent() -> None:
    """Linear attention without a gate, and its decode step."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 1, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    layout = build_layout([[3], [3]], [[Block(0, 2, 2)], [Block(0, 3, 2)]])
    site: dict[str, Any] = {"q": q, "k": k, "v": v, "g": None, "beta": torch.ones(2, 5, 1, dtype=torch.float64)}
    site |= {"scale": 1.0, "delta": True, "l2norm": True}
    reads = ops.LINEAR_ATTENTION.forms[ops.TORCH].reads
    assert reads is not None
    derivation = reads(ops.Site(site))
    assert derivation is not None
    schedule = derivation.build(layout, None)
    state = {"state": torch.zeros(2, 1, 4, 4, dtype=torch.float64), "accepted": torch.tensor([0, 0]), "layout": layout}
    state |= dict.fromkeys(("pending_k", "pending_d"), torch.zeros(2, 0, 1, 4, dtype=torch.float64))
    for step in (False, True):
        call = ops.LINEAR_ATTENTION.call(ops.TORCH, step)
        operands = site | {"schedule": schedule} | (state if step else {})
        torch._dynamo.reset()
        fast = torch.compile(lambda **given: call(**given), fullgraph=True, backend="aot_eager")  # noqa: B023
        ours, theirs = fast(**operands), call(**operands)
        assert_equal(ours if step else [ours], theirs if step else [theirs])


def test_the_op_of_a_kernel_is_sound() -> None:
    """torch's own checks of a custom op, for the mixer that none of these families has."""
    mixer = next(mixer for mixer in ops.mixers() if mixer.name == "generalized_delta_rule")
    call = mixer.call(ops.TORCH)
    form = mixer.forms[ops.TORCH]
    assert call.opaque and form.reads is not None
    generator = torch.Generator().manual_seed(0)
    shape = (LAYOUT.rows, LAYOUT.length, 2, 3)
    operands = {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for name in "qkvab"}
    operands["g"] = -torch.rand(shape, generator=generator, dtype=torch.float64)
    leaves = [operand.requires_grad_() for operand in operands.values()]
    derivation = form.reads(ops.Site(operands))
    assert derivation is not None
    schedule = derivation.build(LAYOUT, None)

    def loss(*tensors: Tensor) -> Tensor:
        named = dict(zip(operands, tensors, strict=True))
        return call(**named, schedule=schedule, scale=0.5).square().sum()

    torch._dynamo.reset()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_equal(torch.autograd.grad(fast(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves))
    arguments = pack(mixer.name, ops.TORCH, False, {**operands, "schedule": schedule, "scale": 0.5})
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(_forward, arguments, test_utils=tests)
