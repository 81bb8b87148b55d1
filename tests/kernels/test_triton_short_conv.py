"""Triton short convolution: forward and every gradient against the reference, in float64 and in the run's dtype."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec.errors import CaptureError, LayoutError
from flarec.kernels.short_conv import reference, torch_gather
from flarec.kernels.short_conv.readers import ENTER, LEAVE, NEAR, ConvSchedule
from flarec.kernels.short_conv.windows import conv_windows
from flarec.layout import Block, Layout, build_layout
from tests.oracles.layouts import layouts
from tests.oracles.visibility import conv_lag, tokens

triton_conv = pytest.importorskip("flarec.kernels.short_conv.triton_conv")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
widths = st.integers(2, 8)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN: a result is whole only if the kernel writes every element."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size, **options) -> Tensor:
        made = new_empty(self, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def padding_of(layout: Layout) -> Tensor:
    return (layout.token_document() < 0)[:, None].to(DEVICE)


def token_major(x: Tensor, wider: int = 0) -> Tensor:
    """x [B, C, T] as a view of a token-major projection of `wider` more channels."""
    rows, channels, length = x.shape
    storage = x.new_full((rows, length, channels + wider), float("nan"))
    storage[:, :, :channels] = x.transpose(1, 2)
    return storage[:, :, :channels].transpose(1, 2)


class Case:
    """Inputs of one layout in float64 on the CPU: padding is NaN in what the kernel sees, zero for the oracle."""

    def __init__(self, layout: Layout, width: int, channels: int, *, bias: bool, window: bool, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        self.layout, self.width = layout, width
        self.x, self.weight = draw(layout.rows, channels, layout.length), draw(channels, width)
        self.bias = draw(channels) if bias else None
        before_start = layout.cached[:, None] - (width - 1) + torch.arange(width - 1) < 0
        self.window = draw(layout.rows, channels, width - 1).masked_fill(before_start[:, None], 0) if window else None
        self.dy = draw(*self.x.shape)
        self.padding = layout.token_document() < 0

    def cast(self, dtype: torch.dtype) -> None:
        """Round the inputs, so that every dtype computes on the same values."""
        for name in ("x", "weight", "bias", "window", "dy"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(dtype).double())

    def inputs(self, dtype: torch.dtype, device: str = "cpu", *, poison: bool = False) -> list[Any]:
        x = self.x.masked_fill(self.padding[:, None], float("nan")) if poison else self.x
        made = [x, self.weight, self.bias, self.window]
        return [None if t is None else t.to(device, dtype).requires_grad_() for t in made]

    def expected(self, activation: str | None) -> list[Tensor]:
        """Output and gradients of the loop over tokens, in float64."""
        x, weight, bias, window = self.inputs(torch.float64)
        y = reference(x, weight, bias, self.layout, activation=activation, window=window)
        return self._gradients(y, [x, weight, bias, window])

    def gathered(self, dtype: torch.dtype, activation: str | None) -> list[Tensor]:
        """Output and gradients of the torch kernel in `dtype`: the reference, fast enough for long rows."""
        x, weight, bias, window = self.inputs(dtype)
        windows = conv_windows(self.layout, self.width)
        y = torch_gather.two_stream(x, weight, bias, windows, activation=activation, window=window)
        return self._gradients(y, [x, weight, bias, window])

    def got(self, dtype: torch.dtype, activation: str | None, wider: int = 0, region: int = 64) -> list[Tensor]:
        x, weight, bias, window = self.inputs(dtype, DEVICE, poison=True)
        schedule = ConvSchedule.from_layout(self.layout, self.width, region=region).to(DEVICE)
        y = triton_conv.two_stream(token_major(x, wider), weight, bias, schedule, activation=activation, window=window)
        assert y.dtype == dtype and y.transpose(1, 2).is_contiguous()
        return self._gradients(y, [x, weight, bias, window], poison=True)

    def _gradients(self, y: Tensor, inputs: list[Tensor | None], *, poison: bool = False) -> list[Tensor]:
        dy = self.dy.masked_fill(self.padding[:, None], float("nan")) if poison else self.dy
        wanted = [t for t in inputs if t is not None]
        grads = torch.autograd.grad(y, wanted, dy.to(y.device, y.dtype), materialize_grads=True)
        return [t.detach().double().cpu() for t in (y, *grads)]


# Triton's interpreter cuts bfloat16 off where a GPU rounds, which doubles the error.
EXACT_CAST = 0.0 if DEVICE == "cuda" else 2**-7
TIMES = {torch.bfloat16: 2 if DEVICE == "cuda" else 4}


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm()) if exact.norm() > 0 else float(got.norm())


def check_rounding(case: Case, dtype: torch.dtype, activation: str | None, wider: int = 0) -> None:
    """The kernel's error against float64 is at most twice that of the reference in `dtype`."""
    case.cast(dtype)
    exact, rounded = case.gathered(torch.float64, activation), case.gathered(dtype, activation)
    got = case.got(dtype, activation, wider)
    assert len(got) == len(exact)
    for name, mine, theirs, truth in zip(("y", "x", "weight", "bias", "window"), got, rounded, exact, strict=False):
        assert torch.isfinite(mine).all(), name
        allowed = torch.finfo(dtype).eps / 16  # where the reference happens to be exact
        assert relative(mine, truth) <= TIMES.get(dtype, 2) * relative(theirs, truth) + allowed, name


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), width=widths, region=st.sampled_from([1, 2, 5, 64]))
def test_schedule_visits_readers_first(layout: Layout, width: int, region: int) -> None:
    """Every slot once; reads as the oracle says; a region and its halo hold all readers, before what they read."""
    schedule = ConvSchedule.from_layout(layout, width, region=region)
    numbers, tensors = schedule.flat()
    assert all(t.dtype == torch.int32 for t in tensors)
    assert ConvSchedule.rebuild(numbers, tensors) == schedule
    for row in range(layout.rows):
        by_slot = {token.slot: token for token in tokens(layout, row)}
        steps = schedule.table[row].tolist()
        place = {entry[0]: index for index, entry in enumerate(steps)}
        assert sorted(place) == list(range(layout.length))
        readers: dict[int, list[int]] = {}
        for slot, code, *reads in steps:
            if slot not in by_slot:
                assert code == ENTER | LEAVE | NEAR and set(reads) <= {-1}
                continue
            for lag, read in enumerate(reads, start=1):
                source = conv_lag(layout, row, by_slot[slot], lag)
                expected = -1
                if source is not None:
                    where, index = source
                    expected = index if where == "slot" else -2 - (index - int(layout.cached[row]) + width - 1)
                assert read == expected
                if read >= 0:
                    readers.setdefault(read, []).append(slot)
        covered = []
        for halo, own, end in schedule.starts[row].tolist():
            covered += list(range(own, end))
            for slot, *_ in steps[own:end]:
                assert all(halo <= place[reader] < place[slot] for reader in readers.get(slot, []))
                near = [steps[place[r]][1] & NEAR for r in readers.get(slot, []) if place[r] < own]
                assert all(near)
        assert sorted(covered) == list(range(layout.length))


