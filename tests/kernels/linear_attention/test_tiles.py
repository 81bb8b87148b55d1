"""Triton two-stream linear attention (training) against the float64 reference, forward and every gradient.

Without a GPU the kernels run in Triton's interpreter, in float32 at small sizes; with one, also at real sizes and in
bfloat16 and float16. New tensors are filled with NaN, so that whatever a kernel forgets to write shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec.errors import LayoutError, UsageError
from flarec.kernels.linear_attention import reference, reference_states
from flarec.kernels.linear_attention.tiles.schedule import TileSchedule, largest_chunk
from flarec.layout import Block, Layout, build_layout
from tests.kernels.linear_attention.cases import Case, poison_padding
from tests.oracles.layouts import layouts

pytest.importorskip("triton")
from flarec.kernels.linear_attention.tiles.train import _forward, two_stream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # one example takes a second in the interpreter
NAMES = ("q", "k", "v", "g", "beta")
scalar_cases = st.builds(
    Case,
    gate=st.sampled_from(["none", "scalar"]),
    delta=st.booleans(),
    l2norm=st.booleans(),
    group=st.integers(1, 2),
    seed=st.integers(0, 999),
    decay=st.sampled_from([0.1, 1.0, 8.0]),
)
KINDS = [
    Case(gate, delta, l2norm, 1 + ((gate == "none") ^ delta ^ l2norm), seed=7)
    for gate, delta, l2norm in itertools.product(("none", "scalar"), (True, False), (True, False))
]
"""Every three options in all their combinations."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN while deterministic algorithms are on."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def error(got: Tensor, true: Tensor) -> float:
    got, true = got.detach(), true.detach()
    norm = true.norm()
    return float((got.cpu().double() - true).norm() / norm) if norm > 0 else float(got.abs().max())


def run(op: Any, case: Case, inputs: dict[str, Any], where: object) -> tuple[Tensor, dict[str, Tensor]]:
    out = op(*(inputs[n] for n in NAMES), where, **case.options(), initial_state=inputs["initial_state"])
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    leaves = {n: x for n, x in inputs.items() if x is not None}
    total = (out * weights.to(out)).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return out.detach(), dict(zip(leaves, grads, strict=True))


def assert_as_good_as_low_precision(
    case: Case, layout: Layout, dtype: torch.dtype, chunk_size: int, wide: dict[str, Tensor | None] | None = None
) -> None:
    """Errors at most twice those of the reference run in the same low precision: every intermediate value, states and
    gates included, in that dtype."""
    wide = case.inputs(layout) if wide is None else wide
    low = {n: None if x is None else x.detach().to(dtype) for n, x in wide.items()}
    exact_inputs = {n: None if x is None else x.double().requires_grad_() for n, x in low.items()}
    true, true_grads = run(reference, case, exact_inputs, layout)
    if dtype == torch.float32:
        single = {n: None if x is None else x.detach().float().requires_grad_() for n, x in exact_inputs.items()}
        plain, plain_grads = run(reference, case, single, layout)
        plain, plain_grads = plain.double(), {n: x.double() for n, x in plain_grads.items()}
    else:
        low = {n: None if x is None else x.detach().to(dtype).requires_grad_() for n, x in exact_inputs.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "promote_types", lambda a, _: a)  # the loop takes the dtype of q
            plain, plain_grads = run(reference, case, low, layout)
        plain, plain_grads = plain.double(), {n: x.double() for n, x in plain_grads.items()}
    poisoned = poison_padding({n: x if x is None else x.to(dtype) for n, x in exact_inputs.items()}, layout)
    given_inputs = {n: None if x is None else x.detach().to(DEVICE).requires_grad_() for n, x in poisoned.items()}
    schedule = TileSchedule.from_layout(layout, chunk_size, chunk_size).to(DEVICE)
    got, grads = run(two_stream, case, given_inputs, schedule)
    floor = 1e-6 * (1 + case.decay)  # exp(x) in float32 has a relative error that grows with x
    assert error(got, true) <= 2 * error(plain, true) + floor
    for name, grad in true_grads.items():
        assert bool(grads[name].isfinite().all()), f"the gradient of {name} is not finite"
        # of a log decay in float32: the small rest of sums of large terms
        budget = 2 * error(plain_grads[name], grad) + (2 if name == "g" and dtype == torch.float32 else 1) * floor
        # a gradient that is zero up to rounding (readers with no effect) has no relative error to speak of
        small = float(grad.norm()) < 1e-3 * max(float(x.norm()) for x in true_grads.values())
        assert error(grads[name], grad) <= budget or small, f"the gradient of {name}"


