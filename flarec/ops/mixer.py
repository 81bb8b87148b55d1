"""What a semantic op is: one declaration per token mixer or expert layer, read by every pass and every report.

A captured graph holds `flarec::*` custom ops; between them everything is plain ATen that treats tokens one by one. A
`Mixer` says what such an op means: over one document per row (`captured`), over a layout (`streams`), as a decode step
(`cached`, with its `slots`), and which kernels compute it (`forms`). Operands have names, those of the op's schema;
nothing knows them by position.

Functions may be given as text, "package.module:function": they are imported when a graph first calls them, so that an
op costs nothing where it is not used (Triton least of all).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from ..layout import Layout, build_layout
from .register import custom_op

REFERENCE, TORCH, TRITON = "reference", "torch", "triton"
_LABELS = {
    (REFERENCE, False): "stream_ops.two_stream_{}",
    (REFERENCE, True): "stream_ops.cached_{}",
    (TORCH, False): "lowered.{}",
    (TORCH, True): "lowered.{}_step",
}
"""How a graph's text names what it calls; other implementations are `lowered_NAME.{}`."""

Function = str | Callable[..., Any]
Mixing = Literal["attention", "state", "none"]


def plain_layout(rows: int, length: int, device: torch.device) -> Layout:
    """The layout of a plain causal forward: one document per row, no noisy tokens."""
    return build_layout([[length]] * rows, [[]] * rows, device=device)


class FormDerivation(Protocol):
    """What a form reads from the layout, computed once per batch and shared by all sites that name it alike.

    `operand`: keyword under which kernels take it. `name`: of the graph's input. `build`, `describe`: see
    `flarec.ir.program.Derivation`.
    """

    @property
    def operand(self) -> str: ...
    @property
    def name(self) -> str: ...
    def build(self, layout: Layout, capacity: int | None) -> Any: ...
    def describe(self) -> str: ...


@dataclass(frozen=True)
class Site:
    """One call of an op as declarations see it.

    operands    by name; a tensor is its spec (shape, dtype, `size(dim)`), anything else is itself
    step        whether it is a decode step
    chunk_size  clean tokens per chunk that `lower-mixers` asks for
    """

    operands: Mapping[str, Any]
    step: bool = False
    chunk_size: int = 64

    def __getitem__(self, name: str) -> Any:
        return self.operands[name]

    def size(self, name: str, dim: int) -> int:
        """A size that has to be a number: of a weight or of a feature dimension."""
        return int(self.operands[name].size(dim))

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self.operands[name].dtype
        return dtype


@dataclass(frozen=True)
class Slot:
    """One tensor of an op's decode state.

    operand  keyword of the step
    shape    "batch" requests, "capacity" positions, "pending" rows of the last step, or numbers (see `CacheSlot`)
    kind     what reports call it; the operand by default

    A step writes a slot with a "capacity" axis in place, and returns the next value of every other one, in the order of
    the slots, after its output.
    """

    operand: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    kind: str = ""

    @property
    def in_place(self) -> bool:
        return "capacity" in self.shape


@dataclass(frozen=True)
class Form:
    """One implementation of an op. All operands go to its functions by keyword.

    train     two streams: the op's operands and what `reads` derives from the layout
    step      a decode step: these, the op's slots, `accepted` and `layout`. None: the torch form serves
    reads     the derivation of a site; None for an op that reads no layout, or where the function reads it itself
    refuses   why the functions cannot run a site, or None
    omits     operands that `reads` has used up: the functions do not take them (step_omits: those of `step`, if others)
    opaque    which of the functions a compiled or exported graph calls as one op (`flarec.ops.opaque`), because
              tracers cannot or should not look inside: Python loops over a schedule, matrices of computed sizes
    in_place  operands that are read where they lie: a copy into another memory order before them is left out
    frozen    whether `train` takes `frozen_clean`, the number of clean slots per row: then it computes the gradients of
              noisy tokens alone, and keeps of the clean stream nothing but what noisy tokens read. Other forms compute
              all gradients, and those of clean tokens are dropped
    """

    train: Function
    step: Function | None = None
    reads: Callable[[Site], FormDerivation | None] | None = None
    refuses: Callable[[Site], str | None] | None = None
    omits: tuple[str, ...] = ()
    step_omits: tuple[str, ...] | None = None
    opaque: tuple[Literal["train", "step"], ...] = ()
    in_place: tuple[str, ...] = ()
    frozen: bool = False

    def derivation(self, site: Site) -> FormDerivation | None:
        """What the function reads at this site beside its operands."""
        return None if self.reads is None else self.reads(site)


def _no_slots(site: Site) -> tuple[Slot, ...]:
    return ()


def _no_options(site: Site) -> Iterable[str]:
    return ()


