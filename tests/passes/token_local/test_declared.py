"""A user's op is known once it is declared; the declaration is tested with numbers, and a false one is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.errors import PropertyError, UsageError
from flarec.passes.token_local import declare_token_local, declared
from flarec.passes.token_local.call import MEMO
from tests.passes.token_local.foreign import ATEN, moves, with_foreign

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    known = dict(declared.OPS)
    yield
    declared.OPS.clear()
    declared.OPS.update(known)
    MEMO.clear()


def op_of(
    body: Callable[[Tensor], Tensor],
    backward: Callable[[Any, Tensor], Tensor] | None = lambda ctx, grad: grad,
    fake: Callable[[Tensor], Tensor] | None = torch.empty_like,
) -> Any:
    """A custom op of one tensor."""

    def forward(x: Tensor) -> Tensor:
        return body(x).clone()

    op = torch.library.custom_op(f"flarec_test::op{next(_numbers)}", forward, mutates_args=())
    if fake is not None:
        op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward)
    return op


def tokens(rows: int, length: int) -> tuple[Any, ...]:
    return (torch.randn(rows, length, 4),)


def flat(rows: int, length: int) -> tuple[Any, ...]:
    return (torch.randn(rows * length, 4),)


def swapped(rows: int, length: int) -> tuple[Any, ...]:
    return (torch.randn(4, length, rows),)


@pytest.mark.parametrize("example", [tokens, flat, swapped])
def test_an_op_is_known_once_it_is_declared(example: Callable[[int, int], tuple[Any, ...]]) -> None:
    op = op_of(lambda x: x.exp(), lambda ctx, grad: grad * 2)
    target = op._opoverload

    def make(g: Any, h: Any) -> Any:
        """The op on hidden states, in the form of the example."""
        x = g.call_function(ATEN.tanh.default, (h,))
        if example is swapped:
            turned = g.call_function(target, (g.call_function(ATEN.permute.default, (x, [2, 1, 0])),))
            return g.call_function(ATEN.permute.default, (turned, [2, 1, 0]))
        if example is flat:
            x = g.call_function(ATEN.reshape.default, (x, [-1, 64]))
        return g.call_function(ATEN.view_as.default, (g.call_function(target, (x,)), h))

    with pytest.raises(PropertyError, match=r"not known to be token-local.*declare it with declare_token_local"):
        with_foreign(make)
    declare_token_local(op, example)
    others, own = moves(with_foreign(make))
    assert others == 0 < own
    with_foreign(make, target="decode")


def test_a_declared_op_must_get_its_tokens_where_they_were_declared() -> None:
    """Along which dimension it works is known for that form only: here, along the last."""
    op = op_of(lambda x: x.cumsum(-1), lambda ctx, grad: grad.flip(-1).cumsum(-1).flip(-1))
    declare_token_local(op, tokens)

    def make(g: Any, h: Any) -> Any:
        turned = g.call_function(ATEN.transpose.int, (h, 1, 2))
        return g.call_function(ATEN.transpose.int, (g.call_function(op._opoverload, (turned,)), 1, 2))

    with pytest.raises(PropertyError, match=r"gets 'x' as \['rows', 64, 'length'\], declared was"):
        with_foreign(make)


@pytest.mark.parametrize(
    ("body", "backward", "words"),
    [
        (lambda x: x.cumsum(1), None, "changes the result of others"),
        (lambda x: x.flip(1), None, "changes the result of others"),
        (lambda x: x - x.mean(0, keepdim=True), None, "changes the result of others"),
        (lambda x: torch.where(x > 2, x.sum(), x), None, "changes the result of others"),
        (lambda x: x, lambda ctx, grad: grad.cumsum(1), "has a gradient by others"),
        (lambda x: x, lambda ctx, grad: grad.flip(0), "has a gradient by others"),
        (lambda x: x * torch.arange(x.shape[1])[:, None], None, "depends on its place"),
        (lambda x: x / x.shape[1], None, "how many others there are"),
    ],
)
def test_a_false_declaration_is_refused(
    body: Callable[[Tensor], Tensor], backward: Callable[[Any, Tensor], Tensor] | None, words: str
) -> None:
    op = op_of(body, backward or (lambda ctx, grad: grad))
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=words) as caught:
        declare_token_local(op, tokens)
    assert "flarec_test" in str(caught.value)
    assert op._opoverload not in declared.OPS


@pytest.mark.parametrize(
    ("make", "example", "words"),
    [
        (lambda: torch.relu, tokens, "is no custom op"),
        (lambda: ATEN.add_.Tensor, tokens, "writes to its operands"),
        (lambda: op_of(lambda x: x, fake=None), tokens, "on meta tensors.*register_fake"),
        (lambda: op_of(lambda x: x, fake=lambda x: x.new_empty(2, 5, 4)), tokens, "gives other shapes than the op"),
        (lambda: op_of(lambda x: x, backward=None), tokens, "has no backward.*register_autograd"),
        (lambda: op_of(lambda x: x.sum(1), fake=lambda x: x.new_empty(x.shape[0], 4)), tokens, r"is \['rows', 4\]"),
        (lambda: op_of(lambda x: x.sum(), fake=lambda x: x.new_empty(())), tokens, "no dimension of tokens"),
        (lambda: op_of(lambda x: x), lambda r, n: (torch.ones(r, n, 4),), "the same operands every time"),
        (lambda: op_of(lambda x: x), lambda r, n: (torch.randn(3, 4),), "has the sizes rows and length"),
        (lambda: op_of(lambda x: x), lambda r, n: (torch.randn(r, n + 1, 4),), r"has \[6, 8, 8\] elements"),
        (lambda: op_of(lambda x: x), lambda r, n: torch.randn(r, n, 4), "return a tuple of operands"),
        (lambda: op_of(lambda x: x), lambda r, n: (torch.randn(r, n, 4), 1), "does not run on its example"),
    ],
)
def test_what_cannot_be_declared(make: Callable[[], Any], example: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        declare_token_local(make(), example)


def test_weights_and_integers() -> None:
    """Operands of other sizes are weights: in a graph they may not hold tokens."""

    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return x + weight[index]

    op = torch.library.custom_op(f"flarec_test::op{next(_numbers)}", forward, mutates_args=())
    op.register_fake(lambda x, index, weight: torch.empty_like(x))
    op.register_autograd(lambda ctx, grad: (grad, None, None))
    declare_token_local(
        op, lambda rows, length: (torch.randn(rows, length, 64), torch.randint(3, (rows, length)), torch.randn(3, 64))
    )

    def make(g: Any, h: Any, *, false: bool = False) -> Any:
        ids = next(node for node in g.nodes if node.name == "input_ids")
        index = g.call_function(ATEN.remainder.Scalar, (ids, 3))
        table = g.call_function(ATEN.ones.default, ([3, 64],))
        weight = g.call_function(ATEN.select.int, (h, 2, 0)) if false else table
        return g.call_function(op._opoverload, (h, index, weight))

    others, own = moves(with_foreign(make))
    assert others == 0 < own
    with pytest.raises(PropertyError, match="gets 'weight' as"):
        with_foreign(lambda g, h: make(g, h, false=True))
