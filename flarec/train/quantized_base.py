"""A frozen model in codes while its adapter learns (`adapter.base`): less memory, and a clean stream that differs.

What is written is not concerned: the checkpoint holds the source's own weight files, and the codes are made of them
again when a run is resumed. All programs of a run read the codes, those that evaluate and decode as well.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch
from torch import nn

from ..errors import RecipeError
from ..frontend.export import capture
from ..frontend.loading import text_model_of
from ..ir.program import LAYER, Program
from ..ops.quantized import NF4, Kind, QuantizedWeight, check_library, quantize
from ..passes.quantize_base import names_of_parameters, quantizable
from ..recipe import Recipe

STORED: Final = "stored"
BASE = "base"
"""Key of a manifest's `data`: what the model was held in, if not as it is stored."""


def kind_of(recipe: Recipe) -> Kind | None:
    """The codes that a recipe holds its frozen model in; None for one that holds it as it is stored."""
    base = recipe.adapter.base
    return None if base == STORED else base


def check_base(recipe: Recipe) -> None:
    """Raise `UsageError` if the recipe's codes need a package that is not installed."""
    kind = kind_of(recipe)
    if kind is not None:
        check_library(kind)


def quantize_base(captured: Program, recipe: Recipe, note: Callable[[str], None]) -> None:
    """Hold a captured program's matrices as the recipe says, from here on: they are codes for all that is lowered from
    it, and their values are gone (on the meta device nothing is). note is told what became of the weights.

    Raises `UsageError` without the package that makes the codes, `RecipeError` for a model without such matrices.
    """
    kind = kind_of(recipe)
    if kind is not None:
        captured.quantized |= _held(captured, dict(names_of_parameters(captured)), kind, captured.device, note)


def open_quantized(
    model: nn.Module, empty: nn.Module, recipe: Recipe, device: torch.device, note: Callable[[str], None]
) -> dict[str, QuantizedWeight]:
    """Bring a model from the CPU to a device with its matrices as codes: what they are made of is there one at a time.
    What is captured of the model gets the result as its `quantized`. empty: the same model on the meta device.

    Raises as `quantize_base`.
    """
    kind = kind_of(recipe)
    if kind is None:
        model.to(device)
        return {}
    values = dict(text_model_of(model).named_parameters(remove_duplicate=False))
    found = _held(capture(empty, cache=True), values, kind, device, note)
    model.to(device)
    return found


def _held(
    program: Program, values: Mapping[str, nn.Parameter], kind: Kind, device: torch.device, note: Callable[[str], None]
) -> dict[str, QuantizedWeight]:
    """By every name of it each matrix of a captured program as codes on the device; `values`, the parameters by every
    name, keep its shape alone."""
    wanted = quantizable(program)
    if not wanted:
        raise RecipeError(
            f"adapter.base = {kind} finds no matrix that linear layers of this model's decoder layers alone read; set "
            "adapter.base=stored"
        )
    before, found = _nbytes(values.values()), dict[str, QuantizedWeight]()
    for name in wanted:
        parameter = values[name]
        held = quantize(parameter.detach().to(device), kind)
        found |= {other: held for other, value in values.items() if value is parameter}
        if device.type != "meta":
            # of its shape, without its memory: whatever read it would be seen
            gone = torch.full((), torch.nan, dtype=parameter.dtype, device=device)
            parameter.data = gone.expand(parameter.shape)
    rest = _nbytes(value for name, value in values.items() if name not in found)
    codes = sum(held.nbytes for held in _once(found))
    note(
        f"base: {len(wanted)} matrices of decoder layers in {kind}, {_size(codes)} instead of {_size(before - rest)}; "
        f"what else the model has stays as it is, {_size(rest)}"
    )
    left = {
        id(value): (name, value) for name, value in reversed([*values.items()])
        if name not in found and value.dim() > 1 and LAYER.search(name)
    }
    if left:
        what = ", ".join(sorted({".".join(name.split(".")[-2:]) for name, _ in left.values()}))
        size = _size(_nbytes(value for _, value in left.values()))
        note(f"base: not a linear layer's own, and kept as stored in decoder layers: {what} ({size})")
    return found


def held_once(program: Program) -> list[QuantizedWeight]:
    """The codes of a program; a weight with several names once."""
    return _once(program.quantized)


def _once(found: Mapping[str, QuantizedWeight]) -> list[QuantizedWeight]:
    return list({id(held): held for held in found.values()}.values())


def _nbytes(values: Iterable[nn.Parameter]) -> int:
    """Of parameters, one that comes several times once."""
    return sum({id(value): value.nbytes for value in values}.values())


def base_text(recipe: Recipe) -> str:
    """How a run held its model, with the version of the library that made its codes."""
    kind = kind_of(recipe)
    return f"{kind} (bitsandbytes {importlib.metadata.version('bitsandbytes')})" if kind == NF4 else kind or STORED


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
