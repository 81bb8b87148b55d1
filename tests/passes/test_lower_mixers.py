"""lower-mixers: kernels that read derived tensors compute what the references define."""

from __future__ import annotations

import pytest
import torch

from flarec import ops
from flarec.errors import PassError
from flarec.ir.pipeline import run_pipeline
from flarec.ops.linear_attention import Chunks
from flarec.ops.short_conv import ConvWindows
from flarec.ops.softmax_attention import SoftmaxMask
from flarec.passes import lower
from flarec.passes.lower_mixers import LowerMixers
from flarec.passes.properties import CHECKS
from tests.models import FAMILIES, captured, captured_float64
from tests.passes.snippets import before_and_after, example, operands


def test_before_and_after_of_the_docstring() -> None:
    before, after = before_and_after("lower-mixers", target="train")
    assert after.derivations["softmax_mask"] == SoftmaxMask(None)
    assert after.derivations["conv_windows_4"] == ConvWindows(4)
    assert after.derivations["state_schedule"] == Chunks(64)
    (was,) = before.calls(ops.SOFTMAX_ATTENTION.call("reference"))
    (node,) = after.calls(ops.SOFTMAX_ATTENTION.call("torch"))
    expected = operands(was) | {"mask": "softmax_mask"}
    del expected["layout"]
    assert operands(node) == expected
    assert "layout" not in [placeholder.name for placeholder in after.placeholders()], "nothing reads it any more"
    for mixer in (ops.SHORT_CONV, ops.LINEAR_ATTENTION):
        assert len(after.calls(mixer.call("torch"))) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_equals_reference_with_gradients(family: str) -> None:
    """float64: logits of all tokens and gradients of all parameters, over random layouts."""
    programs = [lower(captured_float64(family), "train", kernels=kernels) for kernels in ("torch", "reference")]
    for seed in range(2):
        ids, layout = example(seed, rows=1)
        rows = torch.arange(layout.length)
        weight = torch.randn(layout.length, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        real = (layout.token_document()[0] >= 0).nonzero().squeeze(1)
        results = []
        for program in programs:
            logits = program(ids, layout=layout, head_rows=rows)
            parameters = list(program.module.parameters())
            found = torch.autograd.grad((logits * weight)[real].sum(), parameters, allow_unused=True)
            results.append((logits[real], [g for g in found if g is not None]))
        (logits, gradients), (expected, expected_gradients) = results
        assert torch.allclose(logits, expected, rtol=0, atol=1e-10)
        for got, wanted in zip(gradients, expected_gradients, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_the_chunk_size_is_only_a_tile(chunk_size: int) -> None:
    steps = [LowerMixers(chunk_size=chunk_size)]
    before, whole = before_and_after("lower-mixers", target="train")
    other = run_pipeline(before, steps, CHECKS)
    assert other.derivations["state_schedule"] == Chunks(chunk_size)
    ids, layout = example(5)
    rows = torch.arange(layout.rows * layout.length)
    with torch.no_grad():
        a, b = (p(ids, layout=layout, head_rows=rows) for p in (whole, other))
    assert torch.allclose(a, b, atol=1e-4)


def test_experts_are_lowered_too() -> None:
    before, after = before_and_after("lower-mixers", "kimi_linear")
    assert len(before.calls(ops.MOE_EXPERTS.op)) == len(after.calls(ops.MOE_EXPERTS.call("torch"))) == 3
    assert not after.calls(ops.MOE_EXPERTS.op)


def test_the_reference_stays_where_it_is_asked_for() -> None:
    program = lower(captured("bamba"), "decode", kernels="reference")
    assert program.calls(ops.LINEAR_ATTENTION.call("reference", step=True))
    assert program.history[-1].sites
    assert program.history[-1].delta == {}


def test_an_unknown_implementation_is_refused() -> None:
    before, _ = before_and_after("lower-mixers", "bamba")
    with pytest.raises(PassError, match="unknown implementation 'cuda'; use torch, triton or reference"):
        run_pipeline(before, [LowerMixers(implementation="cuda")], CHECKS)
