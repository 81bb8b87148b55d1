"""selective_scan: reference and fast form against an oracle in float64, forward and every gradient; leaks; decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec import ops
from flarec.errors import LayoutError
from flarec.kernels.diagonal.schedule import ScanSchedule
from flarec.kernels.diagonal.selective_scan import reference as specification
from flarec.kernels.diagonal.selective_scan import torch_scan
from flarec.layout import Block, Layout, build_layout
from tests.kernels.diagonal.cases import (
    CONTINUED,
    DENSE,
    Leaves,
    assert_same,
    poisoned,
    selective_leaves,
    with_gradients,
)
from tests.oracles import recurrences
from tests.oracles.layouts import layouts
from tests.oracles.visibility import visible_slots

TOKENS = ("x", "dt", "b", "c")
# untyped: tests unpack operands before further arguments
oracle_form: Any = recurrences.selective_scan
reference_form: Any = specification.reference
fast_form: Any = torch_scan.two_stream
reference_step: Any = specification.reference_step
fast_step: Any = torch_scan.step


def by_name(operands: Leaves) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return operands["x"], operands["dt"], operands["a"], operands["b"], operands["c"]


def check(layout: Layout, seed: int, chunk_size: int) -> None:
    """Reference and fast form equal the oracle, with NaN on padding."""
    leaves = selective_leaves(layout, seed)
    schedule = ScanSchedule.from_layout(layout, chunk_size)

    def oracle(initial_state: Tensor, **operands: Tensor) -> Tensor:
        out: Tensor = oracle_form(*operands.values(), layout, initial_state)
        return out

    def reference(initial_state: Tensor, **operands: Tensor) -> Tensor:
        out: Tensor = reference_form(*operands.values(), layout, initial_state=initial_state)
        return out

    def fast(initial_state: Tensor, **operands: Tensor) -> Tensor:
        out: Tensor = fast_form(*operands.values(), schedule, initial_state=initial_state)
        return out

    clean_weights = with_gradients(oracle, leaves, layout)
    assert_same(with_gradients(reference, poisoned(leaves, layout), layout), clean_weights)
    assert_same(with_gradients(fast, poisoned(leaves, layout), layout), clean_weights)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 999), chunk_size=st.sampled_from([1, 3, 4, 32]))
def test_equals_the_oracle(layout: Layout, seed: int, chunk_size: int) -> None:
    check(layout, seed, chunk_size)


@pytest.mark.parametrize("chunk_size", [4, 32])
def test_equals_the_oracle_on_a_dense_layout(chunk_size: int) -> None:
    check(DENSE, 7, chunk_size)


def test_a_document_behind_a_cached_one_starts_from_zero() -> None:
    check(CONTINUED, 3, 4)


def test_gradcheck() -> None:
    layout = build_layout([[5, 2]], [[Block(0, 2, 2), Block(0, 5, 2, 0, "causal"), Block(1, 0, 1)]], clean_length=8)
    schedule = ScanSchedule.from_layout(layout, 3)

    def op(*leaves: Tensor) -> Tensor:
        out: Tensor = fast_form(*leaves[:5], schedule, initial_state=leaves[5])
        return out

    assert torch.autograd.gradcheck(op, tuple(selective_leaves(layout, 1).values()))


@settings(max_examples=12, deadline=None)
@given(layout=layouts(max_clean=6, max_block=3, max_documents=2))
def test_no_leak(layout: Layout) -> None:
    """Gradients of every output are zero exactly where the contract says "reads no"."""
    leaves = selective_leaves(layout, 5)
    out = fast_form(*by_name(leaves), ScanSchedule.from_layout(layout, 4), initial_state=leaves["initial_state"])
    for row in range(layout.rows):
        seen = visible_slots(layout, row)
        for slot in range(layout.length):
            x, dt, b, c = torch.autograd.grad(
                out[row, slot].sum(), [leaves[name] for name in TOKENS], retain_graph=True, materialize_grads=True
            )
            read = {(row, s) for s in seen.get(slot, set())}
            assert {(r, s) for r, s in x.abs().sum(2).nonzero().tolist()} == read
            for other in (dt, b):
                assert {(r, s) for r, s in other.abs().sum(2).nonzero().tolist()} <= read
            assert {(r, s) for r, s in c.abs().sum(2).nonzero().tolist()} <= {(row, slot)}


def test_float32_follows_float64_over_a_long_row() -> None:
    """The budget is what the float32 reference itself loses, times a margin for the other order of operations."""
    layout = build_layout([[130]], [[Block(0, a, 4, view) for view in (0, 1) for a in range(20, 130, 4)]])
    schedule = ScanSchedule.from_layout(layout)

    def fast(initial_state: Tensor, **operands: Tensor) -> Tensor:
        out: Tensor = fast_form(*operands.values(), schedule, initial_state=initial_state)
        return out

    def reference(initial_state: Tensor, **operands: Tensor) -> Tensor:
        out: Tensor = reference_form(*operands.values(), layout, initial_state=initial_state)
        return out

    exact = with_gradients(reference, selective_leaves(layout, 3), layout)
    got = with_gradients(fast, selective_leaves(layout, 3, torch.float32), layout)
    loop = with_gradients(reference, selective_leaves(layout, 3, torch.float32), layout)
    pairs = [(got[0], loop[0], exact[0]), *((got[1][n], loop[1][n], exact[1][n]) for n in exact[1])]
    for mine, plain, true in pairs:
        assert (mine - true).norm() / true.norm() < 20 * (plain - true).norm() / true.norm() + 1e-6


def test_bfloat16_inputs_compute_in_float32() -> None:
    layout = build_layout([[40]], [[Block(0, a, 4) for a in range(8, 40, 4)]])
    low = {name: leaf.detach().bfloat16() for name, leaf in selective_leaves(layout, 2).items()}
    schedule = ScanSchedule.from_layout(layout)
    got = fast_form(*by_name(low), schedule)
    exact = fast_form(*by_name({name: x.double() for name, x in low.items()}), schedule)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16(), rtol=0.01, atol=1e-6)


def test_the_captured_op_is_a_plain_causal_scan() -> None:
    layout = build_layout([[6], [6]], [[], []])
    operands = by_name(selective_leaves(layout, 4))
    torch.library.opcheck(
        ops.SELECTIVE_SCAN.op, operands, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    state = torch.zeros(2, 3, 4, dtype=torch.float64)
    expected = oracle_form(*operands, layout, state)
    torch.testing.assert_close(ops.SELECTIVE_SCAN(*operands), expected)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    got = torch.autograd.grad(ops.SELECTIVE_SCAN(*operands), operands, weight)
    wanted = torch.autograd.grad(expected, operands, weight)
    for mine, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, true)


def test_memory_holds_one_chunk_of_states() -> None:
    """Nothing that the backward keeps has tokens x channels x states elements."""
    layout = build_layout([[256]], [[Block(0, a, 4) for a in range(32, 256, 4)]])
    gen = torch.Generator().manual_seed(0)
    size, channels, states = layout.length, 32, 16
    x, dt = (torch.rand(1, size, channels, generator=gen, requires_grad=True) for _ in range(2))
    b, c = (torch.rand(1, size, states, generator=gen, requires_grad=True) for _ in range(2))
    a = -torch.rand(channels, states, generator=gen)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fast_form(x, dt, a, b, c, ScanSchedule.from_layout(layout, 32))
    assert 0 < sum(kept) <= 2 * size * (channels + states) + channels * states * (1 + 256 // 32)


def step(
    layout: Layout, operands: Leaves, cache: tuple[Tensor, ...], accepted: Tensor, *, fast: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, next cache) of one decode step."""
    arguments: Any = (*by_name(operands), *cache, accepted)
    if fast:
        y, *new = fast_step(*arguments, ScanSchedule.from_layout(layout), layout)
    else:
        y, *new = reference_step(*arguments, layout)
    return y, tuple(new)


