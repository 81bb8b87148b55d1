"""A user's own op: known once it is declared token-local, and the declaration is tested with numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from flarec.errors import UsageError
from flarec.ir.spec import HEAD_ROWS, LENGTH, ROWS

from .call import MEMO, META, OpCall
from .values import Axes, Dim, Refusal, holds_tokens, size_of
from .values import Tensor as Value

Example = Callable[[int, int], tuple[Any, ...]]
"""(rows, length) -> operands of a call, other random ones at every time; tensors of tokens have these sizes."""
FLAT = "tokens"
"""A dimension over the tokens of all rows, one row after the other."""
Meaning = tuple[str | int, ...]
"""Of a tensor's dimensions: ROWS, LENGTH, FLAT, or a size of its own."""

SIZES = ((2, 5), (3, 7), (2, 7))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""For a token at another place, where a matrix product may sum in another order; of 16-bit floats 2e-2."""
DIMS: dict[str, tuple[Dim, ...]] = {ROWS: ((ROWS,),), LENGTH: ((LENGTH,),), FLAT: ((ROWS, LENGTH), (HEAD_ROWS,))}


@dataclass(frozen=True)
class Declared:
    """Where the tokens of a declared op's operands and results are; operands without tokens are weights."""

    operands: tuple[Meaning | None, ...]
    results: tuple[Meaning, ...]

    def axes(self, call: OpCall) -> list[Axes]:
        """The rule of a declared op: its operands hold tokens where those of the example did."""
        where: dict[str | int, Dim] = {}
        names = [argument.name for argument in call.op._schema.arguments]
        for name, meaning in zip(names, self.operands, strict=False):
            operand = call.operands[name]
            if isinstance(operand, Value) and not _matches(operand.axes, meaning or (), where):
                sizes = [size_of(dim) for dim in operand.axes]
                raise Refusal(
                    f"gets '{name}' as {sizes}, declared was {list(meaning or ())}", "bring it into that form"
                )
        call.uniform(*names[len(self.operands) :])
        return [
            tuple(where.get(part) or call.features(dim, index) for dim, part in enumerate(meaning))
            for index, meaning in enumerate(self.results)
        ]


def _matches(axes: Axes, meaning: Meaning, where: dict[str | int, Dim]) -> bool:
    """Whether tokens are where they should be; `where` learns which dimension stands for what."""
    if not any(isinstance(part, str) for part in meaning):
        return not any(map(holds_tokens, axes))
    return len(axes) == len(meaning) and all(
        dim in DIMS[part] and where.setdefault(part, dim) == dim if isinstance(part, str) else not holds_tokens(dim)
        for dim, part in zip(axes, meaning, strict=True)
    )


OPS: dict[object, Declared] = {}


def declare_token_local(op: Any, example: Example) -> None:
    """Make a custom op known to every pipeline of this process: its result for a token depends on that token alone.

    op: an overload (`torch.ops.mine.op.default`) or what `torch.library.custom_op` returned. It needs a fake
    implementation (`register_fake`) and, for results of floating point, a backward (`register_autograd`).
    example(rows, length): operands of a call, positionally, other random ones at every time. Tensors of tokens have the
    sizes [rows, length, ...] in any order, or [rows * length, ...]; other tensors are weights.

    The declaration is tested on several sizes: what one token holds changes neither what is computed for another nor
    its gradient, and a token's place and the number of tokens do not matter.
    Raises `UsageError` for a declaration that does not hold.
    """
    op = getattr(op, "_opoverload", op)
    if not isinstance(op, torch._ops.OpOverload):
        raise UsageError(f"{op} is no custom op, so it cannot be declared; wrap it with torch.library.custom_op")
    if op._schema.is_mutable:
        raise UsageError(f"{op} writes to its operands, so it cannot be declared token-local; return a new tensor")
    trials = [_Trial.of(op, example, rows, length) for rows, length in SIZES]
    operands = _meanings(op, "operand", [trial.args for trial in trials])
    results = _meanings(op, "result", [trial.out for trial in trials])
    for index, meaning in enumerate(results):
        if meaning is None or not any(isinstance(part, str) for part in meaning):
            raise UsageError(f"result {index} of {op} has no dimension of tokens, so it is computed over all of them")
    declared = Declared(tuple(operands), tuple(meaning for meaning in results if meaning is not None))
    for trial in trials:
        trial.test(declared)
    OPS[op] = declared
    MEMO.clear()


