"""A foreign pass that leaks between tokens is stopped where it stands, and each of these leaks is real."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from flarec.errors import PropertyError
from flarec.ir.pipeline import run_pipeline
from flarec.ir.spec import TensorSpec
from flarec.passes import pipeline
from flarec.passes.properties import CHECKS
from flarec.passes.token_local import Watch
from tests.models import captured
from tests.passes.token_local.foreign import ATEN, FAMILIES, UNCHECKED, Foreign, Make, moves, with_foreign


@torch.library.custom_op("flarec_test::neighbour", mutates_args=())
def neighbour(x: Tensor) -> Tensor:
    """A user's op, of which nothing is known: every token gets the one behind it."""
    return torch.roll(x, -1, 1)


neighbour.register_fake(torch.empty_like)


def sizes(g: fx.Graph, h: fx.Node) -> tuple[fx.Node, fx.Node]:
    rows, length = (g.call_function(ATEN.sym_size.int, (h, dim)) for dim in (0, 1))
    return rows, length


def one_op(target: Any, *args: Any) -> Make:
    return lambda g, h: g.call_function(target, (h, *args))


def added(make: Make) -> Make:
    """Hidden states plus something (of one token, say) that broadcasts."""
    return lambda g, h: g.call_function(ATEN.add.Tensor, (h, make(g, h)))


def chain(*steps: tuple[Any, ...]) -> Make:
    def make(g: fx.Graph, h: fx.Node) -> fx.Node:
        for target, *args in steps:
            h = g.call_function(target, (h, *args))
        return h

    return make


def gathered(g: fx.Graph, h: fx.Node) -> fx.Node:
    """Every token reads token 6, a noisy one."""
    index = g.call_function(ATEN.full_like.default, (h, 6), {"dtype": torch.int64})
    return g.call_function(ATEN.gather.default, (h, 1, index))


def scattered(g: fx.Graph, h: fx.Node) -> fx.Node:
    """Every token is added to the first."""
    index = g.call_function(ATEN.full_like.default, (h, 0), {"dtype": torch.int64})
    return g.call_function(ATEN.scatter_add.default, (h, 1, index, h))


def picked(g: fx.Graph, h: fx.Node) -> fx.Node:
    index = g.call_function(ATEN.full.default, ([1], 6), {"dtype": torch.int64})
    return g.call_function(ATEN.index_select.default, (h, 1, index))


def indexed(g: fx.Graph, h: fx.Node) -> fx.Node:
    index = g.call_function(ATEN.full.default, ([1], 6), {"dtype": torch.int64})
    return g.call_function(ATEN.index.Tensor, (h, [None, index]))


def regrouped(g: fx.Graph, h: fx.Node) -> fx.Node:
    """[rows, T, D] read as [T, rows, D]: the same sizes, and other tokens in them."""
    rows, length = sizes(g, h)
    other = g.call_function(ATEN.reshape.default, (h, [length, rows, 64]))
    return g.call_function(ATEN.transpose.int, (other, 0, 1))


def turned_and_flattened(g: fx.Graph, h: fx.Node) -> fx.Node:
    """Tokens of all rows one after the other, but row by row no more; then taken apart as if they were."""
    rows, length = sizes(g, h)
    turned = g.call_function(ATEN.transpose.int, (h, 0, 1))
    flat = g.call_function(ATEN.reshape.default, (turned, [-1, 64]))
    return g.call_function(ATEN.reshape.default, (flat, [rows, length, 64]))


def in_pairs(g: fx.Graph, h: fx.Node) -> fx.Node:
    """Two tokens as one dimension, and then an op along features that are none."""
    parts = g.call_function(ATEN.reshape.default, (h, [-1, 2, 64]))
    flipped = g.call_function(ATEN.flip.default, (parts, [1]))
    return g.call_function(ATEN.view_as.default, (flipped, h))


def attended(g: fx.Graph, h: fx.Node) -> fx.Node:
    turned = g.call_function(ATEN.transpose.int, (h, 1, 2))
    scores = g.call_function(ATEN.tanh.default, (g.call_function(ATEN.matmul.default, (h, turned)),))
    return g.call_function(ATEN.matmul.default, (scores, h))


def tokens_as_weights(g: fx.Graph, h: fx.Node) -> fx.Node:
    weight = g.call_function(ATEN.reshape.default, (h, [-1, 64]))
    scores = g.call_function(ATEN.tanh.default, (g.call_function(ATEN.linear.default, (h, weight)),))
    return g.call_function(ATEN.matmul.default, (scores, weight))