@pytest.mark.parametrize("fast", [True, False])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_steps_equal_the_whole_row(fast: bool, data: st.DataObject) -> None:
    """Steps with drafts, of which any number is accepted, and noisy blocks: as one pass over what was accepted."""
    rows, length = 2, data.draw(st.integers(3, 9), label="length")
    whole = build_layout([[length]] * rows, [[]] * rows)
    text = {name: leaf.detach() for name, leaf in selective_leaves(whole, 1).items()}
    expected = oracle_form(*by_name(text), whole, torch.zeros_like(text["initial_state"]))

    empty = torch.zeros(rows, 0, 3, dtype=torch.float64)
    state = torch.zeros(rows, 3, 4, dtype=torch.float64)
    cache: tuple[Tensor, ...] = (state, empty, empty, torch.zeros(rows, 0, 4, dtype=torch.float64))
    accepted, done = torch.zeros(rows, dtype=torch.int64), [0] * rows
    while min(done) < length:
        keep = [data.draw(st.integers(0, length - n)) for n in done]
        keep[0] = max(keep[0], min(1, length - done[0]))  # so that the loop ends
        keep[1] = max(keep[1], min(1, length - done[1]))
        drafts = data.draw(st.integers(0, 2), label="rejected")
        size = [n + drafts for n in keep]
        blocks = [[Block(0, done[r] + keep[r], 2), Block(0, done[r], 2, 0, "causal")] for r in range(rows)]
        layout = build_layout([[n] for n in size], blocks, cached=done)
        junk = {name: leaf.detach() for name, leaf in selective_leaves(layout, 2).items()}
        operands = {"a": text["a"]}
        for name in TOKENS:
            mixed = junk[name].clone()
            for r in range(rows):
                mixed[r, : keep[r]] = text[name][r, done[r] : done[r] + keep[r]]
            operands[name] = mixed
        y, cache = step(layout, poisoned(operands, layout), cache, accepted, fast=fast)
        assert all(part.isfinite().all() for part in cache), "pending rows of padding slots hold 0"
        for r in range(rows):
            torch.testing.assert_close(y[r, : keep[r]], expected[r, done[r] : done[r] + keep[r]], rtol=0, atol=1e-10)
        accepted = torch.tensor(keep)
        done = [n + k for n, k in zip(done, keep, strict=True)]


