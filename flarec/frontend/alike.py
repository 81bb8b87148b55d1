"""Whether two layers are the same to a forward but for their tensors: class by class and attribute by attribute."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .hooks.interfaces import Causal

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, Causal)
"""Values that are compared by what they say."""
CODE = (FunctionType, BuiltinFunctionType, type)


def alike(one: nn.Module, other: nn.Module, number: int, another: int) -> set[tuple[str, str]] | None:
    """The attributes (module, name) that differ as the layers' indices do; None if anything else differs."""
    ones, others = list(one.named_modules()), list(other.named_modules())
    if [(name, type(module)) for name, module in ones] != [(name, type(module)) for name, module in others]:
        return None
    twins = {id(a): b for (_, a), (_, b) in zip(ones, others, strict=True)}
    indices = set()
    for (name, a), (_, b) in zip(ones, others, strict=True):
        if _tensors(a) != _tensors(b) or (mine := _own(a)).keys() != (theirs := _own(b)).keys():
            return None
        for key, value in mine.items():
            if equal(value, theirs[key], twins):
                continue
            if not (type(value) is type(theirs[key]) is int and theirs[key] - value == another - number):
                return None
            indices.add((name, key))
    return indices


def _own(module: nn.Module) -> dict[str, Any]:
    """A module's attributes but for its tensors and modules; `training` is set for the trace."""
    return {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}


def _tensors(module: nn.Module) -> list[object]:
    """What a trace sees of a module's own tensors, by their names."""
    return [
        (name, t if t is None else (type(t), t.shape, t.dtype, t.device, t.requires_grad))
        for name, t in (*module._parameters.items(), *module._buffers.items())
    ]


def equal(a: Any, b: Any, twins: Mapping[int, nn.Module] = MappingProxyType({})) -> bool:
    """Whether two values are the same to a forward; `twins` are the other layer's modules by the id of this one's."""
    from transformers import PretrainedConfig

    if type(a) is not type(b):
        return False
    if a is b and isinstance(a, (*PLAIN, *CODE, Tensor, PretrainedConfig)):
        return True
    if a is b and not isinstance(a, (tuple, frozenset)):
        return False  # one layer may write into it what another reads
    if isinstance(a, PLAIN):
        return bool(a == b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(equal(x, y, twins) for x, y in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return bool(a == b) and all(isinstance(x, PLAIN) for x in a)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(x, b[key], twins) for key, x in a.items())
    if isinstance(a, functools.partial):
        return all(equal(x, y, twins) for x, y in zip(a.__reduce__()[2], b.__reduce__()[2], strict=True))
    if isinstance(a, MethodType):
        return a.__func__ is b.__func__ and twins.get(id(a.__self__)) is b.__self__
    return False
