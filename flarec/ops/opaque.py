"""A kernel as ONE op of a compiled or exported graph: `flarec::mixer_call`, with its backward and its shapes.

Tracers unroll Python loops over a schedule, and stop at matrices whose sizes are computed. In a compiled graph such a
kernel is therefore a call of one op: its operands' tensors and integers are arguments, everything else about the call
is text. The fake kernel asks the op's declaration (`Mixer.results`) for shapes. The backward runs the
kernel again under autograd: under a compiler such a mixer is computed twice, and keeps nothing but its operands.

Eager programs do not come here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .register import MIXERS

TENSOR, NUMBER, PLAIN = "tensor", "number", "plain"


@torch._dynamo.nonstrict_trace
def call_opaque(
    mixer: str, implementation: str, step: bool, frozen_clean: bool, operands: dict[str, Any], absent: tuple[str, ...]
) -> Any:
    """The call of a mixer with these operands as an op; Dynamo leaves it alone, AOTAutograd comes in.

    operands are those that are not None, absent the names of the others.
    """
    operands = operands | dict.fromkeys(absent)
    results = _forward(*pack(mixer, implementation, step, operands, frozen_clean))
    return tuple(results) if len(results) > 1 else results[0]


def pack(
    mixer: str, implementation: str, step: bool, operands: dict[str, Any], frozen_clean: bool = False
) -> tuple[str, list[Tensor], list[int]]:
    """Arguments of the op for a call: what it is as text, its operands' tensors, and their integers."""
    leaves, structure = _pytree.tree_flatten(operands)
    kinds = [TENSOR if isinstance(x, Tensor) else NUMBER if _is_number(x) else PLAIN for x in leaves]
    of_kind = {kind: [x for x, k in zip(leaves, kinds, strict=True) if k == kind] for kind in (TENSOR, NUMBER, PLAIN)}
    table = {
        "call": [mixer, implementation, step, frozen_clean],
        "structure": _pytree.treespec_dumps(structure),
        "kinds": kinds,
        "plain": of_kind[PLAIN],
    }
    return json.dumps(table), of_kind[TENSOR], of_kind[NUMBER]


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, torch.SymInt) or type(leaf) is int


@dataclass(frozen=True)
class _Opaque:
    """A call as its text says it."""

    called: Any
    """`flarec.ops.Call`"""
    structure: _pytree.TreeSpec
    kinds: tuple[str, ...]
    plain: tuple[Any, ...]

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def read(text: str) -> _Opaque:
        table = json.loads(text)
        name, *use = table["call"]
        return _Opaque(
            MIXERS[name].call(*use),
            _pytree.treespec_loads(table["structure"]),
            tuple(table["kinds"]),
            tuple(table["plain"]),
        )

    def operands(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> dict[str, Any]:
        values = {TENSOR: iter(tensors), NUMBER: iter(numbers), PLAIN: iter(self.plain)}
        operands: dict[str, Any] = _pytree.tree_unflatten([next(values[kind]) for kind in self.kinds], self.structure)
        return operands

    def run(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        results = self.called.run(self.operands(tensors, numbers))
        return list(results) if isinstance(results, tuple) else [results]


@torch.library.custom_op("flarec::mixer_call", mutates_args=())
def _forward(call: str, tensors: list[Tensor], numbers: list[int]) -> list[Tensor]:
    with torch.no_grad():
        results = _Opaque.read(call).run(tensors, numbers)
    return _of_their_own(results, tensors)


def _of_their_own(results: list[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Dense results that are no views of operands or of one another; a copy only of one that is not."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    found = []
    for result in results:
        place = result.untyped_storage().data_ptr()
        alone = result.is_contiguous() and place not in taken
        found.append(result if alone else result.clone(memory_format=torch.contiguous_format))
        taken.add(place)
    return found


@_forward.register_fake
def _forward_fake(call: str, tensors: list[Tensor], numbers: list[int]) -> list[Tensor]:
    opaque = _Opaque.read(call)
    results: list[Tensor] = opaque.called.mixer.results(opaque.called.step, opaque.operands(tensors, numbers))
    return results


# Not `torch.library.custom_op`: below that, what an op does is not recorded for autograd.
torch.library.define(
    "flarec::mixer_call_backward",
    "(str call, Tensor[] tensors, SymInt[] numbers, int[] wanted, Tensor grad) -> Tensor[]",
)


@torch.library.impl("flarec::mixer_call_backward", "CompositeExplicitAutograd")
def _backward(call: str, tensors: list[Tensor], numbers: list[int], wanted: list[int], grad: Tensor) -> list[Tensor]:
    """Gradients of `tensors[i]` for i in wanted."""
    tensors = list(tensors)
    with torch.enable_grad():
        for i in wanted:
            tensors[i] = tensors[i].detach().requires_grad_()
        output = _Opaque.read(call).run(tensors, numbers)[0]
        grads = torch.autograd.grad(output, [tensors[i] for i in wanted], grad, allow_unused=True)
    return [
        torch.zeros_like(tensors[i], memory_format=torch.contiguous_format) if found is None
        else found.clone(memory_format=torch.contiguous_format)
        for i, found in zip(wanted, grads, strict=True)
    ]


@torch.library.register_fake("flarec::mixer_call_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    call: str, tensors: list[Tensor], numbers: list[int], wanted: list[int], grad: Tensor
) -> list[Tensor]:
    return [tensors[i].new_empty(tensors[i].shape) for i in wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # ctx is torch's own untyped object
    call, tensors, numbers = inputs
    ctx.save_for_backward(*tensors)
    ctx.call, ctx.numbers = call, numbers
    ctx.wanted = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    found: list[Tensor | None] = [None] * len(tensors)
    if ctx.wanted:
        made = torch.ops.flarec.mixer_call_backward(ctx.call, tensors, ctx.numbers, ctx.wanted, grads[0])
        for i, gradient in zip(ctx.wanted, made, strict=True):
            found[i] = gradient
    return None, found, None if ctx.numbers else []  # an empty list is a structure without leaves


_forward.register_autograd(_gradients, setup_context=_setup)
