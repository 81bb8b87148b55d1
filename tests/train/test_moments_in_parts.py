"""8-bit moments over several ranks: blocks are those of the whole parameters, wherever these are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flarec.errors import CheckpointError
from flarec.recipe import load_recipe
from flarec.train import sharding
from flarec.train.moments import BLOCK, MOMENTS, SCALE, make_optimizer
from flarec.train.precision import Weights
from flarec.train.ranks.group import Ranks
from flarec.train.saves import SavedState, check_tensors
from flarec.train.sharding import ShardedWeights, Stretch

SHAPES = {"a": (37, 40), "small": (9,), "b": (2048,), "never": (300, 2), "c": (257,)}
CODED = frozenset(SHAPES) - {"small"}
RECIPE = load_recipe("flare").override(["optimizer.moments=8bit", "optimizer.lr=0.1"])


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=5), ranks=st.integers(1, 5),
    elements=st.integers(1, 2000),
)
def test_parts_of_all_ranks_cover_every_parameter_and_begin_with_blocks(
    sizes: list[int], ranks: int, elements: int
) -> None:
    values = {str(number): nn.Parameter(torch.empty(size)) for number, size in enumerate(sizes)}
    every = [
        list(Stretch.all_of(values, {}, Ranks("cpu", rank, ranks), elements, frozenset(values)))
        for rank in range(ranks)
    ]
    found: dict[str, list[int]] = {name: [] for name in values}
    for stretches in zip(*every, strict=True):
        assert len({stretch.length for stretch in stretches}) == 1 and stretches[0].length % (BLOCK * ranks) == 0
        for rank, stretch in enumerate(stretches):
            for span in stretch.pieces:
                assert span.start % BLOCK == span.at % BLOCK == 0 and span.place.stop <= stretch.length // ranks
                found[span.name] += range(span.start, span.stop)
                whole = next(one for one in stretch.spans if one.start <= span.start < one.stop and
                             one.name == span.name)
                there = whole.at + span.start - whole.start
                assert there == rank * (stretch.length // ranks) + span.at, "where the others expect it"
    assert {name: sorted(places) for name, places in found.items()} == {
        name: list(range(len(value))) for name, value in values.items()
    }


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


class Run:
    """Steps without clipping: a norm would be added up in another order."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.optimizer = make_optimizer(RECIPE, weights.optimized, weights.optimized_in_codes)

    def step(self, number: int) -> None:
        self.weights.forget()
        generator = torch.Generator().manual_seed(number)
        for name, parameter in self.weights.parameters.items():
            value = torch.randn(parameter.shape, generator=generator) * torch.rand(parameter.shape, generator=generator)
            if name != "never" and (name != "c" or number):
                parameter.grad = value.to(parameter.dtype)
        self.weights.collect()
        self.weights.clip(float("inf"))
        self.optimizer.step()
        self.weights.round()

    def saved(self) -> SavedState:
        model, optimizer = self.weights.saved(self.optimizer)
        model, optimizer = ({name: value.clone() for name, value in part.items()} for part in (model, optimizer))
        return SavedState(model, optimizer, {})


def whole(dtype: torch.dtype) -> Run:
    return Run(Weights(parameters(dtype), coded=CODED))


def parts(dtype: torch.dtype) -> Run:
    return Run(ShardedWeights(parameters(dtype), None, Ranks("cpu"), {"a": 0, "b": 0}, CODED))


def check_equal(found: SavedState, expected: SavedState) -> None:
    for one, other in ((found.model, expected.model), (found.optimizer, expected.optimizer)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [300, 1 << 25])
def test_codes_and_weights_do_not_depend_on_where_parameters_are_cut(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "BUCKET_ELEMENTS", elements)
    runs = [whole(dtype), parts(dtype)]
    for number in range(3):
        for run in runs:
            run.step(number)
    expected, found = (run.saved() for run in runs)
    check_equal(found, expected)
    assert not any(key.startswith("never") for key in found.optimizer) and found.optimizer["c.step"] == 2
    for name, shape in SHAPES.items():
        for moment in MOMENTS if name != "never" else ():
            value = found.optimizer[f"{name}.{moment}"]
            assert (value.shape, value.dtype == torch.uint8) == (torch.Size(shape), name in CODED)
            scales: Tensor | None = found.optimizer.get(f"{name}.{moment}{SCALE}")
            assert (scales is None) == (name not in CODED)
            assert scales is None or len(scales) == -(-value.numel() // BLOCK)
    # what no optimizer has seen yet is counted as well
    there = sum(v.nbytes for key, v in expected.optimizer.items() if not key.endswith(".step"))
    assert runs[0].weights.moment_bytes == there + 2 * (600 + 4 * 3)
    for run in runs:
        check_tensors(run.saved(), run.weights.kinds, CODED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_continues_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts that are cut elsewhere, and whole."""
    monkeypatch.setattr(sharding, "BUCKET_ELEMENTS", 300)
    first = parts(dtype)
    for number in range(2):
        first.step(number)
    saved = first.saved()
    first.step(2)
    for elements in (300, 700, None):
        monkeypatch.setattr(sharding, "BUCKET_ELEMENTS", elements or 300)
        run = parts(dtype) if elements else whole(dtype)
        with torch.no_grad():
            for parameter in run.weights.parameters.values():
                parameter.fill_(7.0)
        run.weights.load(saved, run.optimizer)
        check_equal(run.saved(), saved)
        run.step(2)
        check_equal(run.saved(), first.saved())


def test_a_save_of_other_moments_is_refused() -> None:
    run = whole(torch.float32)
    run.step(1)
    saved = run.saved()
    for coded in (frozenset[str](), CODED - {"a"}, CODED | {"small"}):
        with pytest.raises(CheckpointError, match="belongs to another model"):
            check_tensors(saved, run.weights.kinds, coded)
    short = {**saved.optimizer, f"a.exp_avg{SCALE}": saved.optimizer[f"a.exp_avg{SCALE}"][:-1]}
    with pytest.raises(CheckpointError, match="belongs to another model"):
        check_tensors(SavedState(saved.model, short, {}), run.weights.kinds, CODED)
