"""Structures of tensors and numbers as inputs of a graph: the layout, and the schedules that are derived from it.

They are pytrees (`torch.utils._pytree`), so that tracing, compiling, exporting and capturing see their leaves, tensors
and integers. In the text of a graph each stays one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

_T = TypeVar("_T")


def flat_input(cls: type[_T]) -> type[_T]:
    """Decorator of a frozen dataclass of tensors, integers, Nones and such structures: its fields become leaves."""
    _pytree.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, itself if it is there. What goes from the host to a GPU goes through pinned memory, and
    nobody waits for it; a plain copy would wait for all that the GPU still has to do."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def save_structure(ctx: Any, value: Any) -> None:
    """Save a structure of tensors, Nones, tuples and `flat_input`s for a backward pass; `saved_structure` has it again.

    What autograd knows as saved it can drop and compute again (`torch.utils.checkpoint`); an attribute of `ctx` stays.
    """
    leaves, ctx.structure = _pytree.tree_flatten(value)
    ctx.save_for_backward(*leaves)


def saved_structure(ctx: Any) -> Any:
    """What `save_structure` saved."""
    return _pytree.tree_unflatten(ctx.saved_tensors, ctx.structure)


class Schedule:
    """Base of schedules: dataclasses whose fields are tensors, annotated `Tensor`, or numbers."""

    _of_class: ClassVar[dict[type, tuple[list[str], list[str]]]] = {}

    @classmethod
    def _names(cls) -> tuple[list[str], list[str]]:
        """Fields that are tensors, and the others, in order."""
        known = Schedule._of_class.get(cls)
        if known is None:
            made = [f for f in fields(cls) if f.init]  # type: ignore[arg-type]
            known = [f.name for f in made if f.type == "Tensor"], [f.name for f in made if f.type != "Tensor"]
            Schedule._of_class[cls] = known
        return known

    def to(self, device: torch.device | str) -> Self:
        """On a device, without waiting for it (`sent`)."""
        moved = {name: sent(getattr(self, name), device) for name in self._names()[0]}
        return replace(self, **moved)  # type: ignore[type-var]

    def flat(self) -> tuple[list[int], list[Tensor]]:
        """(the numbers, the tensors), each in the order of their fields: made once, `rebuild` is the inverse.

        For ops of this package, whose signatures hold plain lists; only where no number is None.
        """
        known: tuple[list[int], list[Tensor]] | None = self.__dict__.get("_flat")
        if known is None:
            tensors, numbers = self._names()
            known = [int(getattr(self, name)) for name in numbers], [getattr(self, name) for name in tensors]
            if not torch.compiler.is_compiling():
                self.__dict__["_flat"] = known
        return known

    @classmethod
    def rebuild(cls, numbers: Sequence[int], tensors: Sequence[Tensor]) -> Self:
        names = cls._names()
        return cls(**dict(zip(names[1], numbers, strict=True)), **dict(zip(names[0], tensors, strict=True)))