@settings(max_examples=60 if DEVICE == "cuda" else 8, deadline=None)
@given(
    layout=layouts(max_clean=7, max_block=5),
    width=st.integers(2, 5),
    channels=st.sampled_from([1, 3, 8]),
    activation=st.sampled_from([None, "silu"]),
    bias=st.booleans(),
    window=st.booleans(),
    region=st.sampled_from([2, 5, 64]),
    seed=st.integers(0, 99),
)
def test_equals_reference_in_float64(
    layout: Layout,
    width: int,
    channels: int,
    activation: str | None,
    bias: bool,
    window: bool,
    region: int,
    seed: int,
) -> None:
    case = Case(layout, width, channels, bias=bias, window=window, seed=seed)
    got = case.got(torch.float64, activation, region=region)
    for mine, truth in zip(got, case.expected(activation), strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-11)


@settings(max_examples=4, deadline=None)
@given(
    layout=layouts(cache=False, max_rows=1, max_clean=6, max_block=3), where=st.integers(0, 99), width=st.integers(2, 4)
)
def test_nothing_leaks(layout: Layout, where: int, width: int) -> None:
    """An input that is not finite spoils what reads it, and the gradients of what is read with it; nothing else."""
    case = Case(layout, width, 2, bias=False, window=False, seed=where)
    real = [token.slot for token in tokens(layout, 0)]
    case.x[0, :, real[where % len(real)]] = float("inf")
    got, expected = case.got(torch.float64, None), case.expected(None)
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=1e-11, equal_nan=True)
    case.dy[0, :, real[where % len(real)]] = float("inf")
    got, expected = case.got(torch.float64, "silu"), case.expected("silu")
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=1e-11, equal_nan=True)


