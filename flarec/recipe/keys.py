"""Keys of a recipe: their documentation and limits, and values coerced to their declared types."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import RecipeError

TEXTS = tuple[str, ...]
"""Type of a key that holds any number of texts."""


def key(
    default: Any, doc: str, *, low: float | None = None, high: float | None = None, above: float | None = None
) -> Any:
    """A documented key: `low` and `high` are inclusive limits, `above` an exclusive lower one."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "above": above})


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
    except tomllib.TOMLDecodeError:
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
        good = good and all(_number(item, float, metadata) for item in value)
        result = tuple(float(item) for item in value) if good else value
    elif hint is str:
        good, result = isinstance(value, str), value
    else:
        good = _number(value, hint, metadata)
        result = hint(value) if good else value
    if not good:
        raise RecipeError(f"{path} = {value!r} is not allowed; give {allowed_values(hint, metadata)}")
    return result


def _number(value: Any, kind: type, metadata: Mapping[str, Any]) -> bool:
    right_type = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right_type or not math.isfinite(value):
        return False
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)


def allowed_values(hint: Any, metadata: Mapping[str, Any]) -> str:
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
    limits = {"at least": metadata.get("low"), "above": metadata.get("above"), "at most": metadata.get("high")}
    return ", ".join([words, *(f"{word} {limit}" for word, limit in limits.items() if limit is not None)])
