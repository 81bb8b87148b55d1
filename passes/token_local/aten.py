"""What the ATen ops of a graph do to tokens: elementwise, along dimensions, contractions, look-ups, new tensors.

Every op is named with its overload. Beside these tables and `views.VIEWS` only ATen ops that torch itself tags as
pointwise are known.
"""

from __future__ import annotations

import torch

from .call import OpCall, Rule
from .values import (
    Axes,
    Dim,
    Opaque,
    Refusal,
    Tensor,
    broadcast,
    constant_dim,
    holds_tokens,
    plain,
)
from .views import VIEWS


def elementwise(call: OpCall) -> list[Axes]:
    return [broadcast(*(operand.axes for operand in call.tensors()))] * len(call.shapes)


def like_self(call: OpCall) -> Axes:
    """A copy, or a new tensor, in the shape of the first operand; another operand gives its dtype only."""
    return call.axes(next(iter(call.operands)))


def written(call: OpCall) -> Axes:
    """In place: what is written may hold tokens only where the tensor that is written to does."""
    axes = call.axes("self")
    if broadcast(*(operand.axes for operand in call.tensors())) != axes:
        raise Refusal("writes tokens into a tensor that does not hold them")
    return axes


def reduced(call: OpCall) -> list[Axes]:
    axes = call.axes("self")
    dims = set(call.dims("dim")) if "dim" in call.operands else set(range(len(axes)))
    for dim in dims:
        call.free(axes[dim])
    if call.operands.get("keepdim"):
        one: Axes = tuple(() if dim in dims else axis for dim, axis in enumerate(axes))
    else:
        one = tuple(axis for dim, axis in enumerate(axes) if dim not in dims)
    return [one] * len(call.shapes)


def along(call: OpCall) -> list[Axes]:
    """softmax, cumsum, sort, flip, roll: over dimensions that keep their size."""
    axes = call.axes("self")
    for dim in call.dims("dims" if "dims" in call.operands else "dim"):
        call.free(axes[dim])
    return [axes] * len(call.shapes)


def topk(call: OpCall) -> list[Axes]:
    axes = call.axes("self")
    dim = call.dim()
    call.free(axes[dim])
    return [(*axes[:dim], call.features(dim), *axes[dim + 1 :])] * 2


def normalized(call: OpCall) -> Axes | list[Axes]:
    axes = call.axes("input")
    count = len(call.operands["normalized_shape"])
    for dim in axes[len(axes) - count :]:
        call.free(dim, "contracts over tokens")
    call.uniform("weight", "bias")
    statistics = (*axes[: len(axes) - count], *[()] * count)
    return axes if len(call.shapes) == 1 else [axes, statistics, statistics]


def linear(call: OpCall) -> Axes:
    axes, weight = call.axes("input"), call.axes("weight")
    call.free(axes[-1], "contracts over tokens")
    call.uniform("weight", "bias")
    return (*axes[:-1], *weight[:-1])


def quantized_linear(call: OpCall) -> Axes:
    """`flarec.ops.quantized`: as linear, over a weight that is in codes."""
    axes = call.axes("x")
    call.free(axes[-1], "contracts over tokens")
    call.uniform("bias", "codes", "scale", "nested", "offset")
    return (*axes[:-1], call.features(len(axes) - 1))


def _product(left: Axes, right: Axes) -> Axes:
    rows: Axes = left[-2:-1]
    columns: Axes = right[-1:] if len(right) > 1 else ()
    inner: tuple[Dim, Dim] = (left[-1], right[-2] if len(right) > 1 else right[-1])
    if any(map(holds_tokens, inner)):
        raise Refusal("contracts over tokens")
    return (*broadcast(left[:-2], right[:-2]), *rows, *columns)


def matmul(call: OpCall) -> Axes:
    return _product(call.axes("self"), call.axes("other" if "other" in call.operands else "mat2"))


def product_and_sum(call: OpCall) -> Axes:
    names = ("batch1", "batch2") if "batch1" in call.operands else ("mat1", "mat2")
    product = _product(call.axes(names[0]), call.axes(names[1]))
    if broadcast(call.axes("self"), product) != product:
        raise Refusal("adds a tensor that holds tokens where the product does not")
    return product


def joined_along(call: OpCall) -> Axes:
    """cat, stack: the other dimensions of all operands are the same."""
    operands = [operand.axes for operand in call.operands["tensors"]]
    rank, stacked = len(operands[0]), call.op.name() == "aten::stack"
    dim = int(call.operands["dim"]) % (rank + stacked)
    rest = [axes if stacked else (*axes[:dim], *axes[dim + 1 :]) for axes in operands]
    if any(len(axes) != rank for axes in operands) or any(other != rest[0] for other in rest):
        raise Refusal("joins tensors whose tokens do not lie alike")
    if not stacked:
        for axes in operands:
            call.free(axes[dim])
    return (*rest[0][:dim], call.features(dim), *rest[0][dim:])


def picked(call: OpCall) -> Axes:
    """gather, scatter: an index per element along a dimension of features; all operands lie alike in the others."""
    axes, index = call.axes("self"), call.axes("index")
    dim = call.dim()
    source = call.operands.get("src")
    for other in (index, source.axes if isinstance(source, Tensor) else index):
        for position, (one, two) in enumerate(zip(axes, other, strict=True)):
            if position == dim:
                call.free(one)
                call.free(two)
            elif one != two and (holds_tokens(one) or holds_tokens(two)):
                raise Refusal("picks elements of other tokens")
    return index if call.op.name() == "aten::gather" else axes