def _meanings(op: Any, what: str, calls: list[tuple[Any, ...]]) -> list[Meaning | None]:
    """What the dimensions of every tensor are, read off their sizes in all trials; None for what is no tensor."""
    expected: dict[str, list[int]] = {
        ROWS: [rows for rows, _ in SIZES],
        LENGTH: [length for _, length in SIZES],
        FLAT: [rows * length for rows, length in SIZES],
    }
    result: list[Meaning | None] = []
    for position, same in enumerate(zip(*calls, strict=True)):
        if not isinstance(same[0], Tensor):
            result.append(None)
            continue
        meaning: list[str | int] = []
        for sizes in map(list, zip(*(tensor.shape for tensor in same), strict=True)):
            kind = next((kind for kind, wanted in expected.items() if wanted == sizes), None)
            if kind is None and len(set(sizes)) > 1:
                raise UsageError(
                    f"a dimension of {what} {position} of {op} has {sizes} elements for (rows, length) in {SIZES}; "
                    "an op is token-local only if rows and tokens keep dimensions of their own"
                )
            meaning.append(sizes[0] if kind is None else kind)
        if sorted(part for part in meaning if isinstance(part, str)) not in ([], [FLAT], [LENGTH, ROWS]):
            raise UsageError(f"{what} {position} of {op} is {meaning}; tokens are [rows, length] or [rows * length]")
        result.append(tuple(meaning))
    if what == "operand" and not any(isinstance(part, str) for meaning in result for part in meaning or ()):
        raise UsageError(f"no operand in the example of {op} has the sizes rows and length")
    return result


