"""Keys of a recipe: values coerced to their declared types, within the limits of their fields."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..base.fields import TEXTS, allowed_values, is_number, shown
from ..errors import RecipeError


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Types of a section's keys, resolved once."""
    return get_type_hints(cls)


def plain_values(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: plain_values(getattr(value, item.name)) for item in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def parse_value(path: str, text: str, hint: Any) -> Any:
    """The text of an override as a TOML value; bare words are text."""
    if hint is str or (get_origin(hint) is Literal and isinstance(get_args(hint)[0], str)):
        return text.strip("\"'")
    if hint == TEXTS and text[:1] not in ("[", '"', "'"):
        return [text] if text else []
    if get_origin(hint) is tuple and not text.startswith("["):
        text = f"[{text}]"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # not TOML, or a number with more digits than Python reads
        return text


def coerce(path: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """The value in its declared type, or a `RecipeError` naming key, value and what is allowed."""
    if is_dataclass(hint):
        good, result = isinstance(value, hint) if isinstance(hint, type) else False, value
    elif get_origin(hint) is Literal:
        good, result = any(value == choice and type(value) is type(choice) for choice in get_args(hint)), value
    elif hint == TEXTS:
        good = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        result = tuple(value) if good else value
    elif get_origin(hint) is tuple:
        good = isinstance(value, (list, tuple)) and len(value) == len(get_args(hint))
        good = good and all(is_number(item, float, metadata) for item in value)
        result = tuple(float(item) for item in value) if good else value
    elif hint is str:
        good, result = isinstance(value, str), value
    else:
        good = is_number(value, hint, metadata)
        result = hint(value) if good else value
    if not good:
        raise RecipeError(f"{path} = {shown(value)} is not allowed; give {allowed_values(hint, metadata)}")
    return result


def keys_of(cls: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, Any, Mapping[str, Any]]]]:
    """(dotted path, (name, type, metadata)) of every key; a section's own keys come before its subsections."""
    hints = types_of(cls)
    leaves = [item for item in fields(cls) if not is_dataclass(hints[item.name])]
    for item in leaves:
        yield prefix + item.name, (item.name, hints[item.name], item.metadata)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            yield from keys_of(hints[item.name], f"{prefix}{item.name}.")


def value_of(recipe: Any, path: str) -> Any:
    """The value of a dotted path."""
    for part in path.split("."):
        recipe = getattr(recipe, part)
    return recipe