@pytest.mark.parametrize("channels", [3, 37, 64])
def test_the_state_is_the_same_however_rows_are_committed(channels: int) -> None:
    """Bit by bit in float32: drafts are verified in steps of many rows, causal decoding commits one row each."""
    gen = torch.Generator().manual_seed(0)
    x, dt = (torch.rand(2, 40, channels, generator=gen) for _ in range(2))
    b, a = torch.randn(2, 40, 5, generator=gen), -torch.rand(channels, 5, generator=gen)
    state = torch.randn(2, channels, 5, generator=gen)
    whole = torch_scan.commit(state, x, dt, b, a, torch.tensor([40, 33]))
    for sizes in ([1] * 40, [5] * 8, [39, 1]):
        begin, current = 0, state
        for size in sizes:
            part = slice(begin, begin + size)
            count = (torch.tensor([40, 33]) - begin).clamp(0, size)
            current = torch_scan.commit(current, x[:, part], dt[:, part], b[:, part], a, count)
            begin += size
        assert torch.equal(current, whole)


def test_a_denoise_step_changes_nothing() -> None:
    """No clean rows, nothing accepted: the state is the very same, and no row is pending."""
    layout = build_layout([[], []], [[Block(0, 4, 3)], [Block(0, 2, 3)]], cached=[4, 2])
    operands = {name: leaf.detach() for name, leaf in selective_leaves(layout, 3).items()}
    state = operands.pop("initial_state")
    pending = [torch.full((2, 5, n), float("nan"), dtype=torch.float64) for n in (3, 3, 4)]
    y, (after, *rows) = step(layout, operands, (state, *pending), torch.zeros(2, dtype=torch.int64), fast=True)
    assert torch.equal(after, state)
    assert [tuple(row.shape) for row in rows] == [(2, 0, 3), (2, 0, 3), (2, 0, 4)]
    expected = oracle_form(*by_name(operands), layout, state)
    torch.testing.assert_close(y, expected)


def test_the_schedule_refuses_blocks_without_a_known_state() -> None:
    for anchor in (3, 7):
        layout = build_layout([[2]], [[Block(0, anchor, 1)]], cached=[4])
        with pytest.raises(LayoutError, match=f"row 0: a block of document 0 is anchored at {anchor}; .* 4 to 6 only"):
            ScanSchedule.from_layout(layout)


def test_the_schedule_bounds_its_panels() -> None:
    """However many blocks start at one place, a panel holds the tokens of a few chunks."""
    layout = build_layout([[8]], [[Block(0, 8, 4) for _ in range(100)]])
    schedule = ScanSchedule.from_layout(layout, 8)
    sizes = [panel.longest * (panel.end - panel.begin) for group in schedule.panels for panel in group]
    assert max(sizes) <= 4 * 8
    assert sum(sizes) == 400
