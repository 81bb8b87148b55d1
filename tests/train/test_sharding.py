"""Masters, gradients and moments in parts: where they are cut changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flarec.train import sharding
from flarec.train.precision import Weights
from flarec.train.ranks.group import Ranks
from flarec.train.saves import SavedState
from flarec.train.sharding import ShardedWeights, cut

SHAPES = {"a": (7, 5), "b": (64,), "c": (3, 2, 4), "alone": (1,), "never": (9, 2)}


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), lengths=st.lists(st.integers(1, 30), min_size=1)
)
def test_pieces_cover_the_parameters_once(sizes: list[int], lengths: list[int]) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    every = [(name, index) for name, size in named.items() for index in range(size)]
    found, start = [], 0
    for length in [*lengths, len(every)]:
        spans = cut(named, start, start + length)
        assert all(span.place.stop - span.place.start == span.stop - span.start for span in spans)
        places = [place for span in spans for place in range(span.place.start, span.place.stop)]
        assert places == list(range(len(places))), "one behind the other"
        found += [(span.name, index) for span in spans for index in range(span.start, span.stop)]
        start += length
    assert found == every


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """The one called `alone` is in another dtype than the others."""
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: nn.Parameter(value.to(torch.float64 if name == "alone" else dtype)) for name, value in values.items()}


class Run:
    """AdamW over some weights, with two backward passes a step."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.optimizer = torch.optim.AdamW(weights.optimized, lr=0.1, fused=True)

    def step(self, number: int, clip: float) -> Tensor:
        self.weights.forget()
        generator = torch.Generator().manual_seed(number)
        for _ in range(2):
            for name, parameter in self.weights.parameters.items():
                if name != "never" and (name != "c" or number):
                    value = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    parameter.grad = value if parameter.grad is None else parameter.grad + value
            self.weights.collect()
        norm = self.weights.clip(clip)
        self.optimizer.step()
        self.weights.round()
        return norm


def sharded(dtype: torch.dtype) -> Run:
    return Run(ShardedWeights(parameters(dtype), {"a": torch.full(SHAPES["a"], 0.1)}, Ranks("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [11, 1 << 25])
@pytest.mark.parametrize("clip", [1.0, float("inf")])
def test_steps_are_those_of_whole_weights(
    dtype: torch.dtype, elements: int, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW on pieces, with exact values behind rounded ones, and parameters that seldom have a gradient."""
    monkeypatch.setattr(sharding, "BUCKET_ELEMENTS", elements)
    exact = {"a": torch.full(SHAPES["a"], 0.1)}
    whole, parts = Run(Weights(parameters(dtype), exact)), sharded(dtype)
    if dtype == torch.float32:  # a parameter that is its own master has no exact value behind it
        whole = Run(Weights(parameters(dtype)))
        parts = Run(ShardedWeights(parameters(dtype), None, Ranks("cpu")))
    for number in range(3):
        torch.testing.assert_close(parts.step(number, clip).double(), whole.step(number, clip).double())
    (model, moments), (expected, expected_moments) = (run.weights.saved(run.optimizer) for run in (parts, whole))
    assert not any(name.startswith("never") for name in moments) and moments["c.step"] == 2 and moments["b.step"] == 3
    for found, values in ((model, expected), (moments, expected_moments)):
        assert found.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    for name, parameter in parts.weights.parameters.items():
        assert torch.equal(parameter, model[name].to(parameter.dtype)), "rounded from the masters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_continues_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are cut at other places, or whole, take it over as it is, and continue to rounding."""
    monkeypatch.setattr(sharding, "BUCKET_ELEMENTS", 11)
    first = sharded(dtype)
    for number in range(2):
        first.step(number, 1.0)
    saved = SavedState(*first.weights.saved(first.optimizer), {})
    runs = [sharded(dtype)]
    monkeypatch.setattr(sharding, "BUCKET_ELEMENTS", 13)
    runs += [sharded(dtype), Run(Weights(parameters(dtype)))]
    for run in runs:
        with torch.no_grad():
            for parameter in run.weights.parameters.values():
                parameter.fill_(7.0)
        run.weights.load(saved, run.optimizer)
    for found in ([*first.weights.saved(first.optimizer)], *([*run.weights.saved(run.optimizer)] for run in runs)):
        assert all(torch.equal(found[0][name], value) for name, value in saved.model.items())
        assert all(torch.equal(found[1][name], value) for name, value in saved.optimizer.items())
        assert found[1].keys() == saved.optimizer.keys()
    same, *others = ([*run.step(2, 1.0).view(1), *run.weights.saved(run.optimizer)] for run in (*runs, first))
    first_again = others.pop()
    assert all(torch.equal(same[1][name], value) for name, value in first_again[1].items())
    assert all(torch.equal(same[2][name], value) for name, value in first_again[2].items())
    for found in others:
        for name, value in same[1].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-6)


class Noting(Ranks):
    """Notes at every sum of gradients which parameters have one, and how many of them run at once."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.parameters: dict[str, nn.Parameter] = {}
        self.notes: list[tuple[set[str], int]] = []
        self.running = 0

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        self.running += 1
        self.notes.append(({name for name, value in self.parameters.items() if value.grad is not None}, self.running))
        super().reduce_scatter(part, whole)

        def wait() -> None:
            self.running -= 1

        return wait


def test_gradients_are_added_up_and_freed_while_the_backward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "BUCKET_ELEMENTS", 4)
    ranks = Noting()
    ranks.parameters = {name: nn.Parameter(torch.full((4,), 2.0)) for name in "abcd"}
    weights = ShardedWeights(ranks.parameters, None, ranks)
    stale = ShardedWeights(ranks.parameters, None, ranks)
    a, b, c, d = ranks.parameters.values()
    weights.backward((((a * b) * c) * d).sum())
    assert ranks.notes == [(set(), 1), (set(), 2), ({"a"}, 2), (set(), 2)], "d and c are gone when a and b come"
    assert ranks.running == 0 and all(bool((bucket.grad == 8).all()) for bucket in weights.buckets)
    assert all(bool((bucket.grad == 0).all()) for bucket in stale.buckets), "of the same parameters, but not at work"


def test_a_bucket_without_a_gradient_does_not_hold_up_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "BUCKET_ELEMENTS", 4)
    values = {name: nn.Parameter(torch.full((4,), 2.0)) for name in "abc"}
    weights = ShardedWeights(values, None, Ranks("cpu"))
    for _ in range(2):
        weights.backward((values["a"] * values["b"]).sum())
    weights.clip(float("inf"))
    assert [float(bucket.grad[0]) for bucket in weights.buckets] == [4.0, 4.0, 0.0]
    assert [tensor.grad is None for tensor in weights.optimized] == [False, False, True]


def test_widened_weights_are_the_masters() -> None:
    run = sharded(torch.bfloat16)
    run.step(1, 1.0)
    masters, _ = run.weights.saved(run.optimizer)
    run.weights.widen()
    for name, parameter in run.weights.parameters.items():
        assert parameter.dtype == masters[name].dtype and torch.equal(parameter, masters[name])


def test_kinds_are_those_of_whole_masters() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole, parts = (
            {name: (value.shape, value.dtype) for name, value in weights.kinds.items()}
            for weights in (Weights(parameters(dtype)), sharded(dtype).weights)
        )
        assert whole == parts
