"""Decode steps of few rows: the loops of `reference_step`, which steps are taken for them, and the commit before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flarec.kernels.linear_attention.panels import decode, few_rows
from flarec.kernels.linear_attention.panels.commit import commit
from flarec.kernels.linear_attention.panels.schedule import StateSchedule
from flarec.kernels.linear_attention.reference_step import reference_commit, reference_step
from flarec.layout import Block, Layout, build_layout
from tests.kernels.linear_attention.cases import Case, cases


def step_layout(clean: int, anchors: list[list[int]], size: int = 2, readout: str = "causal") -> Layout:
    """Requests of 7 cached tokens with so many clean rows, and blocks behind so many of them."""
    blocks = [[Block(0, 7 + anchor, size, readout=readout) for anchor in row] for row in anchors]
    return build_layout([[clean]] * len(anchors), blocks, cached=[7] * len(anchors))


def both(layout: Layout, case: Case, pending: int) -> tuple[Any, Any]:
    """What the step and its definition give, for pending rows of which those that are not accepted are undefined."""
    inputs = {name: None if x is None else x.detach() for name, x in case.inputs(layout).items()}
    before = case.inputs(build_layout([[pending]] * layout.rows, [[]] * layout.rows))
    generator = torch.Generator().manual_seed(case.seed)
    accepted = torch.randint(0, pending + 1, (layout.rows,), generator=generator)
    dropped = (torch.arange(pending) >= accepted[:, None])[:, :, None, None]
    kept: dict[str, Any] = {"pending_k": before["k"], "pending_d": before["v"], "pending_g": before["g"]}
    for name, value in kept.items():
        if value is not None:
            mask = dropped if value.ndim == 4 else dropped[..., 0]
            kept[name] = value.detach().masked_fill(mask, float("nan"))
    given = inputs | kept | case.options() | {"accepted": accepted, "layout": layout, "state": inputs["initial_state"]}
    del given["initial_state"]
    return decode.step(**given, schedule=StateSchedule.from_layout(layout)), reference_step(**given)


@settings(max_examples=40, deadline=None)
@given(
    case=cases, clean=st.integers(1, 4), pending=st.integers(0, 3), size=st.integers(1, 3),
    anchors=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=3),
)
def test_a_step_equals_its_definition(
    case: Case, clean: int, pending: int, size: int, anchors: list[list[int]]
) -> None:
    layout = step_layout(clean, [[min(anchor, clean) for anchor in row] for row in anchors], size)
    found, expected = both(layout, case, pending)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """An entry for every call of a function of a module."""
    calls: list[None] = []
    function = getattr(module, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, noted)
    return calls


SCALAR = Case("scalar", True, True, 2, 5)


@pytest.mark.parametrize(
    ("layout", "case", "few"),
    [
        (step_layout(1, [[]] * 2), SCALAR, True),
        (step_layout(3, [[1, 2, 3]] * 2), SCALAR, True),
        (step_layout(3, [[1], [3]]), Case("none", False, False, 1, 5), True),
        (step_layout(3, [[1], [3]], readout="block_end"), SCALAR, False),
        (step_layout(3, [[1], [3]]), Case("channel", True, True, 2, 5), False),
        (step_layout(few_rows.MOST_ROWS + 1, [[]]), SCALAR, False),
        (build_layout([[3], [2]], [[], []], cached=[7, 7]), SCALAR, False),
        (build_layout([[2, 1]], [[Block(1, 1, 2, readout="causal")]], cached=[7]), SCALAR, False),
    ],
)
def test_which_steps_have_few_rows(layout: Layout, case: Case, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document, causal blocks, no padding, one decay per head: others go through chunks and panels, to the same."""
    calls = counted(monkeypatch, decode, "few_rows")
    both_ways = both(layout, case, 2)
    assert len(calls) == few
    clean = int((layout.clean_document[0] == 0).sum())  # rows of other documents are never committed
    found, expected = ((*made[:2], *(rows[:, :clean] for rows in made[2:])) for made in both_ways)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_what_rows_read_is_found_once_for_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, few_rows, "_reads")
    layout = step_layout(3, [[1, 2, 3]] * 2)
    schedule = StateSchedule.from_layout(layout)
    first, second = (few_rows.reads_of(layout, schedule, torch.float32) for _ in range(2))
    assert first is not None and first is second and len(calls) == 1
    assert len(first.ones) == 1, "all requests agree"


@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_a_state_may_lie_in_any_memory_order(gate: str) -> None:
    """And what is given stays as it is."""
    case, layout = Case(gate, True, False, 2, 5), build_layout([[2]] * 3, [[]] * 3)
    given = {name: None if x is None else x.detach() for name, x in case.inputs(layout).items()}
    state, accepted = given["initial_state"], torch.tensor([0, 1, 2])
    assert state is not None
    expected = reference_commit(state, given["k"], given["v"], given["g"], accepted)  # type: ignore[arg-type]
    orders: list[torch.Tensor] = [state.transpose(0, 1).contiguous().transpose(0, 1), state.mT.contiguous().mT]
    for order in (state, *orders):
        found = commit(order, given["k"], given["v"], given["g"], accepted)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert torch.equal(order, state)
