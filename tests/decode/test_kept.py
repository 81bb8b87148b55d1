"""What steps of a shape derive once: equal for any number of cached tokens, and kept from step to step."""

from __future__ import annotations

import inspect
import pkgutil
import weakref
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from flarec import ops, passes
from flarec.base.generation import GenerationOptions
from flarec.decode.plan import FAR, StepPlan, StepShape
from flarec.decode.rows import Rows
from flarec.layout import Layout
from flarec.passes import lower
from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine
from tests.models import captured

SHAPES = (StepShape(2, 1, 1), StepShape(1, 4, 4, 4, 3, 3), StepShape(3, 2, 2, 2, 1, 1), StepShape(2, 5, 5, 5, 4, 4),
          StepShape(2, 3, 3, 3, 2, 2, "block_end"))


def relative() -> list[Any]:
    """Every derivation that says of itself that the cached tokens do not matter, in the sizes that are used."""
    modules = [import_module(f"{package.__name__}.{found.name}")
               for package in (ops, passes) for found in pkgutil.iter_modules(package.__path__)]
    kinds: set[Any] = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)
             if getattr(kind, "relative", False) is True}
    made = []
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        made += [kind(width) for width in (2, 3, 4, 8)] if kind.__name__.startswith("Conv") else [kind()]
        if "narrow" in getattr(kind, "__dataclass_fields__", {}):
            made.append(kind(narrow=True))
    return made


def leaves(item: Any, layout: Layout) -> list[Any]:
    """All that a step reads. How many tokens are cached is read by the backward pass of a convolution alone."""
    value = item.build(layout, 64)
    if hasattr(value, "cached"):
        value = (value.table, value.starts, value.clean_length)
    return list(_pytree.tree_leaves(value))


def test_there_are_some() -> None:
    assert {type(item).__name__ for item in relative()} >= {"ConvOrder", "ConvWindows", "StepTiles", "Chunks"}


@pytest.mark.parametrize("item", relative(), ids=lambda item: str(item))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cached_tokens_do_not_matter(item: Any, shape: StepShape) -> None:
    plan = StepPlan(shape, torch.device("cpu"))
    kept = plan.layout(torch.zeros(shape.rows, dtype=torch.int64), None).kept
    assert kept is not None
    expected = leaves(item, kept.layout)
    assert any(isinstance(leaf, Tensor) for leaf in expected)
    for cached in (7, FAR, 1000):
        layout = plan.layout(torch.arange(cached, cached + shape.rows), None)
        for found, wanted in zip(leaves(item, layout), expected, strict=True):
            assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "recurrent_gemma"])
def test_they_are_made_once(family: str) -> None:
    """And what does depend on the cached tokens is made anew."""
    program = lower(captured(family), "decode")
    plan = StepPlan(SHAPES[1], torch.device("cpu"))
    first, second = (program.derive(plan.layout(torch.tensor([cached]), None), 64) for cached in (9, 10))
    same = {name for name in first if first[name] is second[name]}
    assert same == {name for name, item in program.derivations.items() if getattr(item, "relative", False)}
    assert same and same < set(first)
    placed = program.derive(plan.layout(torch.tensor([9]), torch.tensor([[1, 2, 3, 4]])), 64)
    assert not any(placed[name] is first[name] for name in first), "anchors that a mode computes may change"
    for name in same:
        values = zip(_pytree.tree_leaves(placed[name]), _pytree.tree_leaves(first[name]), strict=True)
        assert all(torch.equal(a, b) for a, b in values if isinstance(a, Tensor))


def test_few_plans_and_constants_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that end one by one step in as many shapes as they are; what is kept of them is bounded."""
    alive: weakref.WeakSet[StepPlan] = weakref.WeakSet()

    class Known(StepPlan):
        def __init__(self, shape: StepShape, device: torch.device) -> None:
            super().__init__(shape, device)
            alive.add(self)
            made.append(len(alive))

    made: list[int] = []
    monkeypatch.setattr("flarec.decode.rows.StepPlan", Known)
    sizes, held, constant = set[tuple[int, ...]](), list[int](), Rows.constant

    def counted(rows: Rows, value: int, *size: int) -> Tensor:
        found = constant(rows, value, *size)
        sizes.add(size)
        held.append(len(rows.constants))
        assert found.shape == size and bool((found == value).all())
        return found

    monkeypatch.setattr(Rows, "constant", counted)
    engine, _ = make_engine(FakeModel(agreement=0.5), 3)
    each = [GenerationOptions(mode="ar-trust", max_new_tokens=1 + n) for n in range(40)]
    results = engine.generate([[1, 2, 3]] * 40, each, batch=40)
    assert [len(item.token_ids) for item in results] == [1 + n for n in range(40)]
    assert Rows.most_plans and len(made) > Rows.most_plans >= max(made)
    assert len(sizes) > Rows.most_plans >= max(held)