@dataclass
class _Trial:
    """One call of the example at one size, and what the op makes of it."""

    op: Any
    rows: int
    length: int
    args: tuple[Any, ...]
    other: tuple[Any, ...]
    out: tuple[Any, ...]

    @staticmethod
    def of(op: Any, example: Example, rows: int, length: int) -> _Trial:
        args, other = example(rows, length), example(rows, length)
        if not isinstance(args, tuple):
            raise UsageError(f"the example of {op} returns {type(args).__name__}; return a tuple of operands")
        out = _run(op, args)
        fake = _run(op, tuple(arg.to(META) if isinstance(arg, Tensor) else arg for arg in args), " on meta tensors")
        if [getattr(x, "shape", None) for x in fake] != [getattr(x, "shape", None) for x in out]:
            raise UsageError(f"the fake implementation of {op} gives other shapes than the op; correct it")
        return _Trial(op, rows, length, args, other, out)

    def test(self, declared: Declared) -> None:
        tokens = [(i, m) for i, m in enumerate(declared.operands) if m and any(isinstance(part, str) for part in m)]
        if all(torch.equal(self.args[i], self.other[i]) for i, _ in tokens):
            raise UsageError(f"the example of {self.op} gives the same operands every time; make random ones")
        for token in product(range(self.rows), sorted({0, self.length // 2, self.length - 1})):
            self._values(tokens, declared.results, token)
            self._gradients(tokens, declared.results, token)
        self._places(tokens, declared.results)

    def _values(self, tokens: list[tuple[int, Meaning]], results: tuple[Meaning, ...], token: tuple[int, int]) -> None:
        """Something else in one token changes nothing anywhere else, to the last bit."""
        args = list(self.args)
        for position, meaning in tokens:
            args[position] = args[position].clone()
            self._part(args[position], meaning, token).copy_(self._part(self.other[position], meaning, token))
        for was, now, meaning in zip(self.out, _run(self.op, tuple(args)), results, strict=True):
            if not torch.equal(self._others(was, meaning, token), self._others(now, meaning, token)):
                raise self._false(f"what token {token[1]} of row {token[0]} holds changes the result of others")

    def _gradients(
        self, tokens: list[tuple[int, Meaning]], results: tuple[Meaning, ...], token: tuple[int, int]
    ) -> None:
        """The gradient of one token's result by another token is zero."""
        args = list(self.args)
        learned = [(position, meaning) for position, meaning in tokens if args[position].is_floating_point()]
        for position, _ in learned:
            args[position] = args[position].detach().clone().requires_grad_()
        for out, meaning in zip(_run(self.op, tuple(args)), results, strict=True):
            if not learned or not out.is_floating_point():
                continue
            seed = torch.zeros_like(out)
            part = self._part(seed, meaning, token)
            part.copy_(torch.rand_like(part) + 0.5)
            try:
                grads = torch.autograd.grad(
                    out, [args[i] for i, _ in learned], seed, allow_unused=True, retain_graph=True
                )
            except RuntimeError as error:
                raise UsageError(
                    f"{self.op} has no backward, so it would stop training: {error}; register one (register_autograd)"
                ) from error
            for grad, (_, by) in zip(grads, learned, strict=True):
                if grad is not None and self._others(grad, by, token).any():
                    raise self._false(f"the result of token {token[1]} of row {token[0]} has a gradient by others")

    def _places(self, tokens: list[tuple[int, Meaning]], results: tuple[Meaning, ...]) -> None:
        """Fewer tokens in another order give the same results, token for token."""
        args = list(self.args)
        for position, meaning in tokens:
            args[position] = self._turned(args[position], meaning)
        for was, now, meaning in zip(self.out, _run(self.op, tuple(args)), results, strict=True):
            bound = TOLERANCE.get(was.dtype, 2e-2 if was.is_floating_point() else 0)
            if not torch.allclose(self._turned(was, meaning), now, bound, bound, equal_nan=True):
                raise self._false("the result for a token depends on its place or on how many others there are")

    def _part(self, tensor: Tensor, meaning: Meaning, token: tuple[int, int]) -> Tensor:
        """What belongs to one token: a view."""
        places = {ROWS: token[0], LENGTH: token[1], FLAT: token[0] * self.length + token[1]}
        return tensor[tuple(places[part] if isinstance(part, str) else slice(None) for part in meaning)]

    def _others(self, tensor: Tensor, meaning: Meaning, token: tuple[int, int]) -> Tensor:
        """A copy with zeros for one token."""
        copy = tensor.detach().clone()
        self._part(copy, meaning, token).zero_()
        return copy.nan_to_num()

    def _turned(self, tensor: Tensor, meaning: Meaning) -> Tensor:
        """Rows in reverse order, and in each all tokens but the first in reverse order."""
        rows, slots = torch.arange(self.rows).flip(0), torch.arange(1, self.length).flip(0)
        chosen = {ROWS: rows, LENGTH: slots, FLAT: (rows[:, None] * self.length + slots).flatten()}
        for dim, part in enumerate(meaning):
            if isinstance(part, str):
                tensor = tensor.index_select(dim, chosen[part])
        return tensor

    def _false(self, what: str) -> UsageError:
        return UsageError(
            f"{self.op} is declared token-local, but {what}; correct the op, or make it a semantic op (flarec/ops)"
        )


def _run(op: Any, args: tuple[Any, ...], where: str = "") -> tuple[Any, ...]:
    try:
        result = op(*args)
    except Exception as error:  # whatever a user's op says
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cure = "register a fake implementation (register_fake)" if where else "correct the example"
        raise UsageError(f"{op} does not run on its example{where}: {reason}; {cure}") from error
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
