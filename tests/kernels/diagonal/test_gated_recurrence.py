"""gated_recurrence: reference and fast form against an oracle in float64, with every gradient; leaks; decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec import ops
from flarec.kernels.diagonal.gated_recurrence import reference as specification
from flarec.kernels.diagonal.gated_recurrence import torch_walk
from flarec.kernels.diagonal.schedule import ScanSchedule
from flarec.kernels.linear_attention import reference as linear_attention
from flarec.layout import Block, Layout, build_layout
from tests.kernels.diagonal.cases import CONTINUED, DENSE, assert_same, gated_leaves, poisoned, with_gradients
from tests.oracles import recurrences
from tests.oracles.layouts import layouts
from tests.oracles.visibility import visible_slots

# untyped: a test unpacks the cache before further arguments
reference_step: Any = specification.reference_step
fast_step: Any = torch_walk.step


def one_chunk(layout: Layout) -> ScanSchedule:
    return ScanSchedule.from_layout(layout, None)


def check(layout: Layout, seed: int) -> None:
    """Reference and fast form equal the oracle, with NaN on padding."""
    leaves = gated_leaves(layout, seed)

    def oracle(x: Tensor, a: Tensor, initial_state: Tensor) -> Tensor:
        return recurrences.gated_recurrence(x, a, layout, initial_state)

    def reference(x: Tensor, a: Tensor, initial_state: Tensor) -> Tensor:
        return specification.reference(x, a, layout, initial_state=initial_state)

    def fast(x: Tensor, a: Tensor, initial_state: Tensor) -> Tensor:
        return torch_walk.two_stream(x, a, one_chunk(layout), initial_state=initial_state)

    wanted = with_gradients(oracle, leaves, layout)
    assert_same(with_gradients(reference, poisoned(leaves, layout), layout), wanted)
    assert_same(with_gradients(fast, poisoned(leaves, layout), layout), wanted)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 999))
def test_equals_the_oracle(layout: Layout, seed: int) -> None:
    check(layout, seed)


def test_equals_the_oracle_on_a_dense_layout() -> None:
    check(DENSE, 7)


def test_a_document_behind_a_cached_one_starts_from_zero() -> None:
    check(CONTINUED, 3)


def test_it_is_linear_attention_with_one_key_per_channel() -> None:
    """H = C heads of K = V = 1 with q = k = beta = 1: the block_end readout is that of linear attention, too."""
    leaves = {name: leaf.detach() for name, leaf in gated_leaves(DENSE, 2).items()}
    decay = leaves["a"].clamp_min(0.01)
    ones = torch.ones_like(decay)
    expected = linear_attention(
        ones[..., None],
        ones[..., None],
        leaves["x"][..., None],
        decay.log(),
        ones,
        DENSE,
        scale=1.0,
        delta=False,
        l2norm=False,
        initial_state=leaves["initial_state"][..., None, None],
    )
    got = torch_walk.two_stream(leaves["x"], decay, one_chunk(DENSE), initial_state=leaves["initial_state"])
    torch.testing.assert_close(got, expected[..., 0])


def test_equals_transformers() -> None:
    """An oracle that we did not write: the clean stream is the plain op."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    layout = build_layout([[37], [37]], [[Block(0, 9, 4)], [Block(0, 20, 4)]])
    leaves = {name: leaf.detach() for name, leaf in gated_leaves(layout, 4, torch.float32).items()}
    x, a = leaves["x"], leaves["a"]
    reset = (torch.arange(37) == 0)[None, :, None]
    scan = RecurrentGemmaRglru._rnn_scan
    theirs, _ = scan(None, x[:, :37], a[:, :37], reset, None)
    torch.testing.assert_close(torch_walk.two_stream(x, a, one_chunk(layout))[:, :37], theirs)


def test_gradcheck() -> None:
    layout = build_layout([[5, 2]], [[Block(0, 2, 2), Block(0, 5, 2, 0, "causal"), Block(1, 0, 1)]], clean_length=8)

    def op(x: Tensor, a: Tensor, initial_state: Tensor) -> Tensor:
        return torch_walk.two_stream(x, a, one_chunk(layout), initial_state=initial_state)

    assert torch.autograd.gradcheck(op, tuple(gated_leaves(layout, 1).values()))


@settings(max_examples=12, deadline=None)
@given(layout=layouts(max_clean=6, max_block=3, max_documents=2))
def test_no_leak(layout: Layout) -> None:
    """Gradients of every output are zero exactly where the contract says "reads no"."""
    leaves = gated_leaves(layout, 5)
    x, a = leaves["x"], (leaves["a"].detach().clamp_min(0.01)).requires_grad_()  # a decay of 0 forgets what is read
    out = torch_walk.two_stream(x, a, one_chunk(layout), initial_state=leaves["initial_state"])
    for row in range(layout.rows):
        seen = visible_slots(layout, row)
        for slot in range(layout.length):
            grad_x, grad_a = torch.autograd.grad(out[row, slot].sum(), (x, a), retain_graph=True)
            read = {(row, s) for s in seen.get(slot, set())}
            assert {(r, s) for r, s in grad_x.abs().sum(2).nonzero().tolist()} == read
            assert {(r, s) for r, s in grad_a.abs().sum(2).nonzero().tolist()} <= read