@settings(max_examples=6, deadline=None, phases=NO_SHRINKING)
@given(layout=layouts(max_block=8), case=scalar_cases)
def test_equals_reference(layout: Layout, case: Case) -> None:
    assert_as_good_as_low_precision(case, layout, torch.float32, 16)


@pytest.mark.parametrize("case", KINDS, ids=lambda c: f"{c.gate}-{c.delta}-{c.l2norm}-{c.group}")
def test_every_kind_on_a_dense_layout(case: Case) -> None:
    """Two rows, two views, straddling blocks, both readouts, anchors at every kind of border."""
    grid = [Block(0, a, 3, view, "causal" if view else "block_end") for view in (0, 1) for a in range(5, 35, 3)]
    layout = build_layout(
        [[35, 6], [9]],
        [[*grid, Block(1, 0, 2), Block(1, 6, 3)], [Block(0, 2, 1), Block(0, 4, 7), Block(0, 9, 2, 0, "causal")]],
        cached=[0, 2],
    )
    assert_as_good_as_low_precision(case, layout, torch.float32, 16)


@pytest.mark.parametrize("length", [1, 64, 65])
def test_lengths_around_a_chunk(length: int) -> None:
    layout = build_layout([[length]], [[Block(0, a, 4, view) for view in (0, 1) for a in range(0, length, 4)]])
    assert_as_good_as_low_precision(Case("scalar", True, True, 1, seed=length), layout, torch.float32, 64)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 16, 64])
def test_block_sizes(block: int) -> None:
    grid = [Block(0, a, block, view) for view in (0, 1) for a in range(2, 70, block)]
    layout = build_layout([[70]], [grid])
    assert_as_good_as_low_precision(Case("scalar", True, False, 1, seed=block), layout, torch.float32, 64)


def test_final_state_and_its_gradient() -> None:
    case = Case("scalar", True, True, 2, seed=3)
    layout = build_layout([[37, 5], [3]], [[Block(0, 4, 3)], [Block(0, 5, 2)]], cached=[0, 2])
    inputs: dict[str, Any] = case.inputs(layout)
    k, v, g, beta = (inputs[n] for n in NAMES[1:])
    states = reference_states(k, v, g, beta, layout, delta=True, l2norm=True, initial_state=inputs["initial_state"])
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [inputs[n] for n in (*NAMES[1:], "initial_state")]
    expected = torch.autograd.grad((states * weights).sum(), leaves)

    low = {n: x.detach().float().to(DEVICE).requires_grad_() for n, x in inputs.items()}
    schedule = TileSchedule.from_layout(layout, 16, 16).to(DEVICE)
    op: Any = two_stream
    _, final = op(
        *(low[n] for n in NAMES), schedule, **case.options(), initial_state=low["initial_state"], final_state=True
    )
    grads = torch.autograd.grad((final * weights.to(final)).sum(), [low[n] for n in (*NAMES[1:], "initial_state")])
    assert error(final, states) < 1e-6
    for got, true in zip(grads, expected, strict=True):
        assert error(got, true) < 5e-6


