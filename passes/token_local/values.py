"""What a node's result is to the analysis: dimensions made of tokens, rows and features, in memory order.

A dimension is a tuple of factors, the outermost first: `("length",)`, `(64,)`, `()` for size 1, `("rows", "length")`
for tokens of all rows one after the other, `("length", 4)` for four features per token. Order tells apart what a
product of sizes cannot: [rows, length] flattened from its transpose. A dimension holds tokens if a factor is a name.

Sizes are also known as numbers under two assignments of primes to the names (`HINTS`): what an op does to a shape is
seen on meta tensors of both, and a size that is equal under both does not depend on the input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from flarec.ir.spec import CLEAN, HEAD_ROWS, LENGTH, NOISY, ROWS, Size, TensorSpec

Factor = int | str
Dim = tuple[Factor, ...]
Axes = tuple[Dim, ...]
Pair = tuple[int, int]
"""A size under both hints."""

HINTS: tuple[dict[str, int], dict[str, int]] = (
    {ROWS: 10007, LENGTH: 20011, HEAD_ROWS: 30011, CLEAN: 40009, NOISY: 50021},
    {ROWS: 10009, LENGTH: 20021, HEAD_ROWS: 30013, CLEAN: 40013, NOISY: 50023},
)
PRODUCTS: tuple[tuple[str, ...], ...] = (
    (), (ROWS,), (LENGTH,), (HEAD_ROWS,), (CLEAN,), (NOISY,), (ROWS, LENGTH), (ROWS, CLEAN), (ROWS, NOISY),
)
"""Names that one dimension may be made of."""


class Refusal(Exception):
    """Why a node is not token-local, and what to do about it."""

    def __init__(self, reason: str, cure: str = "make it a semantic op (flarec/ops)") -> None:
        super().__init__(reason)
        self.reason, self.cure = reason, cure


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor; made by `tensor` only, so that equal ones are the same object."""

    axes: Axes
    dtype: torch.dtype
    spec: TensorSpec

    @property
    def is_uniform(self) -> bool:
        """No dimension runs over tokens: a weight, or something computed from weights."""
        return not any(map(holds_tokens, self.axes))

    def on_meta(self, hint: int) -> torch.Tensor:
        return torch.empty([size_at(dim, hint) for dim in self.axes], dtype=self.dtype, device="meta")


@dataclass(frozen=True, slots=True)
class Number:
    """A size or something computed from sizes, under both hints."""

    at: tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Opaque:
    """What only token mixers (`head_rows`: the head's gather) may read: the layout, what is derived from it, caches.

    kind: "layout", "derived", "cache", "next cache", "accepted", "head rows" or "input"; detail: the derivation, or the
    `CacheSlot`.
    """

    kind: str
    name: str
    detail: Any = None
    spec: TensorSpec | None = None


@dataclass(frozen=True, eq=False)
class Refused:
    """The result of a node that is not token-local, or of one that reads such a result. `where` is the first one."""

    refusal: Refusal
    where: Any


_TENSORS: dict[tuple[Axes, torch.dtype], Tensor] = {}


def tensor(axes: Iterable[Dim], dtype: torch.dtype) -> Tensor:
    key = (tuple(axes), dtype)
    found = _TENSORS.get(key)
    if found is None:
        found = _TENSORS[key] = Tensor(*key, TensorSpec(tuple(map(size_of, key[0])), dtype))
    return found


def holds_tokens(dim: Dim) -> bool:
    return any(type(factor) is str for factor in dim)


def size_at(dim: Dim, hint: int) -> int:
    names = HINTS[hint]
    return prod(names[factor] if isinstance(factor, str) else factor for factor in dim)


def size_pair(dim: Dim) -> Pair:
    return size_at(dim, 0), size_at(dim, 1)


def size_of(dim: Dim) -> Size:
    """As in a `TensorSpec`: a number, or a product with its names in alphabetical order."""
    number = prod(factor for factor in dim if isinstance(factor, int))
    names = sorted(factor for factor in dim if isinstance(factor, str))
    if not names:
        return number
    return "*".join(names if number == 1 else [str(number), *names])


def plain(size: int) -> Dim:
    """A dimension of features."""
    return () if size == 1 else (size,)


def joined(factors: Iterable[Factor]) -> Dim:
    """Factors in memory order as one dimension; neighbouring numbers are one."""
    result: list[Factor] = []
    for factor in factors:
        if isinstance(factor, int) and result and isinstance(result[-1], int):
            result[-1] *= factor
        elif factor != 1:
            result.append(factor)
    return tuple(result)


def check_size(axes: Axes, shape: tuple[Pair, ...]) -> None:
    """What a rule says of a result must have the sizes that the op gave."""
    if tuple(map(size_pair, axes)) != shape:
        raise Refusal(f"has a shape that its rule does not explain ({list(shape)} instead of {list(axes)})")


def constant_dim(size: Pair) -> Dim:
    """A dimension of that size whose elements are all alike (of a new or expanded tensor)."""
    for names in PRODUCTS:
        at = [prod(HINTS[i][name] for name in names) for i in (0, 1)]
        if size[0] % at[0] == 0 and size[1] % at[1] == 0 and size[0] // at[0] == size[1] // at[1]:
            return joined([*names, size[0] // at[0]])
    raise Refusal("has a dimension whose size is no product of rows, tokens and a number")


def broadcast(*shapes: Axes) -> Axes:
    """Dimensions of an elementwise result: those that meet must be the same, or of size 1."""
    rank = max(map(len, shapes), default=0)
    result: list[Dim] = []
    for back in range(rank, 0, -1):
        here: Dim = ()
        for axes in shapes:
            dim = axes[-back] if back <= len(axes) else ()
            if dim and here and dim != here:
                raise Refusal(
                    f"lines up {size_of(here)} with {size_of(dim)}"
                    + (", tokens in another order" if size_of(here) == size_of(dim) else "")
                )
            here = here or dim
        result.append(here)
    return tuple(result)


def regroup(axes: Axes, sizes: list[Pair]) -> Axes:
    """Dimensions of the same elements in the same order under other sizes (reshape)."""
    left = list(joined(factor for dim in axes for factor in dim))
    if any(0 in size for size in sizes):
        raise Refusal("has no elements")
    result: list[Dim] = []
    for size in sizes:
        need, taken = size, []
        while need != (1, 1):
            if not left:
                raise Refusal(_REGROUPED)
            factor = left[0]
            at = size_pair((factor,))
            if need[0] % at[0] == 0 and need[1] % at[1] == 0:
                taken.append(left.pop(0))
                need = need[0] // at[0], need[1] // at[1]
            elif isinstance(factor, int) and need[0] == need[1] and factor % need[0] == 0:
                left[0] = factor // need[0]
                taken.append(need[0])
                need = 1, 1
            else:
                raise Refusal(_REGROUPED)
        result.append(joined(taken))
    return tuple(result)


_REGROUPED = "regroups tokens: a new dimension would hold parts of several"


def check_one_token_per_element(axes: Axes) -> None:
    """No dimension of tokens twice: a tensor over pairs of tokens holds what one token has to do with another."""
    names = [factor for dim in axes for factor in dim if isinstance(factor, str)]
    if len(set(names)) < len(names) or (HEAD_ROWS in names and len(names) > 1) or len({*names} - {ROWS}) > 1:
        raise Refusal("makes a tensor over pairs of tokens")