def grammed(g: fx.Graph, h: fx.Node) -> fx.Node:
    """A product over tokens that is as large as a weight."""
    turned = g.call_function(ATEN.transpose.int, (h, 1, 2))
    return g.call_function(ATEN.matmul.default, (h, g.call_function(ATEN.matmul.default, (turned, h))))


def shifted(g: fx.Graph, h: fx.Node) -> fx.Node:
    last = g.call_function(ATEN.slice.Tensor, (h, 1, -1, 1 << 40))
    rest = g.call_function(ATEN.slice.Tensor, (h, 1, 0, -1))
    return g.call_function(ATEN.cat.default, ([last, rest], 1))


def written_through_a_view(g: fx.Graph, h: fx.Node) -> fx.Node:
    copy = g.call_function(ATEN.clone.default, (h,))
    view = g.call_function(ATEN.transpose.int, (copy, 0, 1))
    source = g.call_function(ATEN.transpose.int, (g.call_function(ATEN.flip.default, (h, [1])), 0, 1))
    g.call_function(ATEN.copy_.default, (view, source))
    return copy


def looked_up(g: fx.Graph, h: fx.Node) -> fx.Node:
    """Tokens as a table, ids as the index."""
    ids = next(node for node in g.nodes if node.name == "input_ids")
    table = g.call_function(ATEN.reshape.default, (h, [-1, 64]))
    return g.call_function(ATEN.embedding.default, (table, g.call_function(ATEN.remainder.Scalar, (ids, 24))))


ALL = slice(None)
LEAKS: dict[str, tuple[Make, str]] = {
    "cumsum": (one_op(ATEN.cumsum.default, 1), "token dimension (cumsum)"),
    "flip": (one_op(ATEN.flip.default, [1]), "token dimension (flip)"),
    "roll": (one_op(ATEN.roll.default, [1], [1]), "token dimension (roll)"),
    "roll of everything": (one_op(ATEN.roll.default, [64]), "token dimension (roll)"),
    "softmax": (one_op(ATEN.softmax.int, 1), "token dimension (softmax)"),
    "clone, cumsum, flip": (chain((ATEN.clone.default,), (ATEN.cumsum.default, 1), (ATEN.flip.default, [1])), "cumsum"),
    "gather": (gathered, "token dimension (gather)"),
    "scatter": (scattered, "token dimension (scatter_add)"),
    "index_select": (added(picked), "picks tokens by an index"),
    "index": (added(indexed), "picks tokens by an index"),
    "a user's op": (lambda g, h: g.call_function(torch.ops.flarec_test.neighbour.default, (h,)), "declare_token_local"),
    "a function": (lambda g, h: g.call_function(_reversed, (h,)), "effect on tokens is not known"),
    "reshape to other rows": (regrouped, "regroups tokens"),
    "flattened after a transpose": (turned_and_flattened, "regroups tokens"),
    "groups of two": (in_pairs, "no shape that can be inferred"),
    "mean": (added(one_op(ATEN.mean.dim, [-2], True)), "token dimension (mean)"),
    "mean over rows": (added(one_op(ATEN.mean.dim, [0], True)), "token dimension (mean)"),
    "flattened mean": (added(chain((ATEN.flatten.using_ints, 0, 1), (ATEN.mean.dim, [0]))), "token dimension (mean)"),
    "sum of everything": (added(one_op(ATEN.sum.default)), "token dimension (sum)"),
    "maximum of everything": (added(one_op(ATEN.max.default)), "token dimension (max)"),
    "select": (added(chain((ATEN.select.int, 1, 6), (ATEN.unsqueeze.default, 1))), "token dimension (select)"),
    "slice": (added(one_op(ATEN.slice.Tensor, 1, 6, 7)), "token dimension (slice)"),
    "getitem": (added(one_op(operator.getitem, (ALL, slice(6, 7)))), "no node of the graph"),
    "as_strided": (added(one_op(ATEN.as_strided.default, [64], [1], 18 * 64)), "not known to be token-local"),
    "shifted": (shifted, "token dimension (slice)"),
    "attention": (attended, "pairs of tokens"),
    "tokens as weights": (tokens_as_weights, "contracts over tokens"),
    "gram matrix": (grammed, "contracts over tokens"),
    "embedding": (looked_up, "contracts over tokens"),
    "written through a view": (written_through_a_view, "token dimension (flip)"),
}
LEAKS_WITHOUT_IDS: dict[str, tuple[Make, str]] = {
    "slots": (added(lambda g, h: g.call_function(ATEN.unsqueeze.default, (_arange(g, h), -1))), "reads token slots"),
    "number of tokens": (lambda g, h: g.call_function(ATEN.mul.Tensor, (h, sizes(g, h)[1])), "number of tokens"),
    "squeezed rows": (one_op(ATEN.squeeze.dim, 0), "where there is one token or row"),
    "padding": (one_op(ATEN.constant_pad_nd.default, [0, 0, 1, -1]), "not known to be token-local"),
    "repeated tokens": (one_op(ATEN.repeat.default, [1, 2, 1]), "repeats tokens"),
    "interleaved tokens": (one_op(ATEN.repeat_interleave.self_int, 2, 1), "repeats tokens"),
    "transposed addition": (added(one_op(ATEN.transpose.int, 0, 1)), "no shape that can be inferred"),
    "a mask as index": (lambda g, h: _by_mask(g, h), "sizes may not depend on values"),
    "written into the ids": (lambda g, h: _write_ids(g, h), "in place to an input or a parameter"),
    "written into shared memory": (lambda g, h: _write_shared(g, h), "share memory"),
    "a method": (lambda g, h: g.call_method("flip", (h, [1])), "calls into a module"),
    "the layout": (added(lambda g, h: g.call_function(ATEN.clone.default, (_input(g, "layout"),))), "reads the layout"),
    "an operand without a node": (added(lambda g, h: g.call_function(ATEN.mul.Tensor, (h, torch.ones(1)))), "no node"),
}