def test_views_of_a_wider_projection_are_read_in_place() -> None:
    case, layout = Case("scalar", True, True, 1, seed=5), build_layout([[20], [20]], [[Block(0, 8, 4)]] * 2)
    inputs: dict[str, Any] = {
        n: None if x is None else x.detach().float().to(DEVICE) for n, x in case.inputs(layout).items()
    }
    schedule = TileSchedule.from_layout(layout, 16, 16).to(DEVICE)
    op: Any = two_stream
    expected = op(*(inputs[n] for n in NAMES), schedule, **case.options())
    shape = inputs["q"].shape
    wide = torch.cat([inputs[n].flatten(2) for n in ("q", "k", "v")], dim=2)
    parts = wide.split([inputs[n].flatten(2).shape[2] for n in ("q", "k", "v")], dim=2)
    q, k, v = (p.unflatten(2, (shape[2], -1)) for p in parts)
    assert not q.is_contiguous()
    got = op(q, k, v, inputs["g"], inputs["beta"], schedule, **case.options())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_opcheck() -> None:
    case, layout = Case("scalar", True, True, 2, seed=2), build_layout([[6]], [[Block(0, 2, 2), Block(0, 6, 1)]])
    wide: dict[str, Any] = case.inputs(layout)
    inputs = {n: x.detach().float().to(DEVICE).requires_grad_() for n, x in wide.items()}
    schedule = TileSchedule.from_layout(layout, 16, 16).to(DEVICE)
    arguments = (
        *(inputs[n] for n in NAMES),
        inputs["initial_state"],
        *schedule.flat(),
        0.6,
        True,
        True,
        True,
        False,
    )
    torch.library.opcheck(
        _forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_unsupported_inputs_are_refused() -> None:
    layout = build_layout([[4]], [[Block(0, 2, 2)]])
    schedule = TileSchedule.from_layout(layout)
    q = torch.zeros(1, 6, 1, 8, dtype=torch.float64)
    with pytest.raises(UsageError, match="dtype float64"):
        two_stream(q, q, q, None, q[..., 0], schedule, scale=1.0, delta=True, l2norm=False)
    wide = torch.zeros(1, 6, 1, 300)
    with pytest.raises(UsageError, match="at most 256"):
        two_stream(wide, wide, wide, None, wide[..., 0], schedule, scale=1.0, delta=True, l2norm=False)
    q = torch.zeros(1, 6, 1, 128)
    with pytest.raises(UsageError, match="chunk_size=32"):
        two_stream(q, q, q, None, q[..., 0], schedule, scale=1.0, delta=True, l2norm=False)
    with pytest.raises(LayoutError, match="at most 64"):
        TileSchedule.from_layout(build_layout([[80]], [[Block(0, 2, 65)]]))
    with pytest.raises(LayoutError, match="anchored at 3"):
        TileSchedule.from_layout(build_layout([[2]], [[Block(0, 3, 1)]], cached=[4]))


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), rows=st.sampled_from([8, 16, 64]))
def test_schedule_places_every_token_once(layout: Layout, rows: int) -> None:
    s = TileSchedule.from_layout(layout, 16, rows)
    clean = [
        first + i for first, n in zip(s.chunk_token.tolist(), s.chunk_length.tolist(), strict=True) for i in range(n)
    ]
    noisy = s.tile_token[s.tile_token >= 0].tolist()
    real = (layout.token_document() >= 0).flatten().nonzero().squeeze(1).tolist()
    assert sorted(clean + noisy) == real
    for tile in range(s.tiles):
        count = int(s.tile_count[tile])
        first = int(s.tile_first[tile])
        assert s.tile_token[tile].tolist() == [first + i for i in range(count)] + [-1] * (rows - count)
    assert int(s.chunk_tile[-1]) == s.tiles
    counted = torch.repeat_interleave(torch.arange(s.chunks), s.chunk_tile.diff())
    assert torch.equal(counted.int(), s.tile_chunk)


def test_blocks_on_a_grid_fill_whole_tiles() -> None:
    layout = build_layout([[630]], [[Block(0, a, 3, view) for view in (0, 1) for a in range(0, 630, 3)]])
    schedule = TileSchedule.from_layout(layout)
    assert schedule.chunk_step == 63
    assert schedule.chunks == 10
    assert schedule.tile_count.tolist() == [63] * 20


