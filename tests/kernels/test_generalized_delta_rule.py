"""Generalised delta rule: reference and chunk form against an oracle in float64, leaks, decode steps, NaN padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec import ops
from flarec.errors import LayoutError
from flarec.kernels.generalized_delta_rule import reference as definition
from flarec.kernels.generalized_delta_rule import torch_chunk
from flarec.kernels.generalized_delta_rule.reference import reference_step
from flarec.kernels.generalized_delta_rule.schedule import DeltaSchedule
from flarec.kernels.linear_attention import reference as linear_attention
from flarec.layout import Block, Layout, build_layout
from flarec.ops.generalized_delta_rule import GENERALIZED_DELTA_RULE
from tests.kernels.diagonal.cases import CONTINUED, DENSE
from tests.oracles.layouts import layouts
from tests.oracles.recurrences import folded, spread
from tests.oracles.visibility import visible_slots

H, K, V, SCALE = 2, 3, 4, 0.7
NAMES = ("q", "k", "v", "g", "a", "b")
Leaves = dict[str, Tensor]


def leaves(layout: Layout, seed: int, dtype: torch.dtype = torch.float64) -> Leaves:
    """Random operands and an initial state; transitions do not grow: b = -a * (0..1) for unit vectors a."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    shape = (layout.rows, layout.length, H)
    a = torch.nn.functional.normalize(normal(*shape, K), dim=-1)
    tensors = {
        "q": normal(*shape, K),
        "k": normal(*shape, K),
        "v": normal(*shape, V),
        "g": -normal(*shape, K).exp(),
        "a": a,
        "b": -a * normal(*shape, K).sigmoid(),
        "initial_state": normal(layout.rows, H, K, V),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def poisoned(operands: Leaves, layout: Layout) -> Leaves:
    """The same leaves with NaN on padding slots."""
    padding = (layout.token_document() < 0)[:, :, None, None]
    return {
        name: x if name == "initial_state" else x.detach().masked_fill(padding, float("nan")).requires_grad_()
        for name, x in operands.items()
    }


def oracle(layout: Layout, *, initial_state: Tensor, **x: Tensor) -> Tensor:
    """Every token folds its own path; no kernel is imported."""

    def first(row: int, document: int) -> Tensor:
        return initial_state[row] if document == 0 else torch.zeros_like(initial_state[row])

    def update(state: Tensor, row: int, slot: int) -> Tensor:
        identity = torch.diag_embed(x["g"][row, slot].exp())
        transition = identity + x["b"][row, slot][..., None] * x["a"][row, slot][:, None]
        return transition @ state + x["k"][row, slot][..., None] * x["v"][row, slot][:, None]

    states = folded(layout, first, update)
    values = {(r, s): SCALE * (x["q"][r, s][:, None] @ state).squeeze(1) for (r, s), state in states.items()}
    return spread(values, layout, x["v"][0, 0])


def with_gradients(op: Callable[..., Tensor], operands: Leaves, layout: Layout) -> tuple[Tensor, Leaves]:
    """(output, gradient of each leaf); the weights of padding are NaN, which must not matter."""
    out = op(**operands)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    weights = weights.masked_fill((layout.token_document() < 0)[:, :, None, None], float("nan"))
    grads = torch.autograd.grad(out, list(operands.values()), weights, materialize_grads=True)
    return out.detach(), dict(zip(operands, grads, strict=True))


def check(layout: Layout, seed: int, chunk_size: int) -> None:
    operands = leaves(layout, seed)
    schedule = DeltaSchedule.from_layout(layout, chunk_size)
    wanted = with_gradients(lambda **x: oracle(layout, **x), operands, layout)
    forms: tuple[Callable[..., Tensor], ...] = (
        lambda **x: definition(**x, layout=layout, scale=SCALE),
        lambda **x: torch_chunk.two_stream(**x, schedule=schedule, scale=SCALE),
    )
    for form in forms:
        got = with_gradients(form, poisoned(operands, layout), layout)
        torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-10)
        for name, grad in wanted[1].items():
            torch.testing.assert_close(got[1][name], grad, rtol=0, atol=1e-9, msg=f"the gradient of {name} differs")