def test_bfloat16_inputs_compute_in_float32() -> None:
    layout = build_layout([[40]], [[Block(0, a, 4) for a in range(8, 40, 4)]])
    low = {name: leaf.detach().bfloat16() for name, leaf in gated_leaves(layout, 2).items()}
    got = torch_walk.two_stream(low["x"], low["a"], one_chunk(layout))
    exact = torch_walk.two_stream(low["x"].double(), low["a"].double(), one_chunk(layout))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16(), rtol=0.01, atol=1e-6)


def test_the_captured_op_is_a_plain_causal_recurrence() -> None:
    layout = build_layout([[6], [6]], [[], []])
    leaves = gated_leaves(layout, 4)
    operands = (leaves["x"], leaves["a"])
    torch.library.opcheck(
        ops.GATED_RECURRENCE.op, operands, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    expected = recurrences.gated_recurrence(*operands, layout, torch.zeros(2, 5, dtype=torch.float64))
    torch.testing.assert_close(ops.GATED_RECURRENCE(*operands), expected)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    got = torch.autograd.grad(ops.GATED_RECURRENCE(*operands), operands, weight)
    for mine, true in zip(got, torch.autograd.grad(expected, operands, weight), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("fast", [True, False])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_steps_equal_the_whole_row(fast: bool, data: st.DataObject) -> None:
    """Steps with drafts, of which any number is accepted, and noisy blocks: as one pass over what was accepted."""
    length = data.draw(st.integers(3, 9), label="length")
    whole = build_layout([[length]], [[]])
    text = {name: leaf.detach() for name, leaf in gated_leaves(whole, 1).items()}
    expected = recurrences.gated_recurrence(text["x"], text["a"], whole, torch.zeros(1, 5, dtype=torch.float64))
    rows = torch.zeros(1, 0, 5, dtype=torch.float64)
    cache: Any = (torch.zeros(1, 5, dtype=torch.float64), rows, rows)
    done, keep = 0, 0
    while done < length:
        accepted = torch.tensor([keep])
        keep = data.draw(st.integers(1, length - done), label="accepted")
        drafts = data.draw(st.integers(0, 2), label="rejected")
        blocks = [Block(0, done + keep, 2), Block(0, done, 2, 0, "causal")]
        layout = build_layout([[keep + drafts]], [blocks], cached=[done], clean_length=keep + drafts + 1)
        mixed = {name: leaf.detach().clone() for name, leaf in gated_leaves(layout, 2).items()}
        for name in ("x", "a"):
            mixed[name][:, :keep] = text[name][:, done : done + keep]
        poison = poisoned(mixed, layout)
        if fast:
            y, *cache = fast_step(poison["x"], poison["a"], *cache, accepted, one_chunk(layout), layout)
        else:
            y, *cache = reference_step(poison["x"], poison["a"], *cache, accepted, layout)
        assert all(part.isfinite().all() for part in cache), "pending rows of padding slots hold 0"
        torch.testing.assert_close(y[:, :keep], expected[:, done : done + keep], rtol=0, atol=1e-10)
        done += keep


def test_the_state_is_the_same_however_rows_are_committed() -> None:
    """Bit by bit in float32: drafts are verified in steps of many rows, causal decoding commits one row each."""
    gen = torch.Generator().manual_seed(0)
    x, a = (torch.rand(2, 40, 37, generator=gen) for _ in range(2))
    state, count = torch.randn(2, 37, generator=gen), torch.tensor([40, 33])
    whole = torch_walk.commit(state, x, a, count)
    for sizes in ([1] * 40, [5] * 8, [39, 1]):
        begin, current = 0, state
        for size in sizes:
            part = slice(begin, begin + size)
            current = torch_walk.commit(current, x[:, part], a[:, part], (count - begin).clamp(0, size))
            begin += size
        assert torch.equal(current, whole)


def test_rejected_rows_may_hold_anything() -> None:
    state, junk = torch.randn(2, 5), torch.full((2, 3, 5), float("nan"))
    assert torch.equal(torch_walk.commit(state, junk, junk, torch.tensor([0, 0])), state)
    rows = torch.cat([torch.ones(2, 1, 5), junk], dim=1)
    torch.testing.assert_close(
        torch_walk.commit(state, rows, rows, torch.tensor([1, 0])), state + torch.tensor([[1.0], [0]])
    )
