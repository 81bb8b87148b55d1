"""A foreign pass that treats tokens one by one is accepted without saying so, runs, and leaks nothing."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from flarec.passes.token_local import declare_token_local
from tests.passes.token_local.foreign import ATEN, FAMILIES, Make, moves, with_foreign
from tests.passes.token_local.test_leaks import added, chain, one_op, sizes


@torch.library.custom_op("flarec_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, grad: 2 * grad)
declare_token_local(doubled, lambda rows, length: (torch.randn(rows, length, 4),))


def gathered(g: fx.Graph, h: fx.Node) -> fx.Node:
    index = g.call_function(ATEN.full_like.default, (h, 6), {"dtype": torch.int64})
    return g.call_function(ATEN.gather.default, (h, 2, index))


def heads_and_back(g: fx.Graph, h: fx.Node) -> fx.Node:
    rows, length = sizes(g, h)
    heads = g.call_function(ATEN.reshape.default, (h, [rows, length, 4, 16]))
    turned = g.call_function(ATEN.transpose.int, (heads, 1, 2))
    back = g.call_function(ATEN.transpose.int, (g.call_function(ATEN.flip.default, (turned, [1])), 1, 2))
    return g.call_function(ATEN.flatten.using_ints, (back, 2))


def flat_and_back(g: fx.Graph, h: fx.Node) -> fx.Node:
    rows, length = sizes(g, h)
    flat = g.call_function(ATEN.reshape.default, (h, [-1, 64]))
    halves = g.call_function(ATEN.reshape.default, (flat, [-1, 2, 32]))
    turned = g.call_function(ATEN.softmax.int, (g.call_function(ATEN.flip.default, (halves, [1])), -1))
    return g.call_function(ATEN.view.default, (turned, [rows, length, 64]))


def written(g: fx.Graph, h: fx.Node) -> fx.Node:
    copy = g.call_function(ATEN.clone.default, (h,))
    half = g.call_function(ATEN.slice.Tensor, (copy, 2, 0, 32))
    other = g.call_function(ATEN.slice.Tensor, (h, 2, 32, 64))
    g.call_function(ATEN.copy_.default, (half, other))
    return copy


def outer(g: fx.Graph, h: fx.Node) -> fx.Node:
    """A product over the features of one token."""
    column = g.call_function(ATEN.unsqueeze.default, (h, -1))
    row = g.call_function(ATEN.unsqueeze.default, (h, -2))
    scores = g.call_function(ATEN.softmax.int, (g.call_function(ATEN.matmul.default, (column, row)), -1))
    return g.call_function(ATEN.squeeze.dim, (g.call_function(ATEN.matmul.default, (scores, column)), -1))


def joined(g: fx.Graph, h: fx.Node) -> fx.Node:
    halves = g.call_function(ATEN.chunk.default, (h, 2, -1))
    first, second = (g.call_function(operator.getitem, (halves, i)) for i in (0, 1))
    return g.call_function(ATEN.cat.default, ([second, first], -1))


def picked(g: fx.Graph, h: fx.Node) -> fx.Node:
    """Every feature twice, from a half of them."""
    index = g.call_function(ATEN.arange.start_step, (62, -1, -2))
    half = g.call_function(ATEN.index_select.default, (h, 2, index))
    return g.call_function(ATEN.repeat_interleave.self_int, (half, 2, 2))


def expanded(g: fx.Graph, h: fx.Node) -> fx.Node:
    rows, length = sizes(g, h)
    bias = g.call_function(ATEN.expand.default, (g.call_function(ATEN.ones.default, ([64],)), [rows, length, 64]))
    return g.call_function(ATEN.add.Tensor, (h, bias))


def chosen(g: fx.Graph, h: fx.Node) -> fx.Node:
    positive = g.call_function(ATEN.gt.Scalar, (h, 0))
    return g.call_function(ATEN.where.self, (positive, h, g.call_function(ATEN.neg.default, (h,))))


HARMLESS: dict[str, Make] = {
    "cumsum": one_op(ATEN.cumsum.default, 2),
    "flip": one_op(ATEN.flip.default, [-1]),
    "roll": one_op(ATEN.roll.default, [1], [2]),
    "softmax": one_op(ATEN.softmax.int, -1),
    "gather": gathered,
    "a declared op": lambda g, h: g.call_function(torch.ops.flarec_test.doubled.default, (h,)),
    "mean": added(one_op(ATEN.mean.dim, [-1], True)),
    "heads": heads_and_back,
    "flat": flat_and_back,
    "written in place": written,
    "product of features": outer,
    "halves": joined,
    "index_select": picked,
    "expanded": expanded,
    "where": chosen,
    "all of a slice": chain((ATEN.slice.Tensor, 1, 0, 1 << 62), (ATEN.clone.default,)),
    "topk": added(lambda g, h: g.call_function(operator.getitem, (g.call_function(ATEN.topk.default, (h, 1)), 0))),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_treats_tokens_one_by_one_is_accepted(name: str) -> None:
    others, own = moves(with_foreign(HARMLESS[name]))
    assert others == 0 < own


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_it_at_once(family: str) -> None:
    makes = [HARMLESS[name] for name in HARMLESS if name not in ("softmax", "gather")]  # these leave little of a token
    others, own = moves(with_foreign(makes, family))
    assert others == 0 < own
    with_foreign(makes, family, "decode")


@pytest.mark.parametrize("behind", ["canonicalize", "embed-mask", "narrow-head", "lower-mixers"])
def test_it_is_accepted_wherever_the_pass_stands(behind: str) -> None:
    with_foreign(list(HARMLESS.values()), target="decode", behind=behind)


def test_the_head_may_be_rescaled_behind_narrow_head() -> None:
    make: Any = chain((ATEN.div.Tensor, 30.0), (ATEN.tanh.default,), (ATEN.mul.Tensor, 30.0))
    others, own = moves(with_foreign(make, behind="narrow-head", head=True))
    assert others == 0 < own
