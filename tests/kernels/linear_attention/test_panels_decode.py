"""linear_attention in decoding: what a step keeps, commits, splits; and the schedule's own errors and cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flarec.errors import LayoutError
from flarec.kernels.linear_attention import reference as definition
from flarec.kernels.linear_attention import reference_states as states_of
from flarec.kernels.linear_attention.panels import chunk
from flarec.kernels.linear_attention.panels.commit import commit
from flarec.kernels.linear_attention.panels.schedule import StateSchedule
from flarec.layout import Block, Layout, build_layout
from tests.counting import calls_of
from tests.kernels.linear_attention.cases import Case, cases, poison_padding
from tests.oracles.layouts import layouts

# untyped: tests unpack inputs before further positional arguments
op: Any = chunk
reference: Any = definition
reference_states: Any = states_of

NAMES = ("q", "k", "v", "g", "beta")


@settings(max_examples=50, deadline=None)
@given(layout=layouts(single_document=True), case=cases, chunk_size=st.sampled_from([3, 64]), data=st.data())
def test_step_and_commit_equal_reference(layout: Layout, case: Case, chunk_size: int, data: st.DataObject) -> None:
    inputs = case.inputs(layout)
    clean, state = layout.clean_length, inputs["initial_state"]
    poisoned: Any = poison_padding(inputs, layout)
    options: Any = case.options()
    out, k_rows, d_rows, g_rows = op.two_stream_step(
        *(poisoned[n] for n in NAMES),
        StateSchedule.from_layout(layout, chunk_size),
        **options,
        initial_state=state,
        clean_length=clean,
    )
    arguments: Any = inputs
    expected = reference(*(arguments[n] for n in NAMES), layout, **options, initial_state=state)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)

    lengths = (layout.clean_document >= 0).sum(1).tolist()
    accepted = [data.draw(st.integers(0, n), label="accepted") for n in lengths]
    document = layout.clean_document.clone()
    for row, n in enumerate(accepted):
        document[row, n:] = -1
    short = Layout(
        document,
        layout.clean_position,
        layout.noisy_block.fill_(-1),
        *[
            getattr(layout, n)
            for n in ("noisy_position", "block_document", "block_anchor", "block_view", "block_readout", "cached")
        ],
    )
    del options["scale"]
    wanted = reference_states(*(arguments[n] for n in NAMES[1:]), short, **options, initial_state=state)
    assert state is not None
    behind = torch.arange(clean) >= torch.tensor(accepted)[:, None]
    k_rows, d_rows = (x.masked_fill(behind[:, :, None, None], float("nan")) for x in (k_rows, d_rows))
    got = commit(state.detach(), k_rows, d_rows, g_rows, torch.tensor(accepted))
    torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=1e-10)
    for row, n in enumerate(accepted):
        if n == 0:
            assert torch.equal(got[row], state[row])


def test_commit_of_no_rows_is_the_identity() -> None:
    state = torch.randn(2, 4, 3, 5)
    for g in (None, torch.zeros(2, 0, 4), torch.zeros(2, 0, 4, 3)):
        got = commit(state, torch.zeros(2, 0, 2, 3), torch.zeros(2, 0, 4, 5), g, torch.zeros(2, dtype=torch.int64))
        assert torch.equal(got, state)


def test_commit_keeps_accuracy_behind_a_long_prefill() -> None:
    gen = torch.Generator().manual_seed(0)
    rows = 4000
    k, d = (torch.randn(1, rows, 1, 4, generator=gen, dtype=torch.float64) for _ in range(2))
    g = -5 * torch.rand(1, rows, 1, generator=gen, dtype=torch.float64)
    state = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    count = torch.tensor([rows])
    exact = commit(state, k, d, g, count)
    got = commit(state.float(), k.float(), d.float(), g.float(), count)
    assert (got - exact).norm() / exact.norm() < 1e-6


@settings(max_examples=30, deadline=None)
@given(case=cases, length=st.integers(2, 20), split=st.integers(1, 19), drafts=st.integers(0, 3))
def test_split_with_rejected_drafts_equals_one_pass(case: Case, length: int, split: int, drafts: int) -> None:
    """Prefill, a step whose drafts are all rejected, the rest: as if the drafts had never been seen."""
    split = min(split, length - 1)
    whole = build_layout([[length]], [[]])
    inputs: Any = case.inputs(whole)
    options: Any = case.options()
    expected = op.two_stream(*(inputs[n] for n in NAMES), StateSchedule.from_layout(whole, 4), **options)

    first = build_layout([[split + drafts]], [[]])
    junk: Any = Case(case.gate, case.delta, case.l2norm, case.group, case.seed + 1).inputs(first)
    mixed = [None if inputs[n] is None else torch.cat([inputs[n][:, :split], junk[n][:, split:]], 1) for n in NAMES]
    _, k_rows, d_rows, g_rows = op.two_stream_step(
        *mixed, StateSchedule.from_layout(first, 4), **options, initial_state=None, clean_length=split + drafts
    )
    state = commit(torch.zeros_like(inputs["initial_state"]), k_rows, d_rows, g_rows, torch.tensor([split]))
    second = build_layout([[length - split]], [[]], cached=[split])
    rest = [None if inputs[n] is None else inputs[n][:, split:] for n in NAMES]
    got = op.two_stream(*rest, StateSchedule.from_layout(second, 4), **options, initial_state=state)
    torch.testing.assert_close(got, expected[:, split:], rtol=0, atol=1e-10)


def test_schedule_refuses_blocks_without_a_known_state() -> None:
    with pytest.raises(LayoutError, match="anchored at 3"):
        StateSchedule.from_layout(build_layout([[2]], [[Block(0, 3, 1)]], cached=[4]))
    with pytest.raises(LayoutError, match="anchored at 7"):
        StateSchedule.from_layout(build_layout([[2]], [[Block(0, 7, 1)]], cached=[4]))


def test_schedule_places_every_token_once() -> None:
    layout = build_layout([[9, 4], [3]], [[Block(0, 5, 4), Block(1, 4, 3)], [Block(0, 0, 2)]])
    schedule = StateSchedule.from_layout(layout, 4)
    placed = torch.cat([schedule.clean_token.flatten(), schedule.panel_token.flatten()])
    real = (layout.token_document() >= 0).flatten().nonzero().squeeze(1)
    assert torch.equal(placed[placed >= 0].sort().values, real)
    assert schedule.step_counts == (3, 1, 1)  # three documents; only the longest has a second and a third chunk


def step_layout(rows: int) -> Layout:
    """AR-Trust: five clean rows per request, a block behind each of them."""
    return build_layout([[5]] * rows, [[Block(0, 11 + i, 4) for i in range(5)]] * rows, cached=[10] * rows)


def test_schedule_of_a_decode_step_is_small() -> None:
    schedule = StateSchedule.from_layout(step_layout(8))
    assert (schedule.chunk_size, schedule.chunks, schedule.panels) == (5, 8, 8)


def test_schedule_of_a_decode_step_has_no_loop_over_requests() -> None:
    """The same few calls of Python functions for one request and for many (measured: 155)."""
    layouts_of_steps = [step_layout(rows) for rows in (1, 1, 8, 64)]  # the first call may import
    _, *calls = (calls_of(StateSchedule.from_layout, layout) for layout in layouts_of_steps)
    assert calls == calls[:1] * 3 and calls[0] < 250
