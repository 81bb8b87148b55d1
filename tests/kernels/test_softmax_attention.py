"""softmax_attention: mask against the loop oracle, SDPA against the reference, leaks, caches, NaN padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec.errors import LayoutError
from flarec.kernels.softmax_attention import mask as masks
from flarec.kernels.softmax_attention import reference as definition
from flarec.kernels.softmax_attention import torch_sdpa
from flarec.layout import Block, Layout, build_layout
from tests.oracles.layouts import layouts
from tests.oracles.visibility import reads_past, tokens, visible_slots

# untyped: tests unpack inputs before further positional arguments
op: Any = torch_sdpa
reference: Any = definition
visibility = masks.visibility

windows = st.one_of(st.none(), st.integers(1, 6))


def make(layout: Layout, seed: int, kv_heads: int = 2, group: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (layout.rows, layout.length)
    q, k, v = (
        torch.randn(shape[0], heads, shape[1], dim, generator=gen, dtype=torch.float64)
        for heads, dim in ((kv_heads * group, 4), (kv_heads, 4), (kv_heads, 3))
    )
    return q, k, v


def expected_mask(layout: Layout, window: int | None, cache_length: int | None) -> Tensor:
    keys = layout.length if cache_length is None else cache_length + layout.noisy_length
    mask = torch.zeros(layout.rows, layout.length, keys, dtype=torch.bool)
    shift = 0 if cache_length is None else cache_length - layout.clean_length
    for row in range(layout.rows):
        by_slot = {token.slot: token for token in tokens(layout, row)}
        for slot, seen in visible_slots(layout, row).items():
            reader = by_slot[slot]
            for other in seen:
                if window is None or by_slot[other].position > reader.position - window:
                    clean_in_cache = cache_length is not None and by_slot[other].block is None
                    mask[row, slot, by_slot[other].position if clean_in_cache else other + shift] = True
            for position in range(int(layout.cached[row])):
                if reads_past(reader, position) and (window is None or position > reader.position - window):
                    mask[row, slot, position] = True
        for slot in set(range(layout.length)) - set(by_slot):
            own = slot if cache_length is None else (0 if slot < layout.clean_length else slot + shift)
            mask[row, slot, own] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(layout=layouts(cache=False), window=windows)
def test_mask_equals_oracle(layout: Layout, window: int | None) -> None:
    assert torch.equal(visibility(layout, window), expected_mask(layout, window, None))


@settings(max_examples=60, deadline=None)
@given(layout=layouts(single_document=True), window=windows, spare=st.integers(0, 3))
def test_mask_with_cache_equals_oracle(layout: Layout, window: int | None, spare: int) -> None:
    slots = int((layout.cached + layout.clean_length).max()) + spare
    assert torch.equal(visibility(layout, window, slots), expected_mask(layout, window, slots))


def test_mask_refuses_layouts_that_do_not_fit() -> None:
    with pytest.raises(LayoutError, match="cache slots"):
        visibility(build_layout([[3]], [[]], cached=[4]), cache_length=6)
    with pytest.raises(LayoutError, match="document 0"):
        visibility(build_layout([[3, 2]], [[]]), cache_length=6)
    with pytest.raises(LayoutError, match="cache_length"):
        visibility(build_layout([[3]], [[]], cached=[4]))


@settings(max_examples=30, deadline=None)
@given(
    layout=layouts(cache=False, max_clean=8, max_block=4),
    window=windows,
    softcap=st.sampled_from([None, 2.0]),
    group=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_two_stream_equals_reference(
    layout: Layout, window: int | None, softcap: float | None, group: int, seed: int
) -> None:
    q, k, v = (x.requires_grad_() for x in make(layout, seed, group=group))
    expected = reference(q, k, v, layout, scale=0.7, window=window, softcap=softcap)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=expected.dtype)
    grads = torch.autograd.grad((expected * weights).sum(), (q, k, v), materialize_grads=True)

    real = layout.token_document() >= 0
    padding = ~real[:, None, :, None]
    poisoned: Any = [x.detach().masked_fill(padding, float("nan")).requires_grad_() for x in (q, k, v)]
    got = op.two_stream(*poisoned, visibility(layout, window), scale=0.7, softcap=softcap, real=real)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for mine, theirs in zip(torch.autograd.grad((got * weights).sum(), poisoned), grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    layout=layouts(single_document=True, max_clean=8, max_block=4),
    window=windows,
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
def test_cached_equals_reference(layout: Layout, window: int | None, softcap: float | None, seed: int) -> None:
    q, k, v = make(layout, seed, group=2)
    slots = int((layout.cached + layout.clean_length).max()) + 2
    gen = torch.Generator().manual_seed(seed + 1)
    caches = [torch.randn(layout.rows, 2, slots, dim, generator=gen, dtype=torch.float64) for dim in (4, 3)]
    expected = reference(
        q, k, v, layout, scale=0.7, window=window, softcap=softcap, k_cache=caches[0], v_cache=caches[1]
    )
    padding = (layout.token_document() < 0)[:, None, :, None]
    poisoned: Any = [x.masked_fill(padding, float("nan")) for x in (q, k, v)]
    before = [cache.clone() for cache in caches]
    mask = visibility(layout, window, slots)
    got = op.cached(*poisoned, caches[0], caches[1], mask, layout, scale=0.7, softcap=softcap)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for cache, old, new in zip(caches, before, (k, v), strict=True):
        wanted = old.clone()
        for row in range(layout.rows):
            for token in tokens(layout, row):
                if token.block is None:
                    wanted[row, :, token.position] = new[row, :, token.slot]
        assert torch.equal(cache, wanted)


def test_write_cache_never_writes_padding() -> None:
    cache = torch.zeros(3, 1, 4, 2)
    new = torch.full((3, 1, 3, 2), float("nan"))
    new[0, :, :2] = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    new[2] = 3.0
    positions = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 2, 3]])
    valid = torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    op.write_cache(cache, new, positions, valid)
    assert cache[:, 0, :, 0].tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [0, 3, 3, 3]]


def test_bfloat16_keeps_its_dtype() -> None:
    layout = build_layout([[5]], [[Block(0, 2, 3)]])
    q, k, v = make(layout, 0)
    exact = reference(q, k, v, layout, scale=0.5)
    low: Any = [x.bfloat16() for x in (q, k, v)]
    for out in (
        reference(*low, layout, scale=0.5),
        op.two_stream(*low, visibility(layout), scale=0.5),
        op.two_stream(*low, visibility(layout), scale=0.5, softcap=1e4),
    ):
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() < 0.05


@settings(max_examples=15, deadline=None)
@given(layout=layouts(cache=False, max_clean=6, max_block=3, max_documents=2))
def test_no_leak(layout: Layout) -> None:
    """The gradient of every output with respect to every input is zero exactly where the contract says "never
    reads"."""
    q, k, v = (x.requires_grad_() for x in make(layout, 1))
    out = op.two_stream(q, k, v, visibility(layout), scale=0.7, real=layout.token_document() >= 0)
    for row in range(layout.rows):
        seen = visible_slots(layout, row)
        for slot in range(layout.length):
            (grad,) = torch.autograd.grad(out[row, slot].sum(), v, retain_graph=True)
            read = {(r, s) for r, s in grad.abs().sum((1, 3)).nonzero().tolist()}
            assert read == {(row, s) for s in seen.get(slot, set())}
