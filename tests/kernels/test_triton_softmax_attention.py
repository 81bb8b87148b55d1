"""Triton softmax attention: its schedule against the oracle; forward and gradients against the reference in float64, in
all dtypes, with NaN on padding and in memory that no kernel has written yet; strides, refusals, custom ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec.errors import LayoutError, UsageError
from flarec.kernels.softmax_attention import reference, torch_sdpa
from flarec.kernels.softmax_attention.attention_schedule import QUERY_STEP, AttentionSchedule
from flarec.kernels.softmax_attention.mask import visibility
from flarec.layout import Block, Layout, build_layout
from tests.oracles.layouts import layouts
from tests.oracles.visibility import tokens, visible_slots

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from flarec.kernels.softmax_attention.triton_attention import supports, two_stream
from flarec.kernels.softmax_attention.triton_backward import backward
from flarec.kernels.softmax_attention.triton_forward import forward
from flarec.kernels.softmax_attention.triton_tiles import ScoreTiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
op: Any = two_stream  # untyped: tests unpack inputs before further positional arguments
windows = st.one_of(st.none(), st.integers(1, 9))


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def interpreter_rounds_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 off to bfloat16, a GPU rounds to nearest."""
    cut_off = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()
        return cut_off(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@dataclass(frozen=True)
class Case:
    """One attention over one layout."""

    dtype: torch.dtype = torch.float32
    key_heads: int = 1
    group: int = 1
    dim: int = 16
    value_dim: int = 16
    window: int | None = None
    softcap: float | None = None
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.dim**-0.5, "softcap": self.softcap}

    def inputs(self, layout: Layout) -> tuple[list[Tensor], Tensor]:
        """q, k, v and the gradient of the output, in the case's dtype."""
        gen = torch.Generator().manual_seed(self.seed)
        heads, shape = self.key_heads * self.group, (layout.rows, layout.length)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=gen, dtype=torch.float64).to(self.dtype).to(DEVICE)

        sizes = ((heads, self.dim), (self.key_heads, self.dim), (self.key_heads, self.value_dim))
        return [normal(shape[0], h, shape[1], d) for h, d in sizes], normal(*shape, heads, self.value_dim)


def grid(document: int, first: int, last: int, size: int, view: int = 0, readout: str = "block_end") -> list[Block]:
    return [Block(document, anchor, size, view, readout) for anchor in range(first, last, size)]


def dense_reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, case: Case) -> Tensor:
    """`reference` without its loop over tokens (tests/kernels/test_softmax_attention.py compares them)."""
    mask, real = visibility(layout, case.window), layout.token_document() >= 0
    q_wide, k_wide, v_wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    return torch_sdpa.two_stream(q_wide, k_wide, v_wide, mask, real=real, **case.options).to(q.dtype)


def loop_reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, case: Case) -> Tensor:
    return reference(q, k, v, layout, window=case.window, **case.options)


def with_gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def run_reference(case: Case, layout: Layout, dtype: torch.dtype, oracle: Any) -> dict[str, Tensor]:
    inputs, grad = case.inputs(layout)
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    return with_gradients(oracle(*leaves, layout, case), leaves, grad.to(dtype))


def run_triton(case: Case, layout: Layout) -> dict[str, Tensor]:
    """With NaN on padding, in the gradient of the output too."""
    inputs, grad = case.inputs(layout)
    padding = (layout.token_document() < 0)[:, None, :, None]
    leaves = [x.masked_fill(padding, float("nan")).requires_grad_() for x in inputs]
    out = op(*leaves, AttentionSchedule.from_layout(layout, window=case.window), **case.options)
    results = with_gradients(out, leaves, grad.masked_fill(padding.transpose(1, 2), float("nan")))
    assert not results["out"].masked_select(padding.transpose(1, 2)).any()
    assert not any(results[name].masked_select(padding).any() for name in ("dq", "dk", "dv"))
    return results


def assert_within_twice_the_rounding(case: Case, layout: Layout, oracle: Any = loop_reference) -> None:
    """The distance to the float64 reference is at most twice that of the reference run on the case's dtype."""
    layout = layout.validate().to(DEVICE)
    exact = run_reference(case, layout, torch.float64, oracle)
    rounded = run_reference(case, layout, case.dtype, dense_reference)
    for name, mine in run_triton(case, layout).items():
        assert mine.dtype == case.dtype
        error, budget = (float((x.double() - exact[name]).norm()) for x in (mine, rounded[name]))
        norm = float(exact[name].norm())
        assert error <= 2 * budget, f"{name}: error {error / norm:.2e}, reference in {case.dtype} {budget / norm:.2e}"


