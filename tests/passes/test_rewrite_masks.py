"""rewrite-masks: softmax attention reads the layout."""

from __future__ import annotations

import pytest

from flarec import ops
from tests.models import FAMILIES
from tests.passes.snippets import before_and_after, operands


@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_of_the_docstring(family: str) -> None:
    before, after = before_and_after("rewrite-masks", family)
    old = before.calls(ops.SOFTMAX_ATTENTION.op)
    new = after.calls(ops.SOFTMAX_ATTENTION.call("reference"))
    assert old
    assert not after.calls(ops.SOFTMAX_ATTENTION.op)
    for was, node in zip(old, new, strict=True):
        assert set(operands(was)) == {"q", "k", "v", "scale", "window", "softcap"}, "defaults are filled in"
        assert operands(node) == operands(was) | {"layout": "layout"}
        assert node.meta["val"] is was.meta["val"]
        assert node.meta["modules"] == was.meta["modules"], "errors can still name the module"
    assert after.history[-1].sites == tuple(node.name for node in new)


def test_other_mixers_are_left_alone() -> None:
    before, after = before_and_after("rewrite-masks")
    for mixer in (ops.SHORT_CONV, ops.LINEAR_ATTENTION):
        assert len(before.calls(mixer.op)) == len(after.calls(mixer.op)) > 0
