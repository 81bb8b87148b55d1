"""The Triton decode step of softmax attention against the loop over tokens: outputs, caches, what it never reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec import ops
from flarec.errors import UsageError
from flarec.kernels.softmax_attention.reference import reference_step
from flarec.layout import Block, Layout, build_layout
from tests.oracles.layouts import layouts

pytest.importorskip("triton")

from flarec.kernels.softmax_attention.step import launch as step_launch
from flarec.kernels.softmax_attention.step.launch import MANY_ROWS, MOST_SPLITS, PROCESSORS, StepLaunch, launch_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
step: Any = step_launch.step  # untyped: tests unpack tensors before further positional arguments
run: Any = step_launch.run
oracle: Any = reference_step


def operands(
    layout: Layout, capacity: int, heads: int, group: int, dim: int, value_dim: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """q, k, v and caches; NaN on padding and in cache slots that hold nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, tokens: int, size: int) -> Tensor:
        return torch.randn(layout.rows, count, tokens, size, generator=generator, dtype=torch.float64).to(dtype)

    sizes = ((heads * group, layout.length, dim), (heads, layout.length, dim), (heads, layout.length, value_dim))
    made = [normal(*size) for size in (*sizes, (heads, capacity, dim), (heads, capacity, value_dim))]
    padding = (layout.token_document() < 0)[:, None, :, None]
    empty = (torch.arange(capacity) >= layout.cached[:, None])[:, None, :, None]
    return [x.masked_fill(padding if i < 3 else empty, torch.nan) for i, x in enumerate(made)]


def compare(
    layout: Layout, given: list[Tensor], rtol: float, launch: StepLaunch | None = None, shift: int = 0, **options: Any
) -> None:
    """shift: numbers before each table in a buffer of its own."""
    layout = layout.validate()
    exact = [x.double() for x in given]
    wanted = oracle(*exact, layout, **options)
    moved, there = [x.to(DEVICE, copy=True) for x in given], layout.to(DEVICE)
    if launch is None:
        found = step(*moved, there, **options)
    else:
        names = ("clean_document", "clean_position", "noisy_block", "noisy_position", "block_anchor", "block_readout")
        tables = [getattr(there, name) for name in (*names, "cached")]
        tensors = tuple(torch.cat([x.new_zeros(shift), x.flatten()])[shift:].view(x.shape) for x in tables)
        found = run(*moved, tensors, launch=launch, **{"window": None, "softcap": None} | options)
    assert found.dtype == given[0].dtype
    error = (found.cpu().double() - wanted).norm() / wanted.norm()
    assert float(error) < rtol, f"{float(error):.1e}"
    padding = layout.token_document() < 0
    assert not found.cpu()[padding].any()
    for cache, new in zip(moved[3:], exact[3:], strict=True):
        assert torch.equal(cache.cpu().double().nan_to_num(7), new.nan_to_num(7))


STEP = build_layout(
    [[3], [1], []],
    [[Block(0, 21, 2), Block(0, 23, 2, readout="causal")], [Block(0, 5, 3)], [Block(0, 9, 2)]],
    cached=[20, 4, 9],
)
"""Three requests: drafts and branches, one row and one block, and a block that starts at the cache's end."""
SHAPES = [
    (2, 2, 16, 16, None, None),
    (1, 4, 24, 16, 7, None),  # a window, and keys wider than values
    (2, 1, 40, 20, None, 3.0),  # a soft cap, and widths that are no powers of two
]


@pytest.mark.parametrize(("heads", "group", "dim", "value_dim", "window", "softcap"), SHAPES)
@pytest.mark.parametrize(("splits", "many"), [(1, False), (3, False), (1, True), (3, True)])
def test_a_step_is_the_loop(
    heads: int, group: int, dim: int, value_dim: int, window: int | None, softcap: float | None, splits: int,
    many: bool,
) -> None:
    given = operands(STEP, 32, heads, group, dim, value_dim, torch.float32)
    launch = StepLaunch(queries=16, keys=16 if CUDA else 8, splits=splits, stages=1, many=many)
    compare(STEP, given, 2e-6, launch, scale=dim**-0.5, window=window, softcap=softcap)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_low_precision(dtype: torch.dtype, rtol: float) -> None:
    """Against float64 on the same operands: weights and output are rounded once each, and the interpreter cuts off."""
    compare(STEP, operands(STEP, 32, 2, 2, 32, 32, dtype), rtol, scale=0.2)