def real_case(
    layout: Layout, heads: int, key_heads: int, key_dim: int, value_dim: int, seed: int, gate: bool = True
) -> dict[str, Tensor | None]:
    """Float64 inputs of realistic scale: unit keys and queries, decays of a few percent to one half."""
    gen = torch.Generator().manual_seed(seed)
    rows, length = layout.rows, layout.length

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    return {
        "q": unit(normal(rows, length, key_heads, key_dim), dim=-1),
        "k": unit(normal(rows, length, key_heads, key_dim), dim=-1),
        "v": normal(rows, length, heads, value_dim),
        "g": -torch.nn.functional.softplus(normal(rows, length, heads) - 1) if gate else None,
        "beta": normal(rows, length, heads).sigmoid(),
        "initial_state": normal(rows, heads, key_dim, value_dim) * 0.1,
    }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (64, 32), (128, 128), (96, 80), (256, 256), (128, 64)], ids=str)
def test_real_dims(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    grid = [Block(0, a, 4, view, "causal" if view else "block_end") for view in (0, 1) for a in range(30, 150, 4)]
    layout = build_layout([[150, 20], [63]], [[*grid, Block(1, 0, 7)], [Block(0, 63, 3), Block(0, 0, 4)]])
    for delta, gate in ((True, True), (False, True), (True, False)):
        case = Case("scalar", delta, False, 1, seed=1)
        wide = real_case(layout, 4, 2, *dims, seed=1, gate=gate)
        assert_as_good_as_low_precision(case, layout, dtype, largest_chunk(dtype, *dims), wide)


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "block"), [*itertools.product((1, 63, 64, 65), (1, 3, 4, 32)), (1000, 4)])
def test_real_lengths(length: int, block: int) -> None:
    layout = build_layout([[length]], [[Block(0, a, block, v) for v in (0, 1) for a in range(0, length, block)]])
    wide = real_case(layout, 2, 2, 128, 128, seed=2)
    assert_as_good_as_low_precision(Case("scalar", True, True, 1, seed=2), layout, torch.bfloat16, 64, wide)


@pytest.mark.gpu
def test_two_runs_are_bitwise_equal() -> None:
    layout = build_layout([[1024, 300]] * 2, [[Block(0, a, 4, v) for v in (0, 1) for a in range(100, 1024, 4)]] * 2)
    schedule = TileSchedule.from_layout(layout).to("cuda")
    wide = real_case(layout, 8, 4, 128, 128, seed=3)
    case = Case("scalar", True, True, 1, seed=3)
    results = []
    for _ in range(2):
        low = {n: None if x is None else x.bfloat16().cuda().requires_grad_() for n, x in wide.items()}
        out, grads = run(two_stream, case, low, schedule)
        results.append([out, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_addresses_past_two_to_the_31() -> None:
    """q, k and v are views of rows so wide that the last tokens lie behind 2^31 elements."""
    layout = build_layout([[66000]], [[Block(0, a, 4) for a in range(65000, 66000, 4)]])
    wide = torch.empty(1, layout.length, 33000, dtype=torch.bfloat16, device="cuda")
    assert wide.numel() > 2**31
    gen = torch.Generator("cuda").manual_seed(0)
    parts = [torch.randn(1, layout.length, 1, 64, generator=gen, device="cuda").bfloat16() for _ in range(3)]
    views = []
    for i, part in enumerate(parts):
        view = wide[:, :, 64 * i : 64 * (i + 1)].unflatten(2, (1, 64))
        view.copy_(part)
        views.append(view)
    gate = -torch.rand(1, layout.length, 1, generator=gen, device="cuda")
    beta = torch.rand(1, layout.length, 1, generator=gen, device="cuda")
    schedule = TileSchedule.from_layout(layout).to("cuda")
    options = {"scale": 0.1, "delta": True, "l2norm": True}
    op: Any = two_stream
    assert torch.equal(op(*views, gate, beta, schedule, **options), op(*parts, gate, beta, schedule, **options))
