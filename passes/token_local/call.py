"""One call of an op, as the rules see it: operands by name, and the shapes that the op gives on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .values import HINTS, Axes, Dim, Number, Opaque, Pair, Refusal, Tensor, check_size, holds_tokens, tensor

META = torch.device("meta")
MEMO: dict[Any, Any] = {}
"""Calls that were looked at: (target, operands) -> value or refusal."""
FITTING = (
    "give it operands that fit for every number of rows and tokens; sizes may not depend on values (use torch.where)"
)
REGISTER_FAKE = "give the op a fake implementation (torch.library.register_fake) and declare it (declare_token_local)"


@dataclass
class OpCall:
    """A call of an op.

    operands: by schema name, defaults filled in; tensors are `Tensor`, sizes that depend on the input `Number`
    shapes: of every result tensor, each size under both hints
    """

    op: torch._ops.OpOverload
    operands: dict[str, Any]
    shapes: list[tuple[Pair, ...]]

    def axes(self, name: str) -> Axes:
        operand = self.operands[name]
        if not isinstance(operand, Tensor):
            raise Refusal(f"has no tensor for '{name}'")
        return operand.axes

    def tensors(self) -> list[Tensor]:
        return list(found(self.operands.values(), Tensor))

    def dims(self, name: str = "dim", of: str = "self") -> list[int]:
        """The dimensions that an operand names, counted from the front; all of them for none or an empty list."""
        value, rank = self.operands.get(name), len(self.axes(of))
        if value is None or value == ():
            return list(range(rank))
        dims = value if isinstance(value, tuple) else (value,)
        if not all(type(dim) is int and -rank <= dim < max(rank, 1) for dim in dims):
            raise Refusal(f"works along dimensions {dims} of a tensor of {rank}")
        return [dim % max(rank, 1) for dim in dims]

    def dim(self, name: str = "dim", of: str = "self") -> int:
        dims = self.dims(name, of)
        if len(dims) != 1:
            raise Refusal("names no single dimension", "name a dimension of features")
        return dims[0]

    def free(self, dim: Dim, what: str | None = None) -> None:
        """Refuse a dimension of tokens."""
        if holds_tokens(dim):
            name = self.op._schema.name.partition("::")[2]
            raise Refusal(what or f"works along the token dimension ({name})")

    def uniform(self, *names: str) -> None:
        """Operands that are weights: they may not hold tokens."""
        for name in names:
            operand = self.operands.get(name)
            if isinstance(operand, Tensor) and not operand.is_uniform:
                raise Refusal(f"contracts over tokens: '{name}' is made from tokens, not a weight")

    def out(self, dim: int, result: int = 0) -> Pair:
        return self.shapes[result][dim]

    def features(self, dim: int, result: int = 0) -> Dim:
        """A dimension of the result that must not depend on the input."""
        size = self.out(dim, result)
        if size[0] != size[1]:
            raise Refusal("has a dimension of features whose size depends on the number of tokens")
        return () if size[0] == 1 else (size[0],)


def found(values: Any, kind: type) -> Iterator[Any]:
    """All objects of a kind in nested tuples."""
    for value in values:
        if isinstance(value, kind):
            yield value
        elif isinstance(value, tuple):
            yield from found(value, kind)


def bind(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Operands by schema name, defaults filled in."""
    arguments = op._schema.arguments
    values = {argument.name: argument.default_value for argument in arguments}
    if len(args) > len(arguments) or not set(kwargs) <= set(values):
        raise Refusal("has operands that its op does not take", "pass the operands of the op's schema")
    values.update(zip((argument.name for argument in arguments), args, strict=False))
    values.update(kwargs)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def run_on_meta(
    op: torch._ops.OpOverload, operands: dict[str, Any]
) -> tuple[list[tuple[Pair, ...]], list[torch.dtype], type | None]:
    """Shapes under both hints, dtypes, and `tuple` for an op with several results, `list` for one with a list."""
    results = [_at(op, operands, hint) for hint in range(len(HINTS))]
    kind = type(results[0]) if isinstance(results[0], (tuple, list)) else None
    flat = [list(result) if kind else [result] for result in results]
    if len({len(part) for part in flat}) != 1 or not all(isinstance(x, torch.Tensor) for part in flat for x in part):
        raise Refusal("gives no tensor, or as many as there are tokens")
    if any(a.dim() != b.dim() for a, b in zip(*flat, strict=True)):
        raise Refusal("has as many dimensions as there are tokens")
    shapes = [tuple(zip(a.shape, b.shape, strict=True)) for a, b in zip(*flat, strict=True)]
    return shapes, [x.dtype for x in flat[0]], kind


def _at(op: torch._ops.OpOverload, operands: dict[str, Any], hint: int) -> Any:
    def value(operand: Any) -> Any:
        if isinstance(operand, Tensor):
            return operand.on_meta(hint)
        if isinstance(operand, Opaque) and operand.spec is not None:
            return torch.empty(HINTS[hint]["head_rows"], dtype=operand.spec.dtype, device=META)
        if isinstance(operand, Number):
            return operand.at[hint]
        if isinstance(operand, torch.device):
            return META
        return [value(item) for item in operand] if isinstance(operand, tuple) else operand

    args, kwargs = [], {}
    for argument in op._schema.arguments:
        given = value(operands[argument.name])
        if argument.kwarg_only:
            if argument.name == "device" and not any(True for _ in found(operands.values(), Tensor)):
                given = META
            kwargs[argument.name] = False if argument.name == "pin_memory" and given else given
        else:
            args.append(given)
    try:
        with torch.no_grad():
            return op(*args, **kwargs)
    except Exception as error:  # whatever an op says of operands that do not fit, or that it does not run on meta
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cure = FITTING if op.namespace == "aten" else REGISTER_FAKE
        raise Refusal(f"has no shape that can be inferred ({reason})", cure) from error


def results(axes: list[Axes], shapes: list[tuple[Pair, ...]], dtypes: list[torch.dtype]) -> tuple[Tensor, ...]:
    """The values of a call; what a rule says has to have the sizes that the op gave."""
    made = []
    for one, shape, dtype in zip(axes, shapes, dtypes, strict=True):
        check_size(one, shape)
        made.append(tensor(one, dtype))
    return tuple(made)


Rule = Callable[[OpCall], Axes | list[Axes]]
"""Dimensions of the result, or of every result. Raises `Refusal`."""
