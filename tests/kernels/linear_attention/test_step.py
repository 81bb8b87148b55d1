"""The Triton decode step of linear attention against the loops of `reference_step`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from flarec.errors import LayoutError, UsageError
from flarec.kernels.linear_attention import triton_decode
from flarec.kernels.linear_attention.reference import reference_states
from flarec.kernels.linear_attention.reference_step import reference_step
from flarec.kernels.linear_attention.step.launch import StepConfig, linear_attention_step
from flarec.kernels.linear_attention.step.schedule import StepSchedule
from flarec.layout import Block, Layout, StepLayout, build_layout
from tests.kernels.linear_attention.cases import Case
from tests.oracles.layouts import layouts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TF32X3 = (
    2.0**-20
)  # of the float32 results of 16-bit inputs: a product is cut into parts of 11 bits, the smallest is lost

Operands = list[Tensor | None]
OPERANDS = ("q", "k", "v", "g", "beta", "state", "pending_k", "pending_d", "pending_g", "accepted")


@pytest.fixture(autouse=True, scope="module")
def interpreter_rounds_as_a_gpu() -> Iterator[None]:
    """Triton's interpreter cuts float32 off to bfloat16, a GPU rounds to nearest."""
    cut_off = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) == ("fp32", "bf16"):
            return torch.from_numpy(data.view(np.float32).copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        return cut_off(data, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


def operands(
    layout: Layout, case: Case, heads: int, key_dim: int, value_dim: int, pending: int, dtype: torch.dtype
) -> Operands:
    """q, k, v, g, beta in dtype; state and pending rows as the engine keeps them; accepted. NaN on unused rows."""
    gen = torch.Generator().manual_seed(case.seed)
    kept = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    def decays(length: int) -> Tensor | None:
        channels = {"none": (), "scalar": (heads,), "channel": (heads, key_dim)}[case.gate]
        return -case.decay * torch.nn.functional.softplus(normal(rows, length, *channels)) if channels else None

    rows, length, key_heads = layout.rows, layout.length, heads // case.group
    accepted = torch.randint(0, pending + 1, (rows,), generator=gen)
    size = key_dim**-0.5
    inputs = [normal(rows, length, key_heads, key_dim), size * normal(rows, length, key_heads, key_dim)]
    inputs += [normal(rows, length, heads, value_dim), decays(length), normal(rows, length, heads).sigmoid()]
    cache = [normal(rows, heads, key_dim, value_dim), size * normal(rows, pending, key_heads, key_dim)]
    cache += [normal(rows, pending, heads, value_dim), decays(pending)]
    padding = layout.token_document().cpu() < 0
    behind = torch.arange(pending) >= accepted[:, None]

    def poison(x: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        if x is None:
            return None
        return x.masked_fill(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), float("nan")).to(dtype).to(DEVICE)

    state = cache[0]
    assert state is not None
    return [
        *(poison(x, padding, dtype) for x in inputs),
        state.to(kept).to(DEVICE),
        *(poison(x, behind, kept) for x in cache[1:]),
        accepted.to(DEVICE),
    ]


def as_dtype(args: Operands, dtype: torch.dtype) -> Operands:
    return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in args]


def poisoned(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.full_like(x, float("nan")) for x in results]


def run(args: Operands, layout: Layout, case: Case, **kwargs: Any) -> tuple[Tensor, ...]:
    schedule = kwargs.pop("schedule", None) or StepSchedule.from_layout(layout).to(DEVICE)
    step: Any = linear_attention_step
    result: tuple[Tensor, ...] = step(*args, schedule, clean_length=layout.clean_length, **case.options(), **kwargs)
    return result


def reference(args: Operands, layout: Layout, case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The loops on the host in `dtype`, from the same (possibly rounded) inputs."""
    on_host = [None if x is None else x.cpu() for x in args]
    named: dict[str, Any] = dict(zip(OPERANDS, as_dtype(on_host, dtype), strict=True))
    return reference_step(**named, layout=layout, **case.options())


def error(got: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.cpu().double() - exact).norm() / exact.norm().clamp_min(1e-300)) if exact.numel() else 0.0


def check_rounding(layout: Layout, case: Case, sizes: tuple[int, int, int], pending: int, dtype: torch.dtype) -> None:
    """No more than twice the error of the loops in the same precision, both against the loops in float64."""
    args = operands(layout, case, *sizes, pending, dtype)
    exact = reference(args, layout, case, torch.float64)
    plain = reference(args, layout, case, dtype if dtype.itemsize > 2 else torch.float32)
    plain = (plain[0].to(dtype), *plain[1:])
    got = run(args, layout, case, out=[torch.full_like(x, float("nan"), device=DEVICE) for x in plain])
    for name, ours, theirs, true in zip(("o", "state", "k", "d", "g"), got, plain, exact, strict=False):
        slack = TF32X3 if dtype.itemsize == 2 else 2.0**-24
        assert error(ours, true) <= 2 * error(theirs, true) + slack, name


gates = st.sampled_from(["none", "scalar", "channel"])
cases = st.builds(
    Case, gates, st.booleans(), st.booleans(), st.integers(1, 2), st.integers(0, 999), st.sampled_from([0.1, 1.0, 20.0])
)


@settings(max_examples=40, deadline=None)
@given(layout=layouts(single_document=True), case=cases, pending=st.sampled_from([0, 1, 5, 19]))
def test_step_equals_the_loops(layout: Layout, case: Case, pending: int) -> None:
    """Every layout, gate and pending length in float64; padding and rejected rows hold NaN, and so do the outputs."""
    args = operands(layout, case, 2 * case.group, 4, 3, pending, torch.float64)
    expected = reference(args, layout, case, torch.float64)
    out = [torch.full_like(x, float("nan"), device=DEVICE) for x in expected]
    got = run(args, layout, case, out=out)
    assert all(ours is given for ours, given in zip(got, out, strict=True))
    for ours, true in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-11, atol=1e-11)
    padding = layout.token_document() < 0
    assert bool((got[0].cpu()[padding] == 0).all())
    accepted: Any = args[-1]
    for row in (accepted == 0).nonzero().flatten().tolist():
        assert torch.equal(got[1][row], args[5][row])  # type: ignore[index]


SHAPES = [(1, 0, 0), (4, 4, 3), (7, 3, 8), (63, 0, 0), (64, 0, 0), (32, 1, 32), (0, 2, 16)]


def shaped(clean: int, blocks: int, size: int, rows: int = 1) -> Layout:
    """`blocks` blocks anchored after the first clean rows, readouts in turn; 5 tokens are cached."""
    readouts = ["block_end", "causal"]
    row = [Block(0, 5 + min(i + 1, clean), size, 0, readouts[i % 2]) for i in range(blocks)]
    return build_layout([[clean]] * rows, [row] * rows, cached=[5] * rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case("scalar", True, True, 2, 0), Case("channel", True, False, 1, 1)], ids=str)
def test_rounding(case: Case, dtype: torch.dtype) -> None:
    check_rounding(shaped(4, 4, 3, rows=2), case, (2, 32, 32), 3, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_of_many_rows(shape: tuple[int, int, int]) -> None:
    check_rounding(shaped(*shape), Case("scalar", True, True, 1, 2), (1, 24, 16), 2, torch.float32)


def test_strong_decay_loses_nothing() -> None:
    """Sums of decays beyond -88 neither overflow nor cancel; nor do equal keys, whose powers would."""
    for gate in ("scalar", "channel"):
        check_rounding(shaped(20, 4, 3), Case(gate, True, True, 1, 3, decay=40.0), (1, 16, 16), 3, torch.float32)
    layout, case = shaped(48, 1, 16), Case("none", True, True, 1, 4)
    args = operands(layout, case, 1, 16, 16, 0, torch.float32)
    k, beta = args[1], args[4]
    assert k is not None and beta is not None
    k.copy_(k[:, :1].expand_as(k))
    beta.fill_(1)
    exact, plain = (reference(args, layout, case, dtype) for dtype in (torch.float64, torch.float32))
    for ours, theirs, true in zip(run(args, layout, case), plain, exact, strict=True):
        assert error(ours, true) <= 2 * error(theirs, true) + 1e-6


@pytest.mark.parametrize("gate", ["none", "channel"])
def test_tiles_agree_with_one_tile(gate: str) -> None:
    """65 and more slots: several programs share the clean rows; blocks stay whole, every noisy slot is written."""
    blocks = [Block(0, 2 + i % 3, 1 + i % 5, 0, "causal" if i % 3 else "block_end") for i in range(25)]
    layout = build_layout([[2], [1]], [blocks, [Block(0, 4, 3)]], cached=[2, 3], noisy_length=80)
    schedule = StepSchedule.from_layout(layout)
    assert schedule.tiles == 2 and schedule.tile_rows == 64
    case = Case(gate, True, True, 1, 5)
    args = operands(layout, case, 1, 4, 3, 2, torch.float64)
    expected = reference(args, layout, case, torch.float64)
    out = [torch.full_like(x, float("nan"), device=DEVICE) for x in expected]
    for ours, true in zip(run(args, layout, case, out=out), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-11, atol=1e-11)


def configs() -> Iterator[StepConfig]:
    yield StepConfig(gram_k=16, block_k=16, block_v=16, num_warps=2, precision="ieee")
    yield StepConfig(gram_k=64, block_k=16, block_v=32, num_warps=4, precision="ieee")
    yield StepConfig(gram_k=32, block_k=64, block_v=64, num_warps=8, precision="ieee")


@pytest.mark.parametrize("config", list(configs()), ids=str)
@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_every_launch_computes_the_same(config: StepConfig, gate: str) -> None:
    layout, case = shaped(3, 2, 4), Case(gate, True, True, 2, 6)
    args = operands(layout, case, 2, 40, 36, 18, torch.float64)
    expected = reference(args, layout, case, torch.float64)
    for ours, true in zip(run(args, layout, case, config=config), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-11, atol=1e-11)


def test_steps_chain_and_reject() -> None:
    """Steps whose rows are accepted in part, not at all and whole end in the state of a walk over the accepted rows."""
    heads, key_dim, value_dim = 2, 16, 16
    layout = shaped(3, 2, 2, rows=2)
    first = operands(layout, Case("scalar", True, True, 2, 7), heads, key_dim, value_dim, 0, torch.float64)
    state = first[5]
    cache: Operands = first[5:9]
    assert state is not None
    accepted, state = 0, state.cpu()
    for seed, kept in ((11, 2), (12, 0), (13, 3)):
        case = Case("scalar", True, True, 2, seed)
        inputs = operands(layout, case, heads, key_dim, value_dim, 0, torch.float64)[:5]
        cache = list(run([*inputs, *cache, torch.full((2,), accepted, device=DEVICE)], layout, case)[1:])
        accepted = kept
        _, k, v, g, beta = (x.cpu() for x in inputs if x is not None)
        short = build_layout([[kept]] * 2, [[]] * 2, cached=[5] * 2)
        if not kept:
            continue
        state = reference_states(
            k[:, :kept], v[:, :kept], g[:, :kept], beta[:, :kept], short, delta=True, l2norm=True, initial_state=state
        )
    empty = build_layout([[0]] * 2, [[]] * 2, cached=[5] * 2, noisy_length=1)
    last = operands(empty, case, heads, key_dim, value_dim, 0, torch.float64)[:5]
    got = run([*last, *cache, torch.full((2,), accepted, device=DEVICE)], empty, case)
    torch.testing.assert_close(got[1].cpu(), state, rtol=1e-11, atol=1e-11)
    assert got[2].shape == (2, 0, heads // 2, key_dim) and got[4].shape == (2, 0, heads)


def test_state_may_be_updated_in_place_and_inputs_may_be_views() -> None:
    layout, case = shaped(4, 4, 3, rows=2), Case("scalar", True, True, 1, 8)
    args = operands(layout, case, 2, 16, 16, 3, torch.float32)
    expected = run(args, layout, case)
    wide = [None if x is None else torch.cat([x, x], 2)[:, :, : x.shape[2]] for x in args[:5]]
    assert wide[0] is not None and not wide[0].is_contiguous()
    out = poisoned(expected)
    state = args[5]
    assert state is not None
    out[1] = state.clone()
    got = run([*wide, out[1], *args[6:]], layout, case, out=out)
    assert got[1] is out[1]
    for ours, true in zip(got, expected, strict=True):
        assert torch.equal(ours, true)


def test_schedule_of_a_step() -> None:
    layout = build_layout(
        [[2], [1]],
        [[Block(0, 9, 2), Block(0, 8, 1, 0, "causal"), Block(0, 10, 3, 0, "causal")], [Block(0, 4, 2)]],
        cached=[8, 3],
        noisy_length=7,
    )
    schedule = StepSchedule.from_layout(layout)
    assert (schedule.tile_rows, schedule.tiles) == (16, 1)
    assert schedule.row_table[0].tolist() == [
        [0, 1, 1, 1, 0, 2, 2, 2, -1],
        [0, 1, 2, 2, 4, 5, 5, 5, 8],
        [0, 1, 3, 3, 4, 5, 6, 7, 8],
    ]
    assert schedule.row_table[1, 0].tolist() == [0, -1, 1, 1, -1, -1, -1, -1, -1]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tiles_hold_whole_blocks(data: st.DataObject) -> None:
    clean = data.draw(st.integers(0, 20))
    sizes = data.draw(st.lists(st.integers(1, 30), max_size=12))
    layout = build_layout([[clean]], [[Block(0, 1, size) for size in sizes]], cached=[1])
    schedule = StepSchedule.from_layout(layout)
    starts = schedule.tile_start[0].tolist()
    assert starts[0] == 0 and starts[-1] == layout.noisy_length and starts == sorted(starts)
    borders = [0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()]
    assert set(starts) <= set(borders)
    assert all(clean + b - a <= schedule.tile_rows for a, b in itertools.pairwise(starts))
    assert schedule.tile_rows <= 64 and schedule.tile_rows & (schedule.tile_rows - 1) == 0


def test_refusals() -> None:
    with pytest.raises(LayoutError, match="65 and 0"):
        StepSchedule.from_layout(shaped(65, 0, 0))
    with pytest.raises(LayoutError, match="40 and 30"):
        StepSchedule.from_layout(shaped(40, 1, 30))
    with pytest.raises(LayoutError, match="anchored at 7"):
        StepSchedule.from_layout(build_layout([[2]], [[Block(0, 7, 1)]], cached=[4]))
    with pytest.raises(LayoutError, match="one document"):
        StepSchedule.from_layout(build_layout([[2, 1]], [[]]))
    layout, case = shaped(2, 1, 2), Case("scalar", True, True, 1, 9)
    args = operands(layout, case, 1, 16, 16, 1, torch.float32)
    with pytest.raises(LayoutError, match="schedule is for"):
        run(args, layout, case, schedule=StepSchedule.from_layout(shaped(2, 2, 2)).to(DEVICE))
    pending_k = args[6]
    assert pending_k is not None
    with pytest.raises(UsageError, match="pending_k has shape"):
        run([*args[:6], pending_k[:, :0], *args[7:]], layout, case)
    with pytest.raises(UsageError, match="needs pending_g"):
        run([*args[:8], None, args[9]], layout, case)
    with pytest.raises(UsageError, match="out must be"):
        run(args, layout, case, out=[torch.zeros(1, device=DEVICE)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 20, 4)], ids=str)
def test_rounding_at_full_size(shape: tuple[int, int, int], gate: str, dtype: torch.dtype) -> None:
    check_rounding(shaped(*shape, rows=2), Case(gate, True, True, 2, 10), (4, 128, 128), 5, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(16, 16), (80, 48), (256, 256)], ids=str)
def test_rounding_of_other_dims(dims: tuple[int, int]) -> None:
    for pending in (5, 1000):
        check_rounding(shaped(4, 4, 3), Case("scalar", True, True, 1, 11), (2, *dims), pending, torch.bfloat16)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_next_state_takes_the_place_of_the_state_where_the_layout_says_so(allowed: bool) -> None:
    """Of a step whose buffers nobody else reads (`StepLayout.overwrites`): the same numbers, and no other tensor."""
    blocks = [[Block(0, 7, 2), Block(0, 8, 2)], [Block(0, 5, 2), Block(0, 6, 2)]]
    made = build_layout([[2], [2]], blocks, cached=[6, 4], device=DEVICE)
    layout = StepLayout(*made.tensors())
    case = Case("scalar", True, True, 1, 3, 1.0)
    args = operands(layout, case, 2, 4, 16, 3, torch.float32)
    schedule = StepSchedule.from_layout(made).to(DEVICE)
    plain = run(args, layout, case, schedule=schedule)
    named: dict[str, Any] = dict(zip(OPERANDS, args, strict=True))
    if allowed:
        layout.overwriting()
    before = named["state"].clone()
    found = triton_decode.step(**named, layout=layout, schedule=schedule, **case.options())
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, plain, strict=True))
    assert (found[1] is named["state"]) is allowed and torch.equal(named["state"], before) is not allowed