PACKED = build_layout(
    [[70, 9], [33]],
    [
        [*grid(0, 10, 70, 4), *grid(1, 0, 9, 3), *grid(0, 10, 70, 4, 1, "causal"), *grid(1, 0, 9, 3, 1)],
        [Block(0, 33, 7, 0, "causal"), Block(0, 5, 6)],
    ],
    clean_length=83,
    noisy_length=150,
)
CASES = [
    Case(group=2),
    Case(dim=40, value_dim=24, key_heads=2, seed=1),
    Case(window=7, softcap=2.0, group=3),
    Case(torch.bfloat16, group=2, dim=48, value_dim=32),
    Case(torch.bfloat16, key_heads=2, window=21, softcap=5.0),
    Case(torch.float16, key_heads=2, dim=16, value_dim=80),
    Case(torch.float16, group=4, dim=80, window=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_twice_the_rounding_of_the_reference(case: Case) -> None:
    assert_within_twice_the_rounding(case, PACKED)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths_at_tile_borders(length: int, dtype: torch.dtype) -> None:
    """Clean and noisy streams of this length. A token that reads itself alone has the gradient 0, to which no error is
    relative: hence the second row."""
    layout = build_layout([[length], [40]], [[Block(0, length, length)], [Block(0, 30, 9)]])
    assert_within_twice_the_rounding(Case(dtype, seed=length), layout)


def test_many_tiles_in_bfloat16() -> None:
    """Long enough for tiles of keys that every query of a tile reads."""
    blocks = [*grid(0, 20, 280, 4), *grid(0, 20, 280, 16, 1, "causal")]
    layout = build_layout([[280]], [blocks], noisy_length=540)
    assert_within_twice_the_rounding(Case(torch.bfloat16, group=2, dim=32), layout, dense_reference)


@pytest.mark.parametrize("layout", [build_layout([[40]], [[]]), build_layout([[]], [[Block(0, 0, 25)]])])
def test_one_stream_alone(layout: Layout) -> None:
    assert_within_twice_the_rounding(Case(group=2), layout)


# Schedule


def oracle_mask(layout: Layout, window: int | None) -> Tensor:
    mask = torch.zeros(layout.rows, layout.length, layout.length, dtype=torch.bool)
    for row in range(layout.rows):
        position = {token.slot: token.position for token in tokens(layout, row)}
        for slot, seen in visible_slots(layout, row).items():
            for other in seen:
                mask[row, slot, other] = window is None or position[other] > position[slot] - window
    return mask


@settings(max_examples=150, deadline=None)
@given(layout=layouts(cache=False), window=windows, key_tile=st.sampled_from([1, 2, 4, 128]))
def test_schedule_equals_oracle(layout: Layout, window: int | None, key_tile: int) -> None:
    schedule = AttentionSchedule.from_layout(layout, window=window, key_tile=key_tile)
    expected = oracle_mask(layout, window)
    key = torch.arange(layout.length)
    low, high = schedule.intervals[0::2, :, :, None], schedule.intervals[1::2, :, :, None]
    assert torch.equal(((key >= low) & (key < high)).any(0), expected)

    clean_tiles = -(-layout.clean_length // key_tile)
    tiles = clean_tiles - (-layout.noisy_length // key_tile)
    for row in range(layout.rows):
        for tile in range(tiles):
            start = tile * key_tile if tile < clean_tiles else layout.clean_length + (tile - clean_tiles) * key_tile
            stop = min(start + key_tile, layout.clean_length if tile < clean_tiles else layout.length)
            times = torch.zeros(2, layout.length, dtype=torch.int64)  # visited with a mask, and without
            for kind in (0, 1):
                first, last = schedule.reader_offsets[kind, row * tiles + tile :][:2].tolist()
                for begin, end in schedule.reader_ranges[first:last].tolist():
                    assert 0 <= begin < end <= layout.length and (kind == 0 or (end - begin) % QUERY_STEP == 0)
                    times[kind, begin:end] += 1
            visible = expected[row, :, start:stop]
            assert torch.equal(times.sum(0), visible.any(1).long())
            assert bool((visible.all(1) | (times[1] == 0)).all()) and (stop - start == key_tile or not times[1].any())


def test_whole_tiles_need_no_mask() -> None:
    """Of two views over one document, all but the tiles at the diagonal are in the list without masks."""
    layout = build_layout([[512]], [[*grid(0, 0, 512, 4), *grid(0, 0, 512, 4, 1)]])
    schedule = AttentionSchedule.from_layout(layout, key_tile=64)
    offsets, sizes = schedule.reader_offsets, schedule.reader_ranges.diff(dim=1).squeeze(1)
    clean = 512 // 64
    for tile in range(clean):
        masked, full = (int(sizes[offsets[kind, tile] : offsets[kind, tile + 1]].sum()) for kind in (0, 1))
        assert full == 3 * 64 * (clean - 1 - tile)
        assert masked < 3 * 64 + (full > 0) * 64
    assert int(offsets[0, clean:].diff().max()) == 1


def test_schedule_refuses_caches_and_empty_windows() -> None:
    with pytest.raises(LayoutError, match="cache"):
        AttentionSchedule.from_layout(build_layout([[3]], [[]], cached=[4]))
    with pytest.raises(LayoutError, match="window"):
        AttentionSchedule.from_layout(build_layout([[3]], [[]]), window=0)


# Several tiles of each kind in small layouts


@settings(max_examples=15, deadline=None)
@given(layout=layouts(cache=False, max_documents=2, max_clean=30, max_block=20), window=windows, seed=st.integers(0, 9))
def test_small_tiles_equal_reference(layout: Layout, window: int | None, seed: int) -> None:
    case = Case(group=2, dim=20, value_dim=16, window=window, seed=seed)
    layout = layout.to(DEVICE)
    expected = run_reference(case, layout, torch.float64, dense_reference)
    (q, k, v), grad = case.inputs(layout)
    padding = (layout.token_document() < 0)[:, None, :, None]
    q, k, v = (x.masked_fill(padding, float("nan")) for x in (q, k, v))
    schedule = AttentionSchedule.from_layout(layout, window=window, key_tile=32)
    small = ScoreTiles(16, 16, 4, 1)
    out, lse = forward(q, k, v, schedule, **case.options, tiles=small)
    results = [out, *backward(grad, q, k, v, out, lse, schedule, **case.options, query_tiles=small, key_tiles=small)]
    for mine, (name, exact) in zip(results, expected.items(), strict=True):
        # absolute where a token reads itself alone: its gradients are 0
        assert (mine - exact).norm() <= 1e-6 * (exact.norm() + exact.numel() ** 0.5), name


def test_no_leak() -> None:
    """The gradient of every output with respect to every value is zero exactly where the contract says "never
    reads"."""
    blocks = [Block(0, 3, 3), Block(1, 0, 2), Block(0, 6, 4, 1, "causal"), Block(1, 3, 2, 1, "causal")]
    layout = build_layout([[6, 3]], [blocks], clean_length=10, noisy_length=12)
    (q, k, v), _ = Case().inputs(layout)
    k.requires_grad_(), v.requires_grad_()
    out = op(q, k, v, AttentionSchedule.from_layout(layout.to(DEVICE)), scale=0.7)
    seen = visible_slots(layout, 0)
    for slot in range(layout.length):
        grad_k, grad_v = torch.autograd.grad(out[0, slot].sum(), (k, v), retain_graph=True)
        assert set(grad_v[0, 0].abs().sum(1).nonzero().flatten().tolist()) == seen.get(slot, set())
        assert set(grad_k[0, 0].abs().sum(1).nonzero().flatten().tolist()) <= seen.get(slot, set())


# Memory layouts


def test_strided_inputs() -> None:
    """Token-major heads out of one wide projection, keys shared by expansion, values with a last stride of 2."""
    case = Case(key_heads=2, group=2)
    layout = build_layout([[19], [11]], [grid(0, 3, 19, 4), []]).to(DEVICE)
    (q, k, v), grad = case.inputs(layout)
    schedule = AttentionSchedule.from_layout(layout)
    k = k[:, :1].expand_as(k)
    wide = torch.cat([q.transpose(1, 2).flatten(2), torch.zeros_like(q[:, 0])], dim=2)
    views = [
        wide[..., :64].unflatten(2, (4, 16)).transpose(1, 2).requires_grad_(),
        k.requires_grad_(),
        torch.stack([v, v], dim=-1)[..., 0].requires_grad_(),
    ]
    plain = [x.detach().contiguous().requires_grad_() for x in views]
    assert [x.is_contiguous() for x in views] == [False] * 3
    expected = with_gradients(op(*plain, schedule, **case.options), plain, grad)
    stretched = grad.transpose(1, 2).contiguous().transpose(1, 2)
    got = with_gradients(op(*views, schedule, **case.options), views, stretched)
    for name, x in expected.items():
        assert torch.equal(got[name], x), name
    assert got["out"].is_contiguous() and got["dq"].transpose(1, 2).is_contiguous()


def test_a_gradient_of_one_number() -> None:
    """The gradient of a sum is an expanded number: all of its strides are 0."""
    layout = build_layout([[9]], [[Block(0, 4, 3)]]).to(DEVICE)
    (q, k, v), grad = Case().inputs(layout)
    schedule = AttentionSchedule.from_layout(layout)
    v.requires_grad_()
    (summed,) = torch.autograd.grad(op(q, k, v, schedule, scale=1.0).sum(), v)
    (ones,) = torch.autograd.grad(op(q, k, v, schedule, scale=1.0), v, torch.ones_like(grad))
    assert torch.equal(summed, ones)


def test_addresses_beyond_32_bits() -> None:
    """Tokens 2^22 numbers apart: the last one lies behind 2^31."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # 5 GB, hardly touched
    case, length, apart = Case(torch.float16), 560, 2**22
    layout = build_layout([[length]], [[]]).to(DEVICE)
    schedule = AttentionSchedule.from_layout(layout, window=40)
    near, grad = case.inputs(layout)
    storage = torch.empty(length * apart, dtype=torch.float16, device=DEVICE)
    far = [storage.as_strided(x.shape, (0, 0, apart, 1), 16 * i) for i, x in enumerate(near)]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    assert (length - 1) * apart > 2**31
    results = []
    for inputs in (near, far):
        leaves = [x.detach().requires_grad_() for x in inputs]
        results.append(with_gradients(op(*leaves, schedule, **case.options), leaves, grad))
    for name, x in results[0].items():
        assert torch.equal(results[1][name], x), name


# Interface


def test_custom_ops() -> None:
    layout = build_layout([[9], [5]], [grid(0, 2, 9, 3), []]).to(DEVICE)
    case = Case(group=2)
    (q, k, v), grad = case.inputs(layout)
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k.requires_grad_(), v.requires_grad_()
    schedule = AttentionSchedule.from_layout(layout)
    tensors = (schedule.intervals, schedule.reader_offsets, schedule.reader_ranges)
    options = (schedule.clean_length, schedule.key_tile, 0.25, None, False)
    ops: Any = torch.ops.flarec
    torch.library.opcheck(ops.softmax_attention_fwd.default, (q, k, v, *tensors, *options))
    with torch.no_grad():
        out, lse = ops.softmax_attention_fwd(q, k, v, *tensors, *options)
        arguments = (grad, q.detach(), k.detach(), v.detach(), out, lse, *tensors, *options)
        torch.library.opcheck(ops.softmax_attention_bwd.default, arguments)


def test_refusals() -> None:
    layout = build_layout([[5]], [[]]).to(DEVICE)
    (q, k, v), _ = Case().inputs(layout)
    schedule = AttentionSchedule.from_layout(layout)
    wide = q.new_zeros(1, 1, 5, 257)
    refused: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("float64", (q.double(), k.double(), v.double(), schedule), {}),
        ("dtypes", (q.half(), k, v, schedule), {}),
        ("257", (wide, wide, v, schedule), {}),
        ("head dim of 8", (q, k, v[..., :8], schedule), {}),
        ("key heads", (q.expand(1, 3, 5, 16), k.expand(1, 2, 5, 16), v.expand(1, 2, 5, 16), schedule), {}),
        ("fit", (q, k[:, :, :4], v, schedule), {}),
        ("schedule", (q, k, v, replace(schedule, length=6)), {}),
        ("scale", (q, k, v, schedule), {"scale": -1.0}),
        ("softcap", (q, k, v, schedule), {"softcap": 0.0}),
    ]
    for match, arguments, options in refused:
        with pytest.raises(UsageError, match=match):
            op(*arguments, **{"scale": 1.0, **options})
    assert supports(torch.bfloat16, 16, 4, 192, 128) is None


# On the GPU: all head dims with their tiles, and lengths of many tiles

TWO_VIEWS = build_layout(
    [[1000], [300, 411]],
    [
        [*grid(0, 100, 1000, 4), *grid(0, 100, 1000, 4, 1)],
        [*grid(1, 0, 411, 3), *grid(0, 17, 300, 7, 0, "causal"), *grid(1, 0, 411, 64, 1)],
    ],
    noisy_length=1900,
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("window, softcap", [(None, None), (130, 30.0)])
def test_head_dims_on_the_gpu(
    dims: tuple[int, int], dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    case = Case(dtype, 2, 2, *dims, window=window, softcap=softcap)
    assert_within_twice_the_rounding(case, TWO_VIEWS, dense_reference)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1000, 4096])
def test_long_rows_on_the_gpu(length: int) -> None:
    layout = build_layout([[length]], [[*grid(0, 0, length, 4), *grid(0, 0, length, 4, 1)]])
    assert_within_twice_the_rounding(Case(torch.bfloat16, 1, 4, 128, 128), layout, dense_reference)


@pytest.mark.gpu
def test_results_repeat_on_the_gpu() -> None:
    layout, case = TWO_VIEWS.to(DEVICE), Case(torch.bfloat16, 2, 4, 128, 128)
    first, second = run_triton(case, layout), run_triton(case, layout)
    for name, x in first.items():
        assert torch.equal(second[name], x), name
