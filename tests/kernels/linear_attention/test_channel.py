"""Triton linear attention with one decay per key channel: output, states and all gradients against the reference in
float64, with NaN on padding and in memory that no kernel has written; extreme decays; 16-bit inputs against the
rounding of the reference; equal channels against the kernels for one decay per head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flarec.kernels.linear_attention import reference, reference_states
from flarec.kernels.linear_attention.tiles.schedule import TileSchedule, largest_chunk
from flarec.layout import Block, Layout, build_layout
from tests.kernels.linear_attention.cases import poison_padding
from tests.oracles.layouts import layouts

pytest.importorskip("triton")

from flarec.kernels.linear_attention.tiles.channel import launch
from flarec.kernels.linear_attention.tiles.train import two_stream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

op: Any = two_stream  # untyped, as `states_of`: tests unpack inputs before further positional arguments
states_of: Any = reference_states
Results = dict[str, Tensor]
MARGIN, FLOOR = 20, 1e-6


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Case:
    """Options of the op and sizes of its random inputs."""

    delta: bool = True
    l2norm: bool = True
    group: int = 1
    decay: float = 1.0
    seed: int = 0
    key_heads: int = 1
    key_dim: int = 5
    value_dim: int = 3
    dtype: torch.dtype = torch.float32

    @property
    def options(self) -> dict[str, Any]:
        return {"delta": self.delta, "l2norm": self.l2norm}

    def inputs(self, layout: Layout) -> dict[str, Tensor | None]:
        """q, k, v in the case's dtype; g, beta and initial_state in float32."""
        gen = torch.Generator().manual_seed(self.seed)
        rows, length, heads = layout.rows, layout.length, self.key_heads * self.group

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        keys = (rows, length, self.key_heads, self.key_dim)
        wide = {
            "q": normal(*keys),
            "k": normal(*keys) * self.key_dim**-0.5,
            "v": normal(rows, length, heads, self.value_dim),
        }
        single = {
            "g": -self.decay * torch.nn.functional.softplus(normal(rows, length, heads, self.key_dim)),
            "beta": normal(rows, length, heads).sigmoid(),
            "initial_state": normal(rows, heads, self.key_dim, self.value_dim),
        }
        low = {n: x.to(self.dtype) for n, x in wide.items()} | {n: x.float() for n, x in single.items()}
        return {n: x.to(DEVICE).requires_grad_() for n, x in low.items()}


def run(function: Any, case: Case, inputs: dict[str, Any], where: Layout | TileSchedule) -> Results:
    """Output and all gradients of an op or its reference."""
    tensors = [inputs[n] for n in ("q", "k", "v", "g", "beta")]
    out = function(*tensors, where, scale=0.6, initial_state=inputs["initial_state"], **case.options)
    gen = torch.Generator().manual_seed(case.seed)
    weights = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(case.dtype).to(out)
    grads = torch.autograd.grad(out, list(inputs.values()), weights, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(inputs, grads, strict=True))}


def run_reference(case: Case, inputs: dict[str, Tensor | None], layout: Layout, dtype: torch.dtype | None) -> Results:
    leaves = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in inputs.items() if x is not None}
    return run(reference, case, leaves, layout)


def run_triton(case: Case, inputs: dict[str, Tensor | None], layout: Layout, size: int) -> Results:
    schedule = TileSchedule.from_layout(layout, size, size)
    return run(two_stream, case, poison_padding(inputs, layout), schedule)


def distance(x: Tensor, exact: Tensor) -> float:
    return float((x.detach().double() - exact.detach()).norm() / (exact.detach().norm() + 1e-300))


def assert_equal_to_reference(
    case: Case, layout: Layout, size: int = 16, inputs: dict[str, Tensor | None] | None = None
) -> None:
    """Within what the loop in float32 loses itself, times a margin for the other order of operations, and what float32
    cumulative sums lose, which grow with the decay."""
    layout = layout.validate().to(DEVICE)
    inputs = case.inputs(layout) if inputs is None else inputs
    exact = run_reference(case, inputs, layout, torch.float64)
    loop = run_reference(case, inputs, layout, None)
    padding = layout.token_document() < 0
    for name, mine in run_triton(case, inputs, layout, size).items():
        budget = MARGIN * distance(loop[name], exact[name]) + FLOOR * max(1.0, case.decay)
        assert distance(mine, exact[name]) <= budget, f"{name}: {distance(mine, exact[name]):.2e} > {budget:.2e}"
        if name != "initial_state":
            assert not mine[padding].any(), f"{name} is not 0 on padding"


MIXED = build_layout(
    [[37, 6], [9]],
    [
        [
            *[Block(0, a, 3, view, "causal" if view else "block_end") for view in (0, 1) for a in range(5, 17, 3)],
            *[Block(1, 0, 2), Block(1, 6, 3), Block(0, 32, 5), Block(0, 37, 4, 0, "causal")],
        ],
        [Block(0, 2, 1), Block(0, 4, 7), Block(0, 9, 2, 0, "causal"), Block(0, 11, 16, 1)],
    ],
    cached=[0, 2],
)