@settings(max_examples=8 if not CUDA else 60)
@given(
    layout=layouts(single_document=True, max_clean=6, max_block=3),
    window=st.one_of(st.none(), st.integers(1, 6)),
    splits=st.integers(1, 2),
    many=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_layout(layout: Layout, window: int | None, splits: int, many: bool, seed: int) -> None:
    capacity = int((layout.cached + layout.clean_length).max()) + 2
    given = operands(layout, capacity, 1, 2, 16, 16, torch.float32, seed)
    if not given[0].numel():
        return
    compare(layout, given, 2e-6, StepLaunch(16, 16, splits, stages=1, many=many), scale=0.3, window=window)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("splits", [1, 2])
def test_a_prefill_is_the_loop(window: int | None, splits: int) -> None:
    """Prompts of unequal length behind caches of unequal length: keys that all rows of a tile read, some read, or none;
    a block behind one of them, and groups of heads that no tile holds whole."""
    layout = build_layout([[70], [41]], [[Block(0, 103, 3, readout="causal")], []], cached=[33, 0])
    given = operands(layout, 128, 1, 3, 16, 16, torch.float32)
    compare(layout, given, 2e-6, StepLaunch(16, 16, splits, stages=1, many=True), scale=0.3, window=window)


@pytest.mark.parametrize(("splits", "window"), [(1, None), (3, 5)])
def test_many_rows_get_what_few_get(splits: int, window: int | None) -> None:
    """Bit for bit: the kernel of a prefill takes the same keys in the same order."""
    layout = build_layout([[20], [7]], [[], []], cached=[40, 3])
    given, there = [x.to(DEVICE) for x in operands(layout, 64, 1, 2, 16, 16, torch.float32)], layout.to(DEVICE)
    tensors = (there.clean_document, there.clean_position, there.noisy_block, there.noisy_position, there.block_anchor,
               there.block_readout, there.cached)
    few, many = (
        run(*[x.clone() for x in given], tensors, scale=0.3, window=window, softcap=None,
            launch=StepLaunch(16, 16, splits, stages=1, many=kind)) for kind in (False, True)
    )
    assert torch.equal(few, many)


def test_operands_may_lie_anywhere_and_must_fit() -> None:
    given = operands(STEP, 32, 2, 2, 16, 16, torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    compare(STEP, turned, 2e-6, scale=0.25)
    q, k, v, k_cache, v_cache = given
    wrong: list[tuple[list[Tensor], float | None, str]] = [
        ([q, k, v[..., :8], k_cache, v_cache], None, "do not fit"),
        ([q, k[:, :, 1:], v, k_cache, v_cache], None, "do not fit"),
        ([q, k.double(), v, k_cache, v_cache], None, "different dtypes"),
        ([q, k, v, k_cache, v_cache], -1.0, "not positive"),
        ([q[..., :8], k[..., :8], v, k_cache[..., :8], v_cache], None, "outside"),
    ]
    for tensors, softcap, message in wrong:
        with pytest.raises(UsageError, match=message):
            step(*tensors, STEP, scale=0.3, softcap=softcap)


def test_launches_fill_the_device_and_leave_short_caches_whole() -> None:
    for dim in (64, 128, 256):
        for rows in (1, 4, 64, 2000):
            for pairs in (1, 2, 5, 20, 80, 256):
                for capacity in (0, 64, 32768):
                    launch = launch_of(torch.bfloat16, dim, rows, pairs, capacity)
                    assert launch.many == (rows >= MANY_ROWS)
                    assert 16 <= launch.queries <= (128 if launch.many else 64) and 1 <= launch.splits <= MOST_SPLITS
                    # every split has a tile of keys where the cache is full, and all of them run at once
                    assert launch.splits == 1 or launch.splits * launch.keys <= capacity
                    programs = pairs * -(-rows // launch.queries) * launch.splits
                    assert launch.splits == 1 or launch.many or programs <= 2 * PROCESSORS
                    if capacity == 32768 and not launch.many:
                        assert programs > PROCESSORS or launch.splits == MOST_SPLITS
    for room, tiles in ((227, (128, 64)), (163, (128, 32)), (99, (64, 32))):  # KiB of an H100, an A100, an L40S
        launch = launch_of(torch.bfloat16, 256, 32768, 2, 8192, room << 10)
        assert (launch.queries, launch.keys) == tiles
    assert launch_of(torch.bfloat16, 256, 64, 2, 32768).splits == MOST_SPLITS
    assert launch_of(torch.bfloat16, 256, 4, 2, 64).splits == 1
    # drafts of one request: tiles of 16 rows, so that there are programs for more of the device
    assert launch_of(torch.bfloat16, 256, 64, 2, 1024).queries == 16
    assert launch_of(torch.bfloat16, 256, 64, 128, 1024) == StepLaunch(64, 32, 1)
    assert launch_of(torch.bfloat16, 64, 4, 10, 32768).splits == 2 * PROCESSORS // 10  # no power of two
    assert launch_of(torch.bfloat16, 256, 64, 128, 1024, 163 << 10).warps == 8


def test_launches_are_near_the_fastest_ones_of_an_h200() -> None:
    """`benchmarks/softmax_step.py` timed others beside them: 8 heads of 256 over 2 key heads."""
    record = json.loads((Path(__file__).parents[2] / "benchmarks/results/softmax-step-h200.json").read_text())
    assert len(record["rows"]) == 12
    for row in record["rows"]:
        clean, cached = row["clean"], row["cached"]
        tokens = clean if clean == 1 else 4 * clean  # blocks of 3
        capacity = 1 << (cached + clean).bit_length()
        launch = launch_of(torch.bfloat16, 256, 4 * tokens, 2 * row["requests"], capacity)
        times = {StepLaunch(**{key: value for key, value in one.items() if key != "us"}): one["us"]
                 for one in row["timed"]}
        assert launch in times and times[launch] < 1.2 * min(times.values()), (row["chosen"], launch)


def test_a_compiler_sees_one_op_that_writes_the_caches() -> None:
    q, k, v, k_cache, v_cache = (x.to(DEVICE) for x in operands(STEP, 32, 1, 1, 16, 16, torch.float32))
    call = ops.SOFTMAX_ATTENTION.call(ops.TRITON, step=True)
    layout, options = STEP.to(DEVICE), {"scale": 0.25, "window": None, "softcap": None}

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        out: Tensor = call(q=q, k=k, v=v, k_cache=keys, v_cache=values, layout=layout, **options)
        return out

    mine, other = [k_cache.clone(), v_cache.clone()], [k_cache.clone(), v_cache.clone()]
    torch._dynamo.reset()
    fast = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(*mine), attend(*other))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(mine, other, strict=True))
    assert not torch.equal(mine[0].nan_to_num(7), k_cache.nan_to_num(7))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "group", "dim", "value_dim"), [(2, 4, 256, 256), (2, 4, 128, 128), (4, 1, 192, 128)])
