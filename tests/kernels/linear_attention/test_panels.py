"""linear_attention: the fast form against the reference in float64, forward and every gradient; leaks; extreme
decays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from flarec.kernels.linear_attention import reference
from flarec.kernels.linear_attention.panels.chunk import two_stream
from flarec.kernels.linear_attention.panels.schedule import StateSchedule
from flarec.layout import Block, Layout, build_layout
from tests.kernels.linear_attention.cases import Case, cases, poison_padding
from tests.oracles.layouts import layouts
from tests.oracles.visibility import visible_slots

ALL = [
    Case(gate, delta, l2norm, group, seed=7)
    for gate, delta, l2norm, group in itertools.product(
        ("none", "scalar", "channel"), (True, False), (True, False), (1, 2)
    )
]


def forward_and_gradients(
    op: Callable[..., Tensor], case: Case, inputs: dict[str, Tensor | None], where: Layout | StateSchedule
) -> tuple[Tensor, dict[str, Tensor]]:
    arguments: dict[str, Any] = {name: inputs[name] for name in ("q", "k", "v", "g", "beta")}
    out = op(*arguments.values(), where, **case.options(), initial_state=inputs["initial_state"])
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(case.seed), dtype=out.dtype)
    leaves = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()), materialize_grads=True)
    return out.detach(), dict(zip(leaves, grads, strict=True))


def assert_equal_to_reference(case: Case, layout: Layout, chunk_size: int) -> None:
    inputs = case.inputs(layout)
    expected, expected_grads = forward_and_gradients(reference, case, inputs, layout)
    schedule = StateSchedule.from_layout(layout, chunk_size)
    got, grads = forward_and_gradients(two_stream, case, poison_padding(inputs, layout), schedule)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-10, msg=f"the gradient of {name} differs")


@hypothesis_settings(max_examples=120, deadline=None)
@given(layout=layouts(), case=cases, chunk_size=st.sampled_from([1, 3, 4, 8, 64]))
def test_equals_reference(layout: Layout, case: Case, chunk_size: int) -> None:
    assert_equal_to_reference(case, layout, chunk_size)


@pytest.mark.parametrize("case", ALL, ids=lambda c: f"{c.gate}-{c.delta}-{c.l2norm}-{c.group}")
def test_every_kind_on_a_dense_layout(case: Case) -> None:
    """Two rows, two views, straddling blocks, both readouts, a block longer than a chunk, anchors at every kind of
    border."""
    grid = [Block(0, a, 3, view, "causal" if view else "block_end") for view in (0, 1) for a in range(5, 17, 3)]
    layout = build_layout(
        [[17, 6], [9]],
        [[*grid, Block(1, 0, 2), Block(1, 6, 3)], [Block(0, 2, 1), Block(0, 4, 7), Block(0, 9, 2, 0, "causal")]],
        cached=[0, 2],
    )
    assert_equal_to_reference(case, layout, 4)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("decay", [0.1, 8.0])
def test_float32_at_weak_and_strong_decay(gate: str, decay: float) -> None:
    case = Case(gate, True, True, 1, seed=3, decay=decay)
    layout = build_layout([[130]], [[Block(0, a, 4, view) for view in (0, 1) for a in range(20, 130, 4)]])
    exact, exact_grads = forward_and_gradients(reference, case, case.inputs(layout), layout)
    schedule = StateSchedule.from_layout(layout)
    got, grads = forward_and_gradients(two_stream, case, case.inputs(layout, torch.float32), schedule)
    plain, plain_grads = forward_and_gradients(reference, case, case.inputs(layout, torch.float32), layout)
    # the budget is what the float32 loop itself loses, times a margin for the other order of operations
    for mine, loop, true in [(got, plain, exact), *((grads[n], plain_grads[n], exact_grads[n]) for n in exact_grads)]:
        budget = 20 * (loop - true).norm() / true.norm() + 1e-6
        assert bool(mine.isfinite().all())
        assert (mine - true).norm() / true.norm() < budget


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
@pytest.mark.parametrize("delta", [True, False])
def test_gradcheck(gate: str, delta: bool) -> None:
    case = Case(gate, delta, True, 2, seed=1)
    layout = build_layout([[5, 2]], [[Block(0, 2, 2), Block(0, 5, 2, 0, "causal"), Block(1, 0, 1)]], clean_length=8)
    schedule = StateSchedule.from_layout(layout, 3)
    inputs = case.inputs(layout)
    names = [name for name in ("q", "k", "v", "g", "beta", "initial_state") if inputs[name] is not None]

    def op(*leaves: Tensor) -> Tensor:
        given_inputs = {**inputs, **dict(zip(names, leaves, strict=True))}
        state = given_inputs.pop("initial_state")
        arguments: Any = [given_inputs[name] for name in ("q", "k", "v", "g", "beta")]
        return two_stream(*[*arguments, schedule], scale=0.6, delta=delta, l2norm=True, initial_state=state)

    leaves: Any = [inputs[name] for name in names]
    whole = gate == "channel" and delta  # every entry, where every term takes part; elsewhere one projection of all
    assert torch.autograd.gradcheck(op, leaves, fast_mode=not whole)


@hypothesis_settings(max_examples=12, deadline=None)
@given(layout=layouts(max_clean=6, max_block=3, max_documents=2), gate=st.sampled_from(["scalar", "channel"]))
def test_no_leak(layout: Layout, gate: str) -> None:
    """The gradient of every output with respect to every value is zero exactly where the contract says "never
    reads"."""
    case = Case(gate, True, True, 1, seed=5)
    inputs = case.inputs(layout)
    arguments: Any = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    schedule = StateSchedule.from_layout(layout, 4)
    out = two_stream(*[*arguments, schedule], **case.options(), initial_state=inputs["initial_state"])
    v, k = arguments[2], arguments[1]
    for row in range(layout.rows):
        seen = visible_slots(layout, row)
        for slot in range(layout.length):
            grad_v, grad_k = torch.autograd.grad(out[row, slot].sum(), (v, k), retain_graph=True)
            read = {(r, s) for r, s in grad_v.abs().sum((2, 3)).nonzero().tolist()}
            assert read == {(row, s) for s in seen.get(slot, set())}
            assert {(r, s) for r, s in grad_k.abs().sum((2, 3)).nonzero().tolist()} <= read


