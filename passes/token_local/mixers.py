"""Semantic ops: how their operands must lie, and the inputs of a program that they alone may read.

Trusted are the ops of the table (`flarec.ops`) and the functions that their declarations name, nothing else: a call
that holds another function, reads another derivation or another cache than its declaration says is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from flarec.ir.spec import CLEAN, LENGTH, ROWS, TensorSpec
from flarec.ops import REFERENCE, STREAMS, Call, Form, Mixer, Site, Slot

from .call import run_on_meta
from .values import Axes, Dim, Number, Opaque, Refusal, Tensor, check_size, holds_tokens, size_of, tensor

TOKENS: dict[str, Dim] = {"B": (ROWS,), "L": (LENGTH,)}
ONLY_MIXERS = (
    "only token mixers read the layout, what is derived from it, and the caches; read position_ids, noisy_rows or "
    "hidden states"
)


def result_of(target: Any, mixer: Mixer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of a mixer's call: its output, and with decode state the next caches behind it."""
    known = isinstance(target, Call)
    if known and args:
        raise Refusal("has operands without a name", "pass the operands of a semantic op by name")
    own = {argument.name for argument in mixer.op._schema.arguments}
    operands = mixer.bind(args, {name: value for name, value in kwargs.items() if name in own})
    letters: dict[str, Dim] = {}
    for name, operand in operands.items():
        _check_operand(name, operand, mixer, letters)
    others = {name: value for name, value in kwargs.items() if name not in own}
    next_caches = _check_call(target, mixer, operands, others) if known else _none(others)
    shapes, dtypes, _ = run_on_meta(mixer.op, operands)
    output = tuple(letters[letter] for letter in mixer.output)
    check_size(output, shapes[0])
    result = tensor(output, dtypes[0])
    return (result, *next_caches) if next_caches else result


def counted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opaque:
    """The value of a count of experts: sums over tokens, which nothing but an output may read."""
    index, streams, experts = args if len(args) == 3 and not kwargs else (None,) * 3
    if not isinstance(index, Tensor) or index.axes[:1] != (TOKENS["B"] + TOKENS["L"],) or type(experts) is not int:
        raise Refusal("counts something else than experts of all tokens in their order", "use the pass count-experts")
    _check_opaque("stream", streams, "derived")
    return Opaque("counts", "experts", None, TensorSpec((len(STREAMS), experts), torch.int64))


def _none(others: dict[str, Any]) -> tuple[Opaque, ...]:
    if others:
        raise Refusal(f"has operands that its op does not take: {', '.join(others)}", "pass those of its schema")
    return ()


def _check_call(target: Call, mixer: Mixer, operands: dict[str, Any], others: dict[str, Any]) -> tuple[Opaque, ...]:
    """Function, derivation and caches are those of the declaration; returns what the step leaves in the caches."""
    declared = mixer.call(target.implementation, target.step, target.frozen_clean)
    if target.function is not declared.function or target.omits != declared.omits:
        raise Refusal(f"calls another function than '{mixer.name}' declares", "take the target from Mixer.call")
    form = mixer.forms[target.implementation] if target.implementation != REFERENCE else None
    site = Site({name: getattr(value, "spec", value) for name, value in operands.items()}, target.step)
    slots = tuple(mixer.slots(site)) if target.step else ()
    returned = [slot for slot in slots if not slot.in_place]
    rest = dict(others)
    if form is not None and (wanted := form.derivation(site)) is not None:
        _check_derived(form, site, wanted.operand, rest)
    if mixer.mixing != "none" and (form is None or target.step):
        _check_opaque("layout", rest.pop("layout", None), "layout")
    if returned:
        _check_opaque("accepted", rest.pop("accepted", None), "accepted")
    caches = {slot.operand: _check_cache(slot, rest.pop(slot.operand, None)) for slot in slots}
    if target.frozen_clean and getattr(rest.pop("clean_positions", None), "axes", None) != ((ROWS,), (CLEAN,)):
        raise Refusal("reads something else than the clean positions as 'clean_positions'", ONLY_MIXERS)
    _none(rest)
    return tuple(_next(caches[slot.operand], slot) for slot in returned)