def _as_drawn(name: str, values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, eq=False)
class Mixer:
    """A semantic op.

    name      of the op: `torch.ops.flarec.NAME`
    captured  the op over one document per row. Its signature is the op's schema; its backward is autograd's
    fake      the output's shape and strides from the same arguments
    mixing    "attention": a mask says whom a token reads (`rewrite-masks` gives it the layout); "state": a state or
              window goes from token to token (`schedule-states`); "none": token by token
    axes      how the operands that hold tokens lie, a letter per dimension: B rows, L tokens of a row, N any tokens,
              others features; "BLH|BLHK" for either. Tensors that are not named are weights
    output    how the output lies, in the same letters
    sees      what a token reads once the op knows the layout, for reports (docs/semantics.md section 2)
    streams   the definition over a layout: the op's operands and `layout`, by keyword
    cached    the definition of a decode step: these, the slots' operands, and `accepted` if a slot is returned
    slots     the decode state of a site
    options   what else defines a site, for reports ("delta rule", "width 4")
    forms     implementations by name; "torch" is the one that every op has
    ordinary  what an operand or slot of that name usually holds, made of standard normal numbers (`self_test`)
    """

    name: str
    captured: Callable[..., Tensor]
    fake: Callable[..., Tensor]
    mixing: Mixing
    axes: Mapping[str, str]
    output: str
    sees: str
    forms: dict[str, Form]
    streams: Function | None = None
    cached: Function | None = None
    slots: Callable[[Site], Iterable[Slot]] = _no_slots
    options: Callable[[Site], Iterable[str]] = _no_options
    ordinary: Callable[[str, Tensor], Tensor] = _as_drawn

    @functools.cached_property
    def op(self) -> torch._ops.OpOverload[..., Any]:
        """The op of a captured graph."""
        return custom_op(self.name, self.captured, self.fake)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the captured op: what hooks call while a model is traced."""
        output: Tensor = self.op(*args, **kwargs)
        return output

    def bind(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Operands of a call of `op` by name, in the order of the schema, defaults filled in."""
        arguments = self.op._schema.arguments
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | dict(kwargs)
        return {a.name: given.get(a.name, a.default_value) for a in arguments}

    def results(self, step: bool, operands: Mapping[str, Any]) -> list[Tensor]:
        """Unwritten results of a call over a layout, dense: the output, and behind that of a step the next slots."""
        given = {name: operands[name] for name in self.bind((), {}) if name in operands}
        output = self.fake(**self.bind((), given))
        results = [output.new_empty(output.shape)]
        for slot in self.slots(Site(operands, step)) if step else ():
            sizes = {"batch": output.shape[0], "pending": operands["layout"].clean_length}
            shape = [sizes[size] if isinstance(size, str) else size for size in slot.shape]
            if slot.kind == "conv":
                shape[-1] += sizes["pending"]  # the window, then the pending rows
            results.append(output.new_empty(shape, dtype=slot.dtype))
        return results

    def implementation(self, wanted: str, step: bool) -> str:
        """`wanted`, or "torch" where the op has no such form: then it is the only one."""
        form = self.forms.get(wanted)
        return wanted if form is not None and (not step or form.step is not None) else TORCH

    def call(self, implementation: str, step: bool = False, frozen_clean: bool = False) -> Call:
        """The target of a graph's node; imports what it calls. frozen_clean: clean tokens take no gradient."""
        takes = False
        if implementation == REFERENCE:
            function, omits, opaque = self.cached if step else self.streams, tuple[str, ...](), True
        else:
            form = self.forms[implementation]
            function, omits = form.step if step else form.train, form.omits
            if step and form.step_omits is not None:
                omits = form.step_omits
            opaque = ("step" if step else "train") in form.opaque
            takes = form.frozen
        assert function is not None, f"{self.name} has no {implementation} form of a {'step' if step else 'row'}"
        return Call(self, implementation, step, load(function), omits, opaque, frozen_clean, takes)


@dataclass(frozen=True, repr=False)
class Call:
    """What a mixer's node calls once it knows the layout. Two are equal if op, implementation and use are.

    frozen_clean: clean tokens take no gradient, and the call has their positions [rows, Lc] as one more operand,
    `clean_positions`; takes_frozen: whether the function makes use of that.
    """

    mixer: Mixer
    implementation: str
    step: bool
    function: Callable[..., Any] = field(compare=False)
    omits: tuple[str, ...] = field(compare=False, default=())
    opaque: bool = field(compare=False, default=False)
    frozen_clean: bool = False
    takes_frozen: bool = field(compare=False, default=False)

    @property
    def label(self) -> str:
        """Name in a graph's text: `stream_ops.two_stream_short_conv`, `lowered_triton.short_conv_step`, ..."""
        known = _LABELS.get((self.implementation, self.step))
        other = f"lowered_{self.implementation}.{{}}{'_step' if self.step else ''}"
        return (known or other).format(self.mixer.name)

    @property
    def __name__(self) -> str:
        """fx names nodes by it."""
        return self.label.rpartition(".")[2]

    def __repr__(self) -> str:
        return self.label

    def __call__(self, **operands: Any) -> Any:
        for name in self.omits:
            operands.pop(name)
        if self.opaque and torch.compiler.is_compiling():
            from .opaque import call_opaque  # brings torch's compiler, which nothing else needs

            if self.step and self.mixer.mixing == "attention":
                raise UsageError(
                    f"the {self.implementation} form of {self.mixer.name} writes its caches where they are, which a "
                    "compiler cannot see; lower the program with --kernels torch"
                )
            given = {name: operand for name, operand in operands.items() if operand is not None}
            absent = tuple(name for name in operands if name not in given)
            return call_opaque(self.mixer.name, self.implementation, self.step, self.frozen_clean, given, absent)
        return self.run(operands)

    def run(self, operands: dict[str, Any]) -> Any:
        """Call the function with the operands that it takes."""
        if self.frozen_clean:
            clean = operands.pop("clean_positions").shape[1]
            operands |= {"frozen_clean": clean} if self.takes_frozen else {}
        return self.function(**operands)


def load(function: Function) -> Callable[..., Any]:
    """A function by its text "package.module:function"."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Recurrent states are float32 at least: what a bf16 state costs is in docs/kernels.md."""
    return torch.float64 if dtype == torch.float64 else torch.float32
