"""short_conv: windows against the loop oracle, gathers against the reference, leaks, commits, NaN padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flarec.base import parts
from flarec.errors import CaptureError
from flarec.kernels.short_conv import reference
from flarec.kernels.short_conv.reference import reference_step
from flarec.kernels.short_conv.torch_gather import commit_window, next_buffer, step, two_stream
from flarec.kernels.short_conv.windows import conv_windows
from flarec.layout import Block, Layout, build_layout
from tests.oracles.layouts import layouts
from tests.oracles.visibility import conv_lag, tokens

widths = st.integers(1, 5)


@settings(max_examples=80, deadline=None)
@given(layout=layouts(), width=widths)
def test_windows_equal_oracle(layout: Layout, width: int) -> None:
    zero = width - 1 + layout.length
    expected = torch.full((layout.rows, layout.length, width), zero)
    for row in range(layout.rows):
        for token in tokens(layout, row):
            for lag in range(width):
                source = conv_lag(layout, row, token, lag)
                if source is not None:
                    where, index = source
                    shift = width - 1 if where == "slot" else width - 1 - int(layout.cached[row])
                    expected[row, token.slot, lag] = index + shift
    assert torch.equal(conv_windows(layout, width), expected)


@settings(max_examples=40, deadline=None)
@given(
    layout=layouts(max_clean=8, max_block=4),
    width=widths,
    activation=st.sampled_from([None, "silu", "swish"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_two_stream_equals_reference(
    layout: Layout, width: int, activation: str | None, with_bias: bool, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(layout.rows, 3, layout.length, generator=gen, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, width, generator=gen, dtype=torch.float64).requires_grad_()
    window = torch.randn(layout.rows, 3, width - 1, generator=gen, dtype=torch.float64)
    before_start = layout.cached[:, None] - (width - 1) + torch.arange(width - 1) < 0
    window = window.masked_fill(before_start[:, None], 0).requires_grad_()
    bias = torch.randn(3, generator=gen, dtype=torch.float64).requires_grad_() if with_bias else None
    inputs = [t for t in (x, weight, window, bias) if t is not None]

    expected = reference(x, weight, bias, layout, activation=activation, window=window)
    weights = torch.randn(expected.shape, generator=gen, dtype=torch.float64)
    grads = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True)
    padding = (layout.token_document() < 0)[:, None]
    poisoned = x.detach().masked_fill(padding, float("nan")).requires_grad_()
    windows = conv_windows(layout, width)
    got = two_stream(poisoned, weight, bias, windows, activation=activation, window=window)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    mine = torch.autograd.grad((got * weights).sum(), [poisoned, *inputs[1:]], materialize_grads=True)
    for got_grad, expected_grad in zip(mine, grads, strict=True):
        torch.testing.assert_close(got_grad, expected_grad, rtol=0, atol=1e-12)


def test_clean_stream_equals_conv1d() -> None:
    layout = build_layout([[9]], [[Block(0, 4, 3)]])
    x, weight = torch.randn(1, 5, layout.length, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = torch.nn.functional.conv1d(x[:, :, :9], weight[:, None], padding=3, groups=5)[:, :, :9]
    got = two_stream(x, weight, None, conv_windows(layout, 4), activation=None)
    torch.testing.assert_close(got[:, :, :9], expected)


@settings(max_examples=20, deadline=None)
@given(layout=layouts(cache=False, max_clean=6, max_block=3))
def test_no_leak(layout: Layout) -> None:
    width = 3
    x = torch.randn(layout.rows, 2, layout.length, dtype=torch.float64).requires_grad_()
    out = two_stream(x, torch.ones(2, width, dtype=torch.float64), None, conv_windows(layout, width), activation=None)
    for row in range(layout.rows):
        by_slot = {token.slot: token for token in tokens(layout, row)}
        for slot in range(layout.length):
            (grad,) = torch.autograd.grad(out[row, :, slot].sum(), x, retain_graph=True)
            sources = [conv_lag(layout, row, by_slot[slot], lag) for lag in range(width)] if slot in by_slot else []
            expected = {(row, source[1]) for source in sources if source is not None}
            assert {(r, s) for r, s in grad.abs().sum(1).nonzero().tolist()} == expected


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 12), split=st.integers(0, 12), width=widths, seed=st.integers(0, 99))
def test_split_with_commit_equals_one_pass(length: int, split: int, width: int, seed: int) -> None:
    split = min(split, length)
    gen = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(1, 2, length, generator=gen), torch.randn(2, width, generator=gen)
    whole = reference(x, weight, None, build_layout([[length]], [[]]), activation="silu")
    rejected = torch.full((1, 2, 2), float("nan"))  # two rows that were drafted and not accepted
    buffer = next_buffer(torch.cat([x[:, :, :split], rejected], 2), torch.zeros(1, 2, width - 1), split + 2)
    window = commit_window(buffer, torch.tensor([split]), width)
    layout = build_layout([[length - split]], [[]], cached=[split], clean_length=max(1, length - split))
    rest = torch.zeros(1, 2, layout.length)
    rest[:, :, : length - split] = x[:, :, split:]
    got = two_stream(rest, weight, None, conv_windows(layout, width), activation="silu", window=window)
    torch.testing.assert_close(got[:, :, : length - split], whole[:, :, split:])


def test_bfloat16_and_unknown_activation() -> None:
    layout = build_layout([[5]], [[Block(0, 2, 3)]])
    x, weight = torch.randn(1, 2, layout.length).bfloat16(), torch.randn(2, 4).bfloat16()
    got = two_stream(x, weight, None, conv_windows(layout, 4), activation="silu")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, reference(x, weight, None, layout, activation="silu"))
    with pytest.raises(CaptureError, match="tanh"):
        two_stream(x, weight, None, conv_windows(layout, 4), activation="tanh")


@pytest.mark.parametrize("near", [parts.NEAR, 1, 600])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_step_equals_its_definition_however_many_requests_are_computed_at_a_time(
    near: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding and what was not accepted are undefined; the buffer lies in either memory order."""
    monkeypatch.setattr(parts, "NEAR", near)
    layout = build_layout([[3], [2], [3]], [[Block(0, 9, 2), Block(0, 7, 3)], [Block(0, 8, 2)], []], cached=[7, 7, 0])
    gen = torch.Generator().manual_seed(2)
    x, buffer = (torch.randn(3, 5, n, generator=gen, dtype=torch.float64) for n in (layout.length, 6))
    weight, bias = torch.randn(5, 4, generator=gen, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    accepted = torch.tensor([3, 1, 0])
    buffer[1, :, 4:], buffer[2] = float("nan"), 0
    x = x.masked_fill((layout.token_document() < 0)[:, None], float("nan"))
    given = (accepted, layout)
    expected, kept = reference_step(x, weight, bias, buffer, *given, activation=activation)
    for order in (buffer, buffer.transpose(1, 2).contiguous().transpose(1, 2)):
        windows = conv_windows(layout, 4, continues=True)
        y, found = step(x, weight, bias, order, accepted, windows, layout, activation=activation)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found, kept, rtol=0, atol=0, equal_nan=True)