@settings(max_examples=40, deadline=None)
@given(layout=layouts(max_clean=10, max_block=5), seed=st.integers(0, 999), chunk_size=st.sampled_from([1, 3, 16]))
def test_equals_the_oracle(layout: Layout, seed: int, chunk_size: int) -> None:
    check(layout, seed, chunk_size)


@pytest.mark.parametrize(("layout", "chunk_size"), [(DENSE, 4), (CONTINUED, 4)])
def test_equals_the_oracle_at_every_kind_of_border(layout: Layout, chunk_size: int) -> None:
    check(layout, 7, chunk_size)


def test_with_the_key_as_vector_it_is_the_gated_delta_rule() -> None:
    """a = -exp(g) k and b = beta k erase what the delta rule erases."""
    x = {name: leaf.detach() for name, leaf in leaves(DENSE, 2).items()}
    g, beta = x["g"][..., 0], x["b"][..., 0].sigmoid()
    key = torch.nn.functional.normalize(x["k"], dim=-1)
    expected = linear_attention(
        x["q"], key, x["v"], g, beta, DENSE, scale=SCALE, delta=True, l2norm=False, initial_state=x["initial_state"]
    )
    got = torch_chunk.two_stream(
        x["q"], key, x["v"] * beta[..., None], g[..., None].expand_as(key), -g.exp()[..., None] * key,
        beta[..., None] * key, DeltaSchedule.from_layout(DENSE), scale=SCALE, initial_state=x["initial_state"],
    )
    torch.testing.assert_close(got, expected)


@settings(max_examples=10, deadline=None)
@given(layout=layouts(max_clean=6, max_block=3, max_documents=2))
def test_no_leak(layout: Layout) -> None:
    """Gradients of every output are zero exactly where the contract says "reads no"."""
    operands: Any = leaves(layout, 5)
    out = torch_chunk.two_stream(**operands, schedule=DeltaSchedule.from_layout(layout, 2), scale=SCALE)
    inputs = [operands[name] for name in NAMES]
    for row in range(layout.rows):
        seen = visible_slots(layout, row)
        for slot in range(layout.length):
            grads = torch.autograd.grad(out[row, slot].sum(), inputs, retain_graph=True, materialize_grads=True)
            read = {(row, s) for s in seen.get(slot, set())}
            for name, grad in zip(NAMES, grads, strict=True):
                found = {(r, s) for r, s in grad.abs().sum((2, 3)).nonzero().tolist()}
                assert found == read if name == "v" else found <= read, name


def test_strong_decays_do_not_overflow() -> None:
    layout = build_layout([[40]], [[Block(0, 9, 4), Block(0, 31, 4, 0, "causal")]])
    operands: Any = {name: leaf.detach() for name, leaf in leaves(layout, 3, torch.float32).items()}
    operands["g"] = operands["g"] * 60
    got = torch_chunk.two_stream(**operands, schedule=DeltaSchedule.from_layout(layout), scale=SCALE)
    wide: Any = {name: x.double() for name, x in operands.items()}
    exact = definition(**wide, layout=layout, scale=SCALE)
    torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_compute_in_float32() -> None:
    layout = build_layout([[40]], [[Block(0, a, 4) for a in range(8, 40, 4)]])
    low: Any = {name: leaf.detach().bfloat16() for name, leaf in leaves(layout, 2).items()}
    schedule = DeltaSchedule.from_layout(layout)
    got = torch_chunk.two_stream(**low, schedule=schedule, scale=SCALE)
    exact = torch_chunk.two_stream(**{n: x.double() for n, x in low.items()}, schedule=schedule, scale=SCALE)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16(), rtol=0.01, atol=1e-3)