def _check_derived(form: Form, site: Site, name: str, rest: dict[str, Any]) -> None:
    """The derivation that the form reads at this site, for whatever chunk size the pipeline asked."""
    operand = rest.pop(name, None)
    _check_opaque(name, operand, "derived")
    chunk = getattr(operand.detail, "chunk_size", None)
    wanted = form.derivation(Site(site.operands, site.step, chunk) if chunk else site)
    if type(operand.detail) is not type(wanted) or operand.detail != wanted:
        raise Refusal(f"reads {describe(operand)} as '{name}', which is another derivation than it needs", ONLY_MIXERS)


def _check_cache(slot: Slot, operand: Any) -> Opaque:
    _check_opaque(slot.operand, operand, "cache")
    held = operand.detail
    if (held.kind, held.shape, held.dtype) != (slot.kind or slot.operand, slot.shape, slot.dtype):
        raise Refusal(f"reads {describe(operand)} as '{slot.operand}', which is another slot", ONLY_MIXERS)
    cache: Opaque = operand
    return cache


def _check_opaque(name: str, operand: Any, wanted: str) -> None:
    if not isinstance(operand, Opaque) or operand.kind != wanted:
        raise Refusal(f"reads {describe(operand)} as '{name}'", "give it the program's own input")


def _check_operand(name: str, operand: Any, mixer: Mixer, letters: dict[str, Dim]) -> None:
    """An operand of the op's schema: tokens where its declaration says, or a weight."""
    forms = mixer.axes.get(name)
    if isinstance(operand, (Opaque, Number, tuple)):
        raise Refusal(f"reads {describe(operand)} as '{name}'", ONLY_MIXERS)
    if not isinstance(operand, Tensor):
        return
    if forms is None:
        if not operand.is_uniform:
            raise Refusal(f"takes tokens as '{name}', which is a weight")
        return
    form = next((form for form in forms.split("|") if len(form) == len(operand.axes)), None)
    if form is None or not _fits(form, operand.axes, letters):
        sizes = ", ".join(str(size_of(dim)) for dim in operand.axes)
        raise Refusal(f"takes '{name}' as [{sizes}], expected {forms} (B rows, L tokens)", "bring it into that form")


def _fits(form: str, axes: Axes, letters: dict[str, Dim]) -> bool:
    for letter, dim in zip(form, axes, strict=True):
        if letter in TOKENS and dim != TOKENS[letter]:
            return False
        if letter not in TOKENS and letter != "N" and holds_tokens(dim):
            return False
        if letters.setdefault(letter, dim) != dim:
            return False
    return True


def _next(cache: Opaque, slot: Slot) -> Opaque:
    """What a step leaves in a cache: as many pending rows as it had clean slots, in a conv buffer behind the window."""
    assert cache.spec is not None
    shape = tuple("clean" if size == "pending" else size for size in cache.spec.shape)
    if slot.kind == "conv":
        shape = (*shape[:-1], f"clean + {shape[-1]}")
    return Opaque("next cache", cache.name, None, TensorSpec(shape, cache.spec.dtype))


def describe(value: Any) -> str:
    """An operand for error messages."""
    if not isinstance(value, Opaque):
        plain = {Number: "a size", Tensor: "a tensor of the graph", tuple: "several tensors"}
        return plain.get(type(value), "nothing" if value is None else f"{value!r}")
    kinds = {
        "layout": "the layout", "derived": f"'{value.name}', which is derived from the layout",
        "cache": f"the cache '{value.name}'", "next cache": f"the cache '{value.name}' of the next step",
        "counts": "counts over all tokens", "accepted": "the accepted rows",
        "head rows": "the rows of the head (head_rows)",
        "input": f"the input '{value.name}', which nothing provides",
    }
    return kinds[value.kind]
