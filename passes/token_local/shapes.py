"""Shapes of the ops that graphs are mostly made of, as torch's meta kernels give them, without running these.

The meta kernels of arithmetic are written in Python, and the first one that runs imports torch's compiler and sympy:
more CPU time than the rest of a second `flarec generate`. A rule here answers for plain operands only; whatever else an
op is given goes to its meta kernel (`call.run_on_meta`), which also says what is wrong with it. Rules and kernels are
compared in `tests/passes/token_local/test_shapes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .values import Pair, Tensor, size_pair

Shape = tuple[Pair, ...]
Result = tuple[Shape, torch.dtype]
Operands = dict[str, Any]
"""By schema name, defaults filled in."""

ONE: Pair = (1, 1)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Unknown(Exception):
    """The operands are not plain: ask the meta kernel."""


def _need(condition: object) -> None:
    if not condition:
        raise _Unknown


def _sizes(value: Any, *dtypes: torch.dtype) -> Shape:
    """Sizes of a tensor of one of the dtypes (the floating ones if none is given)."""
    _need(isinstance(value, Tensor) and value.dtype in (dtypes or FLOATS))
    return tuple(map(size_pair, value.axes))


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _met(*shapes: Shape) -> Shape:
    """Sizes of an elementwise result: those that meet are equal, or 1."""
    result = []
    for back in range(max(map(len, shapes)), 0, -1):
        sizes = {shape[-back] for shape in shapes if back <= len(shape)} - {ONE}
        _need(len(sizes) <= 1)
        result.append(sizes.pop() if sizes else ONE)
    return tuple(result)


def _dim(value: Any, rank: int) -> int:
    _need(type(value) is int and -rank <= value < rank)
    return int(value) % rank


def _alike_but(dim: int, *shapes: Shape) -> None:
    """All sizes but those of one dimension are the same."""
    _need(len({(len(shape), shape[:dim], shape[dim + 1 :]) for shape in shapes}) == 1)


def _unary(of: Operands) -> list[Result]:
    for name, value in of.items():
        _need(name == "self" or _number(value) or (name in ("min", "max") and value is None))
    _need(of.get("min", 0) is not None or of.get("max") is not None)
    return [(_sizes(of["self"]), of["self"].dtype)]


def _gelu(of: Operands) -> list[Result]:
    _need(of["approximate"] in ("none", "tanh"))
    return _unary({"self": of["self"]})


def _binary(of: Operands) -> list[Result]:
    first, second = of["self"], of["other"]
    _need(of.get("alpha", 1) == 1)
    if _number(second):
        return [(_sizes(first), first.dtype)]
    shape = _met(_sizes(first), _sizes(second))
    return [(shape, torch.result_type(first.on_meta(0), second.on_meta(0)))]


def _in_place(of: Operands) -> list[Result]:
    [(shape, _)] = _binary(of)
    _need(shape == _sizes(of["self"]))
    return [(shape, of["self"].dtype)]


def _compared(of: Operands) -> list[Result]:
    _need(_number(of["other"]))
    return [(_sizes(of["self"], *FLOATS, torch.int64), torch.bool)]


def _inverted(of: Operands) -> list[Result]:
    return [(_sizes(of["self"], torch.bool), torch.bool)]


def _filled(of: Operands) -> list[Result]:
    _need(_number(of["value"]))
    return [(_met(_sizes(of["self"]), _sizes(of["mask"], torch.bool)), of["self"].dtype)]


def _where(of: Operands) -> list[Result]:
    [(shape, dtype)] = _binary({"self": of["self"], "other": of["other"]})
    _need(isinstance(of["other"], Tensor))
    return [(_met(shape, _sizes(of["condition"], torch.bool)), dtype)]


def _reduced(of: Operands) -> list[Result]:
    shape = _sizes(of["self"])
    dims = of["dim"] if isinstance(of["dim"], tuple) else ()
    places = [_dim(dim, len(shape)) for dim in dims]
    _need(places and len(set(places)) == len(places) and of["dtype"] in (None, *FLOATS))
    sizes = [ONE if at in places else size for at, size in enumerate(shape) if of["keepdim"] or at not in places]
    return [(tuple(sizes), of["dtype"] or of["self"].dtype)]


def _cat(of: Operands) -> list[Result]:
    _need(isinstance(of["tensors"], tuple) and of["tensors"])
    shapes = [_sizes(part) for part in of["tensors"]]
    dim = _dim(of["dim"], len(shapes[0]))
    _alike_but(dim, *shapes)
    _need(len({part.dtype for part in of["tensors"]}) == 1)
    size = sum(shape[dim][0] for shape in shapes), sum(shape[dim][1] for shape in shapes)
    return [((*shapes[0][:dim], size, *shapes[0][dim + 1 :]), of["tensors"][0].dtype)]


def _linear(of: Operands) -> list[Result]:
    shape, weight = _sizes(of["input"]), _sizes(of["weight"])
    _need(len(shape) > 1 and len(weight) == 2 and shape[-1] == weight[1])
    if of["bias"] is not None:
        _need(_sizes(of["bias"]) == weight[:1] and of["bias"].dtype == of["weight"].dtype)
    _need(of["input"].dtype == of["weight"].dtype)
    return [((*shape[:-1], weight[0]), of["input"].dtype)]


def _matmul(of: Operands) -> list[Result]:
    left, right = _sizes(of["self"]), _sizes(of["other"])
    _need(min(len(left), len(right)) > 1 and left[-1] == right[-2] and of["self"].dtype == of["other"].dtype)
    batch = _met(left[:-2], right[:-2]) if len(left) + len(right) > 4 else ()
    return [((*batch, left[-2], right[-1]), of["self"].dtype)]


def _embedding(of: Operands) -> list[Result]:
    weight = _sizes(of["weight"])
    _need(len(weight) == 2)
    return [((*_sizes(of["indices"], torch.int64), weight[1]), of["weight"].dtype)]


def _topk(of: Operands) -> list[Result]:
    shape, count = _sizes(of["self"]), of["k"]
    dim = _dim(of["dim"], len(shape))
    _need(type(count) is int and 0 < count <= min(shape[dim]))
    taken = (*shape[:dim], (count, count), *shape[dim + 1 :])
    return [(taken, of["self"].dtype), (taken, torch.int64)]


def _gathered(of: Operands) -> list[Result]:
    shape, index = _sizes(of["self"]), _sizes(of["index"], torch.int64)
    _alike_but(_dim(of["dim"], len(shape)), shape, index)
    return [(index, of["self"].dtype)]


def _scattered(of: Operands) -> list[Result]:
    shape, index = _sizes(of["self"]), _sizes(of["index"], torch.int64)
    _alike_but(_dim(of["dim"], len(shape)), shape, index)
    _need(_number(of["value"]))
    return [(shape, of["self"].dtype)]


def _constant_like(of: Operands) -> list[Result]:
    _need(of["layout"] is None and of["memory_format"] is None and of["dtype"] in (None, *FLOATS, torch.int64))
    return [(_sizes(of["self"], *FLOATS, torch.int64, torch.bool), of["dtype"] or of["self"].dtype)]


def _named(rule: Callable[[Operands], list[Result]], names: str) -> dict[str, Callable[[Operands], list[Result]]]:
    return dict.fromkeys((f"aten::{name}" for name in names.split()), rule)


SHAPES = {
    **_named(
        _unary,
        "neg rsqrt cos sin exp log silu sigmoid tanh relu square softplus clamp pow.Tensor_Scalar",
    ),
    **_named(_gelu, "gelu"),
    **_named(_binary, "add.Tensor sub.Tensor mul.Tensor div.Tensor rsub.Scalar"),
    **_named(_in_place, "div_.Tensor"),
    **_named(_compared, "gt.Scalar eq.Scalar"),
    **_named(_inverted, "bitwise_not"),
    **_named(_filled, "masked_fill.Scalar"),
    **_named(_where, "where.self"),
    **_named(_reduced, "mean.dim sum.dim_IntList"),
    **_named(_cat, "cat concatenate"),
    **_named(_linear, "linear"),
    **_named(_matmul, "matmul"),
    **_named(_embedding, "embedding"),
    **_named(_topk, "topk"),
    **_named(_gathered, "gather"),
    **_named(_scattered, "scatter_.value"),
    **_named(_constant_like, "zeros_like ones_like"),
}


def known_shapes(
    op: torch._ops.OpOverload, operands: Operands
) -> tuple[list[Shape], list[torch.dtype], type | None] | None:
    """As `call.run_on_meta`; None if only the meta kernel knows."""
    rule = SHAPES.get(op.name())
    if rule is None:
        return None
    try:
        results = rule(operands)
    except _Unknown:
        return None
    return [shape for shape, _ in results], [dtype for _, dtype in results], tuple if len(results) > 1 else None