def index_select(call: OpCall) -> Axes:
    """Rows of a table; `head_rows` alone may pick tokens, from all tokens of all rows in their order."""
    axes, index = call.axes("self"), call.operands["index"]
    dim = call.dim()
    if isinstance(index, Opaque):
        if index.kind != "head rows" or axes[dim] != ("rows", "length"):
            raise Refusal(f"picks rows by {index.kind} from a dimension that is not all tokens in their order")
        chosen: Axes = (("head_rows",),)
    else:
        call.free(axes[dim], "picks tokens by an index (index_select works along the token dimension)")
        chosen = index.axes if index.axes else ((),)
    return (*axes[:dim], *chosen, *axes[dim + 1 :])


def indexed(call: OpCall) -> Axes:
    """`table[:, index]`: one index, of integers, into a dimension of features."""
    axes, indices = call.axes("self"), call.operands["indices"]
    places = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(places) != 1 or places[0][1].dtype in (torch.bool, torch.uint8):
        raise Refusal("indexes by a mask or by several tensors", "use one tensor of integers, or torch.where")
    dim, index = places[0]
    call.free(axes[dim], "picks tokens by an index (index works along the token dimension)")
    return (*axes[:dim], *index.axes, *axes[dim + 1 :])


def embedding(call: OpCall) -> Axes:
    call.uniform("weight")
    return (*call.axes("indices"), *call.axes("weight")[1:])


def new(call: OpCall) -> Axes:
    return tuple(map(constant_dim, call.shapes[0]))


def arange(call: OpCall) -> Axes:
    size = call.out(0)
    if size[0] != size[1]:
        raise Refusal(
            "reads token slots (arange over the sequence) instead of position_ids", "read position_ids instead"
        )
    return (plain(size[0]),)


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys((f"aten::{name}" for name in names.split()), rule)


RULES: dict[str, Rule] = {
    **VIEWS,
    **_named(
        elementwise,
        "masked_fill.Tensor where.ScalarSelf where.ScalarOther where.Scalar log_sigmoid polar complex clamp.Tensor",
    ),
    "flarec::bounded_sqrt": elementwise,  # recurrent_gemma's, whose backward is its own
    **_named(
        like_self,
        "to.dtype to.device to.dtype_layout to.other _to_copy type_as contiguous alias detach lift_fresh_copy "
        "zeros_like ones_like full_like dropout",
    ),
    **_named(
        written,
        "copy_ add_.Tensor add_.Scalar sub_.Tensor sub_.Scalar mul_.Tensor mul_.Scalar div_.Tensor div_.Scalar neg_ "
        "masked_fill_.Scalar masked_fill_.Tensor fill_.Scalar zero_ relu_ sigmoid_ tanh_ exp_ clamp_",
    ),
    **_named(
        reduced,
        "sum sum.dim_IntList mean mean.dim amax amin max max.dim min min.dim argmax argmin prod prod.dim_int "
        "norm.ScalarOpt_dim linalg_vector_norm var.dim var.correction std.dim std.correction logsumexp any.dim all.dim",
    ),
    **_named(
        along,
        "softmax.int _softmax log_softmax.int _log_softmax cumsum cumprod sort sort.stable argsort flip roll",
    ),
    **_named(topk, "topk"),
    **_named(normalized, "rms_norm layer_norm native_layer_norm"),
    **_named(linear, "linear"),
    "flarec::quantized_linear": quantized_linear,
    **_named(matmul, "matmul mm bmm mv dot"),
    **_named(product_and_sum, "baddbmm addmm"),
    **_named(joined_along, "cat concat concatenate stack"),
    **_named(picked, "gather scatter.value scatter.src scatter_.value scatter_.src scatter_add scatter_add_"),
    **_named(index_select, "index_select"),
    **_named(indexed, "index.Tensor"),
    **_named(embedding, "embedding"),
    **_named(new, "zeros ones full scalar_tensor new_zeros new_ones new_full new_empty"),
    **_named(arange, "arange arange.start arange.start_step"),
}

SIZES = {
    "size", "sizes", "shape", "repeats", "start", "end", "length", "split_size", "split_sizes", "normalized_shape",
}
"""Operands that may be made from the number of tokens; as a value it tells a token how many others there are."""

ALIASING = {*VIEWS} - {"aten::repeat", "aten::repeat_interleave.self_int"} | {
    f"aten::{name}"
    for name in ("to.dtype", "to.device", "to.dtype_layout", "to.other", "contiguous", "alias", "detach")
}
"""Ops whose result may share memory with their first operand."""
SHARED = {"aten::expand", "aten::expand_as", "aten::broadcast_to"}
"""Of those the ones whose result holds one element in several places."""

GUARDS = {
    f"aten::{name}"
    for name in (
        "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "_assert_async.msg", "sym_constrain_range",
        "sym_constrain_range_for_size",
    )
}
"""Checks that export leaves behind: no results."""


def rule_of(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of an ATen op, None if it is not known."""
    name = op.name()
    rule = RULES.get(name)
    if rule is None and name.startswith("aten::") and torch.Tag.pointwise in op.tags and not op._schema.is_mutable:
        return elementwise
    return rule
