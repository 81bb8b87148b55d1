"""rewrite-masks: softmax attention reads the layout."""

from __future__ import annotations

import pytest

from flarec import ops, stream_ops
from tests.models import FAMILIES
from tests.passes.snippets import arguments, before_and_after


@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_of_the_docstring(family: str) -> None:
    before, after = before_and_after("rewrite-masks", family)
    old, new = before.calls(ops.SOFTMAX_ATTENTION), after.calls(stream_ops.two_stream_softmax_attention)
    assert old
    assert not after.calls(ops.SOFTMAX_ATTENTION)
    for was, node in zip(old, new, strict=True):
        q, k, v, scale = arguments(was)[:4]
        assert arguments(node) == [q, k, v, "layout", scale, None, None]
        assert node.meta["val"] is was.meta["val"]
        assert node.meta["modules"] == was.meta["modules"], "errors can still name the module"
    assert after.history[-1].sites == tuple(node.name for node in new)


def test_other_mixers_are_left_alone() -> None:
    before, after = before_and_after("rewrite-masks")
    for target in (ops.SHORT_CONV, ops.LINEAR_ATTENTION):
        assert len(before.calls(target)) == len(after.calls(target)) > 0