def _reversed(x: Tensor) -> Tensor:
    return x.flip(1)


def _arange(g: fx.Graph, h: fx.Node) -> fx.Node:
    return g.call_function(ATEN.arange.default, (sizes(g, h)[1],))


def _input(g: fx.Graph, name: str) -> fx.Node:
    return next(node for node in g.nodes if node.name == name)


def _by_mask(g: fx.Graph, h: fx.Node) -> fx.Node:
    return g.call_function(ATEN.index.Tensor, (h, [g.call_function(ATEN.gt.Scalar, (h, 0))]))


def _write_ids(g: fx.Graph, h: fx.Node) -> fx.Node:
    written = g.call_function(ATEN.add_.Scalar, (_input(g, "input_ids"), 1))
    return g.call_function(ATEN.mul.Tensor, (h, g.call_function(ATEN.unsqueeze.default, (written, -1))))


def _write_shared(g: fx.Graph, h: fx.Node) -> fx.Node:
    shared = g.call_function(ATEN.expand_as.default, (g.call_function(ATEN.zeros.default, ([64],)), h))
    return g.call_function(ATEN.add_.Tensor, (shared, h))


def refusal(make: Make, *args: Any, **options: Any) -> str:
    with pytest.raises(PropertyError) as caught:
        with_foreign(make, *args, **options)
    text = str(caught.value)
    assert text.startswith("pass 'foreign': node '"), text
    return text


