"""duplicate-streams: positions come from the layout, nothing else changes."""

from __future__ import annotations

import pytest
import torch

from flarec.layout import build_layout
from flarec.passes.duplicate_streams import PositionIds
from tests.models import FAMILIES
from tests.passes.snippets import before_and_after, example, on_layout, plain


def test_before_and_after_of_the_docstring() -> None:
    before, after = before_and_after("duplicate-streams")
    assert [node.name for node in before.placeholders()] == ["input_ids", "position_ids"]
    assert {node.name for node in after.placeholders()} == {"input_ids", "position_ids", "layout"}
    assert after.derivations == {"position_ids": PositionIds()}
    assert before.op_counts() == after.op_counts()


def test_a_model_without_positions_gets_none() -> None:
    """The latent attention of Kimi-Linear has no rotary embedding."""
    _, after = before_and_after("duplicate-streams", "kimi_linear")
    assert {node.name for node in after.placeholders()} >= {"input_ids", "layout"}
    for name in after.derivations:
        assert after.placeholder(name).users


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_layout_gives_the_captured_logits(family: str) -> None:
    before, after = before_and_after("duplicate-streams", family)
    ids = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(2))
    layout = build_layout([[11], [11]], [[], []])
    assert torch.equal(plain(before, ids), on_layout(after, ids, layout))


def test_positions_are_those_inside_the_document() -> None:
    _, after = before_and_after("duplicate-streams")
    _, layout = example()
    assert torch.equal(after.derive(layout)["position_ids"], layout.position_ids())