def two_views(clean: int, block: int, prompt: int, rows: int = 1) -> Layout:
    """One document per row; every block of its response twice."""
    grid = [Block(0, anchor, block, view) for view in range(2) for anchor in range(min(prompt, clean), clean, block)]
    return build_layout([[clean]] * rows, [grid] * rows, noisy_length=sum(b.length for b in grid) + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_rounding(dtype: torch.dtype, width: int) -> None:
    case = Case(two_views(21, 4, 5), width, 24, bias=width == 3, window=False, seed=width)
    check_rounding(case, dtype, "silu" if width > 2 else None, wider=8)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_lengths(length: int) -> None:
    case = Case(two_views(length, 7, length // 2), 4, 8, bias=True, window=False, seed=length)
    check_rounding(case, torch.bfloat16, "silu")


@pytest.mark.gpu
@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1536, 1000])
def test_full_size_rounding(dtype: torch.dtype, width: int, channels: int) -> None:
    """The launches that training uses: several channel tiles, regions and rows; blocks of 1, 4 and 64."""
    for block in (1, 4, 64):
        case = Case(two_views(1000, block, 77, rows=2), width, channels, bias=width % 2 == 1, window=False, seed=width)
        check_rounding(case, dtype, "silu", wider=512)


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit() -> None:
    case = Case(two_views(1000, 4, 10, rows=2), 4, 1024, bias=True, window=False, seed=0)
    first, second = (case.got(torch.bfloat16, "silu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_addresses_beyond_32_bits() -> None:
    """A token's index times its stride passes 2^31 where x is a slice of a wide projection."""
    length, channels, wide = 50_000, 64, 45_056
    layout = build_layout([[length]], [[]])
    x = torch.zeros(1, length, wide, dtype=torch.bfloat16, device=DEVICE)[:, :, :channels]
    x.copy_(torch.randn(1, length, channels, device=DEVICE))
    weight = torch.randn(channels, 4, device=DEVICE)
    schedule = ConvSchedule.from_layout(layout, 4).to(DEVICE)
    windows = conv_windows(layout, 4).to(DEVICE)
    results = []
    for operand, rows in ((x.contiguous(), None), (x, schedule)):
        operand = operand.detach().transpose(1, 2).requires_grad_()
        if rows is None:
            y = torch_gather.two_stream(operand, weight, None, windows, activation="silu")
        else:
            y = triton_conv.two_stream(operand, weight, None, rows, activation="silu")
        results.append((y.detach(), torch.autograd.grad(y.float().square().sum(), operand)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0.02)


def test_other_memory_layouts_are_copied() -> None:
    """x, weight and dy need not be laid out as they are in the graph."""
    case = Case(two_views(9, 3, 2, rows=2), 4, 5, bias=False, window=False, seed=0)
    schedule = ConvSchedule.from_layout(case.layout, 4).to(DEVICE)
    leaf = torch.empty(4, 5, dtype=torch.float64, device=DEVICE).copy_(case.weight.t()).requires_grad_()
    x = case.x.clone().to(DEVICE).requires_grad_()  # token after token inside a channel
    y = triton_conv.two_stream(x, leaf.t(), None, schedule, activation=None)
    ours = torch.autograd.grad(y.sum(), [x, leaf])  # a gradient of ones with stride 0
    case.dy = torch.ones_like(case.dy)
    expected = case.expected(None)
    torch.testing.assert_close(y.detach().cpu(), expected[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(ours[0].cpu(), expected[1], rtol=0, atol=1e-11)
    torch.testing.assert_close(ours[1].t().cpu(), expected[2], rtol=0, atol=1e-11)


@pytest.mark.parametrize("optional", [False, True])
def test_custom_ops(optional: bool) -> None:
    layout = build_layout([[4]], [[Block(0, 2, 2)]], cached=[2])
    case = Case(layout, 3, 2, bias=optional, window=optional, seed=0)
    schedule = ConvSchedule.from_layout(layout, 3).to(DEVICE)
    x, weight, bias, window = case.inputs(torch.float32, DEVICE)
    tensors = (token_major(x.detach()).requires_grad_(), weight, bias, window, *schedule.flat()[1])
    torch.library.opcheck(triton_conv.short_conv_fwd, (*tensors, schedule.clean_length, True))
    with torch.no_grad():
        dy = token_major(torch.randn_like(x))
    detached = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(triton_conv.short_conv_bwd, (dy, *detached, True))


@settings(max_examples=40 if DEVICE == "cuda" else 10, deadline=None)
@given(
    layout=layouts(cache=True, max_clean=6, max_block=4, single_document=True),
    width=st.integers(2, 5),
    pending=st.integers(0, 3),
    seed=st.integers(0, 99),
    buffer_dtype=st.sampled_from([torch.float64, torch.float32]),
    token_major_buffer=st.booleans(),
)
def test_step_equals_lowered(
    layout: Layout, width: int, pending: int, seed: int, buffer_dtype: torch.dtype, token_major_buffer: bool
) -> None:
    channels, gen = 3, torch.Generator().manual_seed(seed)
    case = Case(layout, width, channels, bias=True, window=False, seed=seed)
    buffer = torch.randn(layout.rows, channels, width - 1 + pending, generator=gen, dtype=buffer_dtype)
    accepted = torch.randint(0, pending + 1, (layout.rows,), generator=gen)
    x, weight, bias = (t.detach() for t in case.inputs(torch.float64, poison=True)[:3])
    windows = conv_windows(layout, width)
    y, kept = torch_gather.step(x, weight, bias, buffer, accepted, windows, layout, activation="silu")

    ours = buffer.to(DEVICE)
    ours = token_major(ours) if token_major_buffer else ours
    schedule = ConvSchedule.from_layout(layout, width).to(DEVICE)
    operands = [t.to(DEVICE) for t in (x, weight, bias)]
    got_y, got_kept = triton_conv.step(
        *operands, ours, accepted.to(DEVICE), schedule, layout.clean_length, activation="silu"
    )
    assert got_kept.dtype == x.dtype
    torch.testing.assert_close(got_y.cpu(), y, rtol=0, atol=1e-11)
    padding = torch.cat([torch.zeros(layout.rows, width - 1, dtype=torch.bool), layout.clean_document < 0], dim=1)
    torch.testing.assert_close(got_kept.cpu(), kept.masked_fill(padding[:, None], 0), rtol=0, atol=0)


def test_step_in_bfloat16_with_a_float32_buffer() -> None:
    layout = build_layout([[2]], [[Block(0, 9, 3)]], cached=[7])
    case = Case(layout, 4, 8, bias=False, window=False, seed=1)
    x, weight = case.x.bfloat16(), case.weight.bfloat16()
    buffer, accepted = torch.randn(1, 8, 5), torch.tensor([1])
    windows = conv_windows(layout, 4)
    y, kept = torch_gather.step(x, weight, None, buffer, accepted, windows, layout, activation="silu")
    schedule = ConvSchedule.from_layout(layout, 4).to(DEVICE)
    operands = [t.to(DEVICE) for t in (x, weight)]
    got_y, got_kept = triton_conv.step(
        *operands, None, buffer.to(DEVICE), accepted.to(DEVICE), schedule, 2, activation="silu"
    )
    torch.testing.assert_close(got_kept.cpu(), kept, rtol=EXACT_CAST, atol=0)
    torch.testing.assert_close(got_y.cpu(), y, rtol=0.02, atol=0.02)


def test_refusals() -> None:
    layout = build_layout([[5]], [[]])
    x, weight = torch.randn(1, 3, 5, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    schedule = ConvSchedule.from_layout(layout, 4).to(DEVICE)
    with pytest.raises(LayoutError, match="widths 2 to 8, not 1"):
        ConvSchedule.from_layout(layout, 1)
    with pytest.raises(CaptureError, match="tanh"):
        triton_conv.two_stream(x, weight, None, schedule, activation="tanh")
    with pytest.raises(CaptureError, match="int32"):
        triton_conv.two_stream(x.int(), weight, None, schedule, activation=None)
    with pytest.raises(LayoutError, match="derive it from the layout of this batch"):
        triton_conv.two_stream(x[:, :, :4], weight, None, schedule, activation=None)
    with pytest.raises(CaptureError, match=r"weight \[3, 4\]"):
        triton_conv.two_stream(x, weight[:, :3], None, schedule, activation=None)
    with pytest.raises(CaptureError, match="at least 3"):
        triton_conv.step(x, weight, None, x[:, :, :2], x.new_zeros(1).long(), schedule, 5, activation=None)
    with pytest.raises(LayoutError, match="5 clean slots"):
        triton_conv.step(x, weight, None, x, x.new_zeros(1).long(), schedule, 4, activation=None)


def test_the_package_does_not_import_triton() -> None:
    """Machines without triton use the torch kernels."""
    code = (
        "import sys, flarec.kernels.short_conv, flarec.kernels.short_conv.readers; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