@pytest.mark.parametrize("target", ["train", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_leak_is_refused_at_once(family: str, target: str) -> None:
    for name, (make, words) in (LEAKS | LEAKS_WITHOUT_IDS).items():
        text = refusal(make, family, target)
        assert words in text, f"{name}: {text}"
        assert "layers." in text and "modeling_" in text, "the place in the model is named"
        assert "a noisy token could reach a clean one: " in text, "the cure is named"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_leaks_are_real(family: str) -> None:
    """With the checks bypassed, logits move that must not; without the pass none does."""
    others, own = moves(with_foreign(lambda g, h: g.call_function(ATEN.clone.default, (h,)), family))
    assert others == 0 < own
    some = ("cumsum", "gather", "a user's op", "reshape to other rows", "mean over rows")
    for name in LEAKS if family == FAMILIES[0] else some:
        others, _ = moves(with_foreign(LEAKS[name][0], family, checks=UNCHECKED))
        assert others > 1e-4, f"{name}: {others}"


@pytest.mark.parametrize("behind", ["canonicalize", "embed-mask", "schedule-states", "narrow-head", "lower-mixers"])
def test_a_leak_is_refused_wherever_the_pass_stands(behind: str) -> None:
    for name in ("clone, cumsum, flip", "regrouped", "attention"):
        make = regrouped if name == "regrouped" else LEAKS[name][0]
        refusal(make, target="decode", behind=behind)


def test_a_pass_in_front_of_canonicalize() -> None:
    steps = pipeline("train")
    with pytest.raises(PropertyError, match=r"pass 'foreign': node 'cumsum.*token dimension"):
        run_pipeline(captured("bamba"), [Foreign(LEAKS["cumsum"][0]), *steps], CHECKS)
    run_pipeline(captured("bamba"), [Foreign(one_op(ATEN.cumsum.default, 2)), *steps], CHECKS)


@pytest.mark.parametrize(
    "make",
    [
        one_op(ATEN.cumsum.default, 0),
        one_op(ATEN.flip.default, [0]),
        one_op(ATEN.softmax.int, 0),
        added(one_op(ATEN.mean.dim, [0], True)),
        added(one_op(ATEN.select.int, 0, 0)),
    ],
)
def test_the_rows_of_the_head_are_tokens_too(make: Make) -> None:
    """Behind narrow-head the rows of one block lie beside those of another."""
    assert "token dimension" in refusal(make, target="decode", behind="narrow-head", head=True)
    with_foreign(one_op(ATEN.cumsum.default, 1), target="decode", behind="narrow-head", head=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("softmax_mask", "which is derived from the layout"),
        ("layout", "reads the layout"),
        ("accepted", "reads the accepted rows"),
        ("head_rows", "reads the rows of the head"),
        ("layers_0_linear_attention_state", "reads the cache"),
        ("layers_3_softmax_attention_keys", "reads the cache"),
    ],
)
def test_only_mixers_read_what_belongs_to_them(name: str, words: str) -> None:
    def make(g: fx.Graph, h: fx.Node) -> fx.Node:
        return g.call_function(ATEN.clone.default, (_input(g, name),))

    assert words in refusal(make, target="decode", behind="lower-mixers")


def test_a_false_spec_is_not_believed() -> None:
    """A pass may note what it likes: sizes that hide the tokens, or those of a neighbour."""

    def make(g: fx.Graph, h: fx.Node) -> fx.Node:
        new = g.call_function(ATEN.cumsum.default, (h, 1))
        new.meta = {**h.meta, "val": TensorSpec((2, 9, 64), torch.float32)}
        h.meta["val"] = TensorSpec((2, 9, 64), torch.float32)
        return new

    assert "token dimension (cumsum)" in refusal(make)


def test_specs_are_noted_for_a_pass_that_does_not() -> None:
    program = with_foreign(_halves, target="decode")
    halves = next(node for node in program.calls(ATEN.chunk.default) if not node.meta.get("modules"))
    assert [spec.shape for spec in halves.meta["val"]] == [("rows", "length", 32)] * 2
    logits: Any = program.output_node().args[0][0]  # type: ignore[index]
    assert logits.meta["val"].shape == ("head_rows", 512)
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)]
    assert all(node.meta["val"] is not None for node in nodes)


def _halves(g: fx.Graph, h: fx.Node) -> fx.Node:
    halves = g.call_function(ATEN.chunk.default, (h, 2, -1))
    first, second = (g.call_function(operator.getitem, (halves, i)) for i in (0, 1))
    return g.call_function(ATEN.cat.default, ([second, first], -1))


def test_a_region_that_a_pass_changes_is_looked_at() -> None:
    """The body of a captured no_grad region is part of the graph."""
    program = captured("qwen3_5_text").clone()
    watch = Watch()
    watch(program)
    region = next(n for n in program.graph.nodes if getattr(n.target, "__name__", "") == "wrap_with_set_grad_enabled")
    body = program.module.get_submodule(str(region.args[1].target))
    assert isinstance(body, fx.GraphModule)
    output = next(node for node in body.graph.nodes if node.op == "output")
    value = output.args[0][0]
    with body.graph.inserting_before(output):
        flipped = body.graph.call_function(ATEN.flip.default, (value, [0, 1, 2]))
    output.replace_input_with(value, flipped)
    try:
        with pytest.raises(PropertyError, match="token dimension"):
            watch(program)
    finally:
        output.replace_input_with(flipped, value)
        body.graph.erase_node(flipped)