def test_real_sizes_on_a_gpu(dtype: torch.dtype, heads: int, group: int, dim: int, value_dim: int) -> None:
    """Long caches of different lengths, drafts with a branch behind each, chosen launches, also from a CUDA graph."""
    held = [9000, 317]
    blocks = [[Block(0, start + i, 3) for i in range(1, 5)] for start in held]
    layout = build_layout([[4], [4]], blocks, cached=held)
    given = operands(layout, 9216, heads, group, dim, value_dim, dtype)
    rtol = 2e-5 if dtype == torch.float32 else 6e-3
    for window in (None, 1000):
        compare(layout, [x.clone() for x in given], rtol, scale=dim**-0.5, window=window)
    prompt = build_layout([[700], [300]], [[Block(0, 9700, 3)], []], cached=held)
    long = operands(prompt, 9984, heads, group, dim, value_dim, dtype)
    for window in (None, 1000):
        compare(prompt, [x.clone() for x in long], rtol, scale=dim**-0.5, window=window)
    moved, there = [x.cuda() for x in given], layout.to("cuda")
    eager = step(*moved, there, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*moved, there, scale=0.1)
    graph.replay()
    assert torch.equal(found, eager)


@pytest.mark.gpu
def test_kinds_of_steps_share_what_is_compiled() -> None:
    """Other counts of rows and blocks, splits, capacities of the cache, and places of the tables in a buffer."""
    from flarec.kernels.softmax_attention.step.kernel import attention_kernel, combine_kernel

    def compiled() -> tuple[int, int]:
        device = torch.cuda.current_device()
        return len(attention_kernel.device_caches[device][0]), len(combine_kernel.device_caches[device][0])

    def take(clean: int, blocks: int, splits: int, capacity: int, shift: int = 0) -> None:
        anchors = [Block(0, 20 + index % clean, 2) for index in range(blocks)]
        layout = build_layout([[clean]], [anchors], cached=[20])
        given = operands(layout, capacity, 1, 2, 48, 48, torch.bfloat16)
        compare(layout, given, 6e-3, StepLaunch(16, 16, splits), shift, scale=0.2)

    take(2, 1, 2, 64)
    before = compiled()
    for kind in ((1, 0, 2, 64), (1, 1, 2, 80), (4, 4, 2, 64), (16, 0, 2, 96), (3, 1, 2, 65), (3, 1, 2, 65, 1)):
        take(*kind)
    assert compiled() == before
    take(3, 2, 4, 64)
    assert compiled() == (before[0], before[1] + 1), "other powers of two of splits are combined by another program"
