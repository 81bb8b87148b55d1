"""Ops that move or copy elements without combining them. They may not split, join or drop what belongs to one token."""

from __future__ import annotations

from .call import OpCall, Rule
from .values import Axes, Number, Refusal, constant_dim, holds_tokens, joined, regroup, size_pair


def reshape(call: OpCall) -> Axes:
    return regroup(call.axes("self"), list(call.shapes[0]))


def expand(call: OpCall) -> Axes:
    axes, sizes = call.axes("self"), call.shapes[0]
    new = len(sizes) - len(axes)
    return tuple(
        axes[i - new] if i >= new and axes[i - new] != () else constant_dim(size) for i, size in enumerate(sizes)
    )


def transpose(call: OpCall) -> Axes:
    order = list(call.axes("self"))
    if order:
        first, second = call.dim("dim0"), call.dim("dim1")
        order[first], order[second] = order[second], order[first]
    return tuple(order)


def turned(call: OpCall) -> Axes:
    return call.axes("self")[::-1]


def permute(call: OpCall) -> Axes:
    axes = call.axes("self")
    return tuple(axes[dim] for dim in call.dims("dims"))


def unsqueeze(call: OpCall) -> Axes:
    axes, dim = list(call.axes("self")), call.operands["dim"]
    axes.insert(dim if dim >= 0 else dim + len(axes) + 1, ())
    return tuple(axes)


def squeeze(call: OpCall) -> Axes:
    """Not of a token dimension: where there is one token (or row) it would be dropped, and the others move."""
    axes = call.axes("self")
    dims = set(call.dims("dim")) if "dim" in call.operands else set(range(len(axes)))
    for dim in dims:
        call.free(axes[dim], "drops a dimension where there is one token or row")
    return tuple(axis for dim, axis in enumerate(axes) if not (dim in dims and axis == ()))


def repeat(call: OpCall) -> Axes:
    axes, times = call.axes("self"), call.operands["repeats"]
    new = len(times) - len(axes)
    result = []
    for i, count in enumerate(times):
        dim = axes[i - new] if i >= new else ()
        if holds_tokens(dim) and count != 1:
            raise Refusal("repeats tokens")
        if dim and isinstance(count, Number):
            raise Refusal("repeats features as often as there are tokens")
        result.append(dim if holds_tokens(dim) else constant_dim(call.out(i)))
    return tuple(result)


def repeat_interleave(call: OpCall) -> Axes:
    axes = list(call.axes("self"))
    dim = call.dim()
    call.free(axes[dim], "repeats tokens")
    axes[dim] = call.features(dim)
    return tuple(axes)


def piece(call: OpCall) -> Axes | list[Axes]:
    """slice, narrow, split, chunk: a part of a dimension of features, or all of a dimension of tokens."""
    axes = call.axes("self")
    dim = call.dim()
    whole = len(call.shapes) == 1 and call.out(dim) == size_pair(axes[dim]) and _for_every_length(call)
    if not whole:
        call.free(axes[dim])
    parts = [
        axes if whole else (*axes[:dim], call.features(dim, result), *axes[dim + 1 :])
        for result in range(len(call.shapes))
    ]
    return parts if call.op.name() in LISTS else parts[0]


def _for_every_length(call: OpCall) -> bool:
    """Whether what takes all of a dimension for two lengths does so for every length."""
    start, end = call.operands.get("start"), call.operands.get("end")
    if call.operands.get("step", 1) != 1:
        return False
    return (start in (None, 0) or isinstance(start, Number)) and (end is None or isinstance(end, Number) or end >= ALL)


def without(call: OpCall) -> Axes | list[Axes]:
    """select, unbind: one place of a dimension of features."""
    axes = call.axes("self")
    dim = call.dim()
    call.free(axes[dim])
    rest = (*axes[:dim], *axes[dim + 1 :])
    return [rest] * len(call.shapes) if call.op.name() in LISTS else rest


def as_complex(call: OpCall) -> Axes:
    axes = call.axes("self")
    call.free(axes[-1])
    return axes[:-1]


def as_real(call: OpCall) -> Axes:
    return (*call.axes("self"), joined([2]))


ALL = 1 << 31
"""An end that is meant as no end at all."""
LISTS = {"aten::split.Tensor", "aten::split_with_sizes", "aten::chunk", "aten::unbind.int"}
VIEWS: dict[str, Rule] = {
    **dict.fromkeys(
        ("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten.using_ints", "aten::unflatten.int"),
        reshape,
    ),
    **dict.fromkeys(("aten::view_as", "aten::reshape_as"), reshape),
    **dict.fromkeys(("aten::expand", "aten::expand_as", "aten::broadcast_to"), expand),
    **dict.fromkeys(("aten::transpose.int", "aten::swapaxes", "aten::swapdims"), transpose),
    "aten::t": turned,
    "aten::permute": permute,
    "aten::unsqueeze": unsqueeze,
    **dict.fromkeys(("aten::squeeze", "aten::squeeze.dim", "aten::squeeze.dims"), squeeze),
    "aten::repeat": repeat,
    "aten::repeat_interleave.self_int": repeat_interleave,
    **dict.fromkeys(
        ("aten::slice.Tensor", "aten::narrow", "aten::split.Tensor", "aten::split_with_sizes", "aten::chunk"), piece
    ),
    **dict.fromkeys(("aten::select.int", "aten::unbind.int"), without),
    "aten::view_as_complex": as_complex,
    "aten::view_as_real": as_real,
}
