"""Documented and bounded fields of dataclasses, and how a value is read into one: recipes, generation options.

A field says in its metadata what it means and what it takes; validation, error texts, command-line options and printed
documentation all come from there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

TEXTS = tuple[str, ...]
"""Type of a field that holds any number of texts."""
LARGEST = 2**63 - 1
"""The largest int64: no whole number of a field is larger."""
LARGEST_BLOCK = 4096
"""Noisy positions of the largest block."""
SHOWN = 60  # characters of a wrong value that an error repeats


def key(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    metavar: str | None = None,
    option: str | None = None,
) -> Any:
    """A documented field: `low` and `high` are inclusive limits, `above` an exclusive lower one.

    default          `dataclasses.MISSING` for a field that must be given
    metavar, option  of the command line; the option is named like the field if it has no other name
    """
    bounds = limits(low=low, high=high, above=above)
    return field(default=default, metadata={"doc": doc, "metavar": metavar, "option": option, **bounds})


def limits(
    *, low: float | None = None, high: float | None = None, above: float | None = None
) -> dict[str, float | None]:
    """The part of a field's metadata that bounds its value."""
    return {"low": low, "high": high, "above": above}


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields by name."""
    return get_type_hints(cls)


def option_name(item: Field[Any]) -> str:
    """How a field is called on the command line."""
    return item.metadata["option"] or f"--{item.name.replace('_', '-')}"


Function = TypeVar("Function", bound=Callable[..., Any])


def shows_fields(cls: Any) -> Callable[[Function], Function]:
    """Show the fields of a dataclass in the signature of a function that ends in `**keywords: Unpack[...]`; those that
    the function names itself stay as they are."""

    def show(function: Function) -> Function:
        signature = inspect.signature(function)
        kind = inspect.Parameter.KEYWORD_ONLY
        own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        shown = [
            inspect.Parameter(item.name, kind, default=item.default, annotation=field_types(cls)[item.name])
            for item in fields(cls)
            if item.name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return show


def is_number(value: Any, kind: type, metadata: Mapping[str, Any]) -> bool:
    """Whether a Python value is a finite number of this kind (int or float) within the limits; bools are none."""
    if not isinstance(value, int if kind is int else (int, float)) or isinstance(value, bool):
        return False
    if abs(value) > LARGEST if isinstance(value, int) else not math.isfinite(value):
        return False
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)


def allowed_values(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What a field of this type takes, in words."""
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    if hint is str:
        return "text"
    if hint == TEXTS:
        return "a list of texts"
    if get_origin(hint) is tuple:
        words = f"{len(get_args(hint))} numbers"
    else:
        words = "a whole number" if hint is int else "a number"
    named = {"at least": metadata.get("low"), "above": metadata.get("above"), "at most": metadata.get("high")}
    return ", ".join([words, *(f"{word} {_written(limit)}" for word, limit in named.items() if limit is not None)])


def _written(limit: float) -> str:
    return "2**63 - 1" if limit == LARGEST else str(limit)


def plain(value: Any) -> Any:
    """The Python number in a scalar of numpy or a tensor with one element; every other value as it is."""
    if isinstance(value, (int, float)) or not callable(getattr(value, "item", None)):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):  # more than one element, or none that is known
        return value


def shown(value: Any) -> str:
    """A wrong value, on one line and not longer than an error should be."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write out the largest ones
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def whole_number(
    name: str, value: Any, error: type[Exception], *, low: int | None = None, high: int | None = LARGEST
) -> int:
    """A whole number within limits, also of numpy or torch. Raises `error` with name, value and what is allowed."""
    bounds, number = limits(low=low, high=high), plain(value)
    if not is_number(number, int, bounds):
        raise error(f"{name} is {shown(value)}; give {allowed_values(int, bounds)}")
    return int(number)