@pytest.mark.parametrize(
    "case",
    [Case(*x, seed=7) for x in ((True, True, 1), (True, False, 2), (False, True, 2), (False, False, 1))],
    ids=lambda c: f"delta={c.delta}-l2norm={c.l2norm}-group={c.group}",
)
def test_every_kind_on_a_mixed_layout(case: Case) -> None:
    """Rows, documents and views, straddling blocks, both readouts, a block of a whole tile, anchors at all borders.

    Every two options in all their combinations; the test below draws all three.
    """
    assert_equal_to_reference(case, MIXED)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    layout=layouts(max_clean=18, max_block=9),
    delta=st.booleans(),
    l2norm=st.booleans(),
    group=st.integers(1, 2),
    decay=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 999),
)
def test_equals_reference(layout: Layout, delta: bool, l2norm: bool, group: int, decay: float, seed: int) -> None:
    assert_equal_to_reference(Case(delta, l2norm, group, decay, seed), layout)


@pytest.mark.parametrize("length", [1, 64, 65])
def test_lengths_at_chunk_borders(length: int) -> None:
    """Whole tiles of 64 rows, head dims that are no powers of two, a block as long as a tile; anchors up to the end."""
    blocks = [Block(0, a, 5, 0) for a in range(0, length, 5)]
    blocks += [Block(0, length, 64, 1), Block(0, length // 2, 64, 2, "causal")]
    assert_equal_to_reference(Case(key_dim=40, value_dim=20), build_layout([[length]], [blocks]), 64)


LONG_ENOUGH = build_layout(
    [[70]],
    [[Block(0, a, 4, view, "causal" if view else "block_end") for view in (0, 1) for a in range(3, 70, 4)]],
)


@pytest.mark.parametrize("decay", [0.1, 3.0, 8.0])
def test_weak_and_strong_decay(decay: float) -> None:
    """Pairs of a chunk in one product; one for every piece of 16 rows, then digits; digits alone."""
    assert_equal_to_reference(Case(decay=decay, seed=3), LONG_ENOUGH, 64)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], set[int]]]:
    """(chunk_direct, tile_direct), each as the set of their values, of every forward and backward from here on."""
    seen: list[tuple[set[int], set[int]]] = []
    original = launch.decay

    def watched(*arguments: Any) -> dict[str, Tensor]:
        made = original(*arguments)
        seen.append((set(made["chunk_direct"].flatten().tolist()), set(made["tile_direct"].flatten().tolist())))
        return made

    monkeypatch.setattr(launch, "decay", watched)
    return seen


@pytest.mark.parametrize(
    ("where", "l2norm"), [("in blocks", True), ("in a chunk", False), ("in a channel of a head", True)]
)
def test_one_product_for_some(where: str, l2norm: bool, direct: list[tuple[set[int], set[int]]]) -> None:
    """Chunks and tiles that decay too much for one product of their pairs, beside others that do not."""
    case = Case(l2norm=l2norm, group=2, decay=0.2, seed=6)
    layout = LONG_ENOUGH.validate().to(DEVICE)
    inputs = case.inputs(layout)
    gates = inputs["g"]
    assert gates is not None
    with torch.no_grad():
        if where == "in blocks":
            gates[:, 80:90] *= 300
        elif where == "in a chunk":
            gates[:, 8:24] *= 50
        else:
            gates[:, :, 1, 3] *= 200
    assert_equal_to_reference(replace(case, decay=5.0), layout, 64, inputs)  # the budget of the stronger decay
    assert direct == [({"in blocks": {1}}.get(where, {0, 1}), {"in a chunk": {1}}.get(where, {0, 1}))] * 2


def test_total_decay() -> None:
    """A factor exp(-gam) of a single row would overflow float32; gradients of log decays vanish."""
    case, layout = Case(decay=300.0, seed=3), LONG_ENOUGH.to(DEVICE)
    inputs = case.inputs(layout)
    exact = run_reference(case, inputs, layout, torch.float64)
    mine = run_triton(case, inputs, layout, 64)
    assert float((mine.pop("g") - exact["g"]).norm()) < FLOOR * float(exact["k"].norm())
    assert float((mine.pop("initial_state") - exact["initial_state"]).norm()) < FLOOR * float(exact["k"].norm())
    assert all(distance(x, exact[name]) < FLOOR for name, x in mine.items())


def test_equal_channels_equal_one_decay_per_head() -> None:
    case = Case(group=2, seed=5)
    layout = MIXED.to(DEVICE)
    inputs = case.inputs(layout)
    assert inputs["g"] is not None
    per_head = inputs["g"].detach()[..., :1]
    channel = run_triton(
        case, inputs | {"g": per_head.expand_as(inputs["g"]).contiguous().requires_grad_()}, layout, 16
    )
    scalar = run_triton(case, inputs | {"g": per_head[..., 0].contiguous().requires_grad_()}, layout, 16)
    channel["g"] = channel["g"].sum(-1)
    for name, expected in scalar.items():
        torch.testing.assert_close(channel[name], expected, rtol=1e-4, atol=2e-5, msg=f"{name} differs")


