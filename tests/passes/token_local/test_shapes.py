"""The shapes that rules give are those of torch's meta kernels; what a rule does not know, it leaves to them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from flarec.ir.spec import LENGTH, ROWS
from flarec.passes import lower
from flarec.passes.token_local import watch
from flarec.passes.token_local.call import bind, run_on_meta
from flarec.passes.token_local.shapes import SHAPES, known_shapes
from flarec.passes.token_local.values import Axes, Refusal, Tensor, tensor
from tests.models import FAMILIES, captured

ATEN = torch.ops.aten
TOKENS: Axes = ((ROWS,), (LENGTH,))
AXES: list[Axes] = [
    (), ((),), ((4,),), ((3,), (4,)), ((4,), (4,)), ((), (4,)), ((0,),), ((0,), (4,)), ((LENGTH,), (ROWS,), (4,)),
    ((ROWS, LENGTH), (4,)), TOKENS,
    *((*TOKENS, *more) for more in [((4,),), ((3,),), ((),), ((3,), (4,)), ((4,), (3,))]),
]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int32, torch.int64, torch.bool, torch.complex64]
NUMBERS = [0, 1, 2, -1, 5, True, 0.5, 2.0, 1j]
TRIES = 250
ANSWERS = 10
"""At least that many of the tries are plain calls, which the rule answers."""


def op_of(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    found: torch._ops.OpOverload = getattr(getattr(ATEN, packet), overload or "default")
    return found


def drawn(argument: torch.Argument, chance: random.Random, like: list[Tensor]) -> Any:
    """An operand of the argument's type: mostly a plain one, now and then one that does not fit."""
    kind = str(argument.type)
    if kind == "Tensor" or (kind == "Optional[Tensor]" and chance.random() < 0.6):
        return drawn_tensor(argument.name, chance, like)
    if kind == "List[Tensor]":
        return tuple(drawn_tensor(argument.name, chance, like) for _ in range(chance.randint(1, 3)))
    if argument.has_default_value() and chance.random() < 0.6:
        default = argument.default_value
        return tuple(default) if isinstance(default, list) else default
    if "number" in kind:
        return chance.choice(NUMBERS if chance.random() < 0.4 else [2, 0.5])
    if kind in ("Optional[List[int]]", "List[int]"):
        return tuple(chance.choice([0, 1, 2, -1, -2]) for _ in range(chance.choice([0, 1, 1, 1, 2])))
    if kind == "bool":
        return chance.random() < 0.5
    if kind in ("int", "float"):
        return chance.choice([0, 1, 2, 3, -1, -2, 9])
    if argument.name == "dtype":
        return chance.choice([*DTYPES, None])
    if argument.name == "approximate":
        return chance.choice(["none", "tanh", "other"])
    return None


def drawn_tensor(name: str, chance: random.Random, like: list[Tensor]) -> Tensor:
    """Often with the axes of another operand, or some that broadcast or multiply with them."""
    axes = chance.choice(AXES)
    if like and chance.random() < 0.75:
        axes = like[-1].axes
        change = chance.random()
        if change < 0.2 and axes:
            axes = axes[1:]
        elif change < 0.4 and axes:
            axes = (*axes[:-1], ())
        elif change < 0.6 and len(axes) > 1:
            axes = (*axes[:-2], axes[-1], axes[-2])
        elif change < 0.7:
            axes = ((3,), *axes[-1:])
    integers = {"indices": torch.int64, "index": torch.int64, "mask": torch.bool, "condition": torch.bool}
    likely = integers.get(name, like[-1].dtype if like and like[-1].dtype.is_floating_point else torch.float32)
    made = tensor(axes, likely if chance.random() < 0.75 else chance.choice(DTYPES))
    like.append(made)
    return made


def outcome(op: torch._ops.OpOverload, operands: dict[str, Any]) -> Any:
    try:
        sizes, dtypes, kind = run_on_meta(op, operands)
    except Refusal as refusal:
        return refusal.reason
    return sizes, dtypes, kind is not None


@pytest.mark.parametrize("name", SHAPES)
def test_rules_say_what_meta_kernels_say(name: str) -> None:
    chance, op, answers = random.Random(name), op_of(name), 0
    for _ in range(TRIES):
        like: list[Tensor] = []
        operands = {argument.name: drawn(argument, chance, like) for argument in op._schema.arguments}
        if name == "aten::bitwise_not" and chance.random() < 0.5:
            operands["self"] = tensor(operands["self"].axes, torch.bool)
        known = known_shapes(op, operands)
        if known is not None:
            assert (known[0], known[1], known[2] is not None) == outcome(op, operands), operands
            answers += 1
    assert answers >= ANSWERS, answers


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("aten::add.Tensor", ((*TOKENS, (4,)), (*TOKENS, (3,)))),
        ("aten::matmul", (((3,), (4,)), ((3,), (4,)))),
        ("aten::linear", ((*TOKENS, (4,)), ((3,), (3,)))),
        ("aten::embedding", (((4,),), TOKENS)),
    ],
)
def test_what_does_not_fit_is_left_to_the_kernel(name: str, arguments: tuple[Axes, ...]) -> None:
    op = op_of(name)
    assert known_shapes(op, bind(op, tuple(tensor(axes, torch.float32) for axes in arguments), {})) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_only_views_and_mixers_run_on_meta_tensors(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels are compiled; one that is written in Python brings torch's compiler along."""
    ran = set()

    def noted(op: torch._ops.OpOverload, operands: dict[str, Any]) -> Any:
        ran.add(op.name())
        return run_on_meta(op, operands)

    monkeypatch.setattr(watch, "run_on_meta", noted)
    monkeypatch.setattr(watch, "MEMO", {})
    for target in ("train", "decode"):
        lower(captured(family), target)
    views = {
        "reshape", "to.dtype", "slice.Tensor", "index_select", "unsqueeze", "expand", "chunk", "transpose.int",
        "select.int", "view", "type_as", "contiguous", "split_with_sizes", "alias", "copy_", "squeeze.dim", "to.device",
        "softmax.int", "new_empty",
    }
    assert {name.removeprefix("aten::") for name in ran} <= views
    assert ran