def test_bfloat16_inputs_compute_in_float32() -> None:
    layout = build_layout([[40]], [[Block(0, a, 4) for a in range(8, 40, 4)]])
    case = Case("scalar", True, True, 1, seed=2)
    low: dict[str, Any] = {n: None if x is None else x.detach().bfloat16() for n, x in case.inputs(layout).items()}
    high: dict[str, Any] = {n: None if x is None else x.double() for n, x in low.items()}
    schedule = StateSchedule.from_layout(layout)
    names = ("q", "k", "v", "g", "beta")
    options: Any = {**case.options(), "initial_state": None}
    got = two_stream(*[*(low[n] for n in names), schedule], **options)
    exact = two_stream(*[*(high[n] for n in names), schedule], **options)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16(), rtol=0.01, atol=1e-6)


def test_equals_transformers_gated_delta_rule() -> None:
    """An oracle that we did not write: the clean stream is the plain op."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    case = Case("scalar", True, True, 1, seed=4)
    layout = build_layout([[37]], [[Block(0, 9, 4), Block(0, 20, 4)]])
    inputs = case.inputs(layout, torch.float32)
    arguments: Any = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    ours = two_stream(*[*arguments, StateSchedule.from_layout(layout, 8)], scale=4**-0.5, delta=True, l2norm=True)
    plain = getattr(torch_recurrent_gated_delta_rule, "__wrapped__", torch_recurrent_gated_delta_rule)
    clean = [x[:, :37] for x in arguments]
    theirs, _ = plain(*clean, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(ours[:, :37], theirs, rtol=1e-4, atol=1e-5)