@pytest.mark.parametrize("delta", [True, False])
def test_final_state(delta: bool) -> None:
    """The state and gradients through it, with documents that end inside a chunk and one that has no clean token."""
    case = Case(delta=delta, seed=2)
    layout = build_layout([[21, 4], []], [[Block(0, 8, 3)], [Block(0, 6, 2)]], cached=[0, 6]).validate().to(DEVICE)
    leaves: dict[str, Any] = case.inputs(layout)
    weights = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    names = ("k", "v", "g", "beta", "initial_state")

    schedule = TileSchedule.from_layout(layout, 16, 16)
    given_inputs: Any = poison_padding(leaves, layout)
    tensors = [given_inputs[n] for n in ("q", "k", "v", "g", "beta")]
    initial = given_inputs["initial_state"]
    _, state = op(*tensors, schedule, scale=1.0, initial_state=initial, final_state=True, **case.options)
    grads = torch.autograd.grad(state, [given_inputs[n] for n in names], weights)

    wide = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    *tensors, initial = (wide[n] for n in names)
    expected = states_of(*tensors, layout, initial_state=initial, **case.options)
    assert distance(state, expected) < FLOOR
    exact_grads = torch.autograd.grad(expected, [wide[n] for n in names], weights.double())
    for name, mine, exact in zip(names, grads, exact_grads, strict=True):
        assert distance(mine, exact) < 2 * FLOOR, name


def low_precision_reference(case: Case, inputs: dict[str, Tensor | None], layout: Layout) -> Results:
    """The loop with every intermediate value, states and gates included, in the case's dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "promote_types", lambda a, _: a)  # the loop takes the dtype of q
        return run_reference(case, inputs, layout, case.dtype)


def assert_within_twice_the_rounding(case: Case, layout: Layout) -> None:
    layout = layout.validate().to(DEVICE)
    inputs = case.inputs(layout)
    exact = run_reference(case, inputs, layout, torch.float64)
    low = low_precision_reference(case, inputs, layout)
    for name, mine in run_triton(case, inputs, layout, 64).items():
        error, budget = distance(mine, exact[name]), distance(low[name], exact[name])
        assert error <= 2 * budget, f"{name}: error {error:.2e}, reference in {case.dtype} {budget:.2e}"


TWO_VIEWS = build_layout([[90]], [[Block(0, a, 4, view) for view in (0, 1) for a in range(20, 90, 4)]])


@pytest.mark.parametrize("decay", [0.1, 1.0, 8.0])
def test_within_twice_the_rounding_of_the_reference(decay: float) -> None:
    assert_within_twice_the_rounding(Case(decay=decay, key_dim=32, value_dim=32, dtype=torch.float16), TWO_VIEWS)


def test_gate_gradients_do_not_cancel() -> None:
    """At strong decay a log decay's gradient is a small rest of large terms: it must be as exact as the others."""
    case = Case(decay=8.0, key_dim=32, value_dim=32, dtype=torch.float16)
    layout = TWO_VIEWS.to(DEVICE)
    inputs = case.inputs(layout)
    exact = run_reference(case, inputs, layout, torch.float64)
    mine = run_triton(case, inputs, layout, 64)
    assert distance(mine["g"], exact["g"]) < 2 * distance(mine["k"], exact["k"])


def test_deterministic() -> None:
    case = Case(seed=4)
    layout = MIXED.to(DEVICE)
    inputs = case.inputs(layout)
    first, second = (run_triton(case, inputs, layout, 16) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (32, 48), (64, 64), (96, 80), (256, 256), (128, 64)], ids=str)
def test_other_heads(dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case(key_heads=2, key_dim=dims[0], value_dim=dims[1], dtype=dtype)
    assert_within_twice_the_rounding(case, TWO_VIEWS)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(8, 8), (16, 16), (64, 64), (128, 128), (256, 64)], ids=str)
def test_float32_heads(dims: tuple[int, int]) -> None:
    """As wide as the chunk that float32 leaves room for: 64 to 16 rows."""
    case = Case(group=2, key_dim=dims[0], value_dim=dims[1])
    assert_equal_to_reference(case, TWO_VIEWS, largest_chunk(torch.float32, *dims))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [0.1, 3.0, 8.0])
def test_decays_of_large_heads(decay: float, dtype: torch.dtype) -> None:
    case = Case(l2norm=False, decay=decay, key_dim=128, value_dim=128, dtype=dtype)
    assert_within_twice_the_rounding(case, TWO_VIEWS)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_heads(length: int, dtype: torch.dtype) -> None:
    blocks = [Block(0, a, 4, view) for view in (0, 1) for a in range(0, length, 4)]
    case = Case(key_heads=2, key_dim=128, value_dim=128, dtype=dtype)
    assert_within_twice_the_rounding(case, build_layout([[length]], [blocks]))