def test_the_captured_op_is_a_plain_causal_recurrence() -> None:
    layout = build_layout([[6], [6]], [[], []])
    operands = {name: x for name, x in leaves(layout, 4).items() if name != "initial_state"}
    torch.library.opcheck(
        GENERALIZED_DELTA_RULE.op,
        (*operands.values(), SCALE),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    expected = oracle(layout, **operands, initial_state=torch.zeros(2, H, K, V, dtype=torch.float64))
    got = GENERALIZED_DELTA_RULE(**operands, scale=SCALE)
    torch.testing.assert_close(got, expected)
    inputs = list(operands.values())
    weight = torch.randn(expected.shape, dtype=torch.float64)
    mine, true = (torch.autograd.grad(out, inputs, weight) for out in (got, expected))
    for grad, wanted in zip(mine, true, strict=True):
        torch.testing.assert_close(grad, wanted)


PENDING = ("k", "v", "g", "b", "u")


@pytest.mark.parametrize("fast", [True, False])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_steps_equal_the_whole_row(fast: bool, data: st.DataObject) -> None:
    """Steps with drafts, of which any number is accepted, and noisy blocks: as one pass over what was accepted."""
    length = data.draw(st.integers(3, 9), label="length")
    whole = build_layout([[length]], [[]])
    text = {name: leaf.detach() for name, leaf in leaves(whole, 1).items()}
    text["initial_state"] = torch.zeros(1, H, K, V, dtype=torch.float64)
    expected = oracle(whole, **text)
    sizes = {"k": K, "v": V, "g": K, "b": K, "u": V}
    cache = {f"pending_{name}": torch.zeros(1, 0, H, sizes[name], dtype=torch.float64) for name in PENDING}
    cache = {"state": text["initial_state"], **cache}
    done, keep = 0, 0
    while done < length:
        accepted = torch.tensor([keep])
        keep = data.draw(st.integers(1, length - done), label="accepted")
        drafts = data.draw(st.integers(0, 2), label="rejected")
        blocks = [Block(0, done + keep, 2), Block(0, done, 2, 0, "causal")]
        layout = build_layout([[keep + drafts]], [blocks], cached=[done], clean_length=keep + drafts + 1)
        mixed = {name: leaf.detach().clone() for name, leaf in leaves(layout, 2).items() if name in NAMES}
        for name in NAMES:
            mixed[name][:, :keep] = text[name][:, done : done + keep]
        operands: Any = {**poisoned(mixed, layout), **cache, "accepted": accepted, "layout": layout, "scale": SCALE}
        if fast:
            operands["schedule"] = DeltaSchedule.from_layout(layout, 3)
        o, *kept = torch_chunk.step(**operands) if fast else reference_step(**operands)
        assert all(part.isfinite().all() for part in kept), "pending rows of padding slots hold 0"
        cache = dict(zip(cache, kept, strict=True))
        torch.testing.assert_close(o[:, :keep], expected[:, done : done + keep], rtol=0, atol=1e-10)
        done += keep


def test_rejected_rows_may_hold_anything() -> None:
    state, count = torch.randn(2, H, K, V), torch.tensor([0, 0])
    keys, values = torch.full((2, 3, H, K), float("nan")), torch.full((2, 3, H, V), float("nan"))
    torch.testing.assert_close(torch_chunk.commit(state, keys, values, keys, keys, values, count), state)


def test_a_block_outside_of_its_document_is_refused() -> None:
    layout = build_layout([[2]], [[Block(0, 7, 1)]], cached=[4])
    with pytest.raises(LayoutError, match="row 0: a block of document 0 is anchored at 7"):
        DeltaSchedule.from_layout(layout)


def test_it_is_a_row_of_the_table() -> None:
    assert ops.mixer_of(GENERALIZED_DELTA_RULE.op) is GENERALIZED_DELTA_RULE
