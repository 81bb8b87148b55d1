"""Recipes by name or from TOML files, each a difference to its base."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from flarec import recipes

from ..errors import RecipeError
from . import aliases
from .aliases import Reading
from .sections import Recipe


def load_recipe(name_or_path: str | Path, reading: Reading | None = None) -> Recipe:
    """A built-in recipe by name, or one from a TOML file, in which keys may have their names in transformers (what they
    became is noted in `reading`). Raises `RecipeError` naming the recipe or file."""
    table = _table(str(name_or_path), Path(), (), reading or Reading())
    try:
        return Recipe.from_dict(table)
    except RecipeError as error:
        raise RecipeError(f"recipe {name_or_path}: {error}") from None


def recipe_files(name_or_path: str | Path) -> list[Path]:
    """The TOML files that a recipe is read from, its bases included; none for a built-in one. Raises `RecipeError`."""
    reading = Reading()
    _table(str(name_or_path), Path(), (), reading)
    return reading.files


def _table(source: str, folder: Path, seen: tuple[str, ...], reading: Reading) -> dict[str, Any]:
    """The merged tables of a recipe and its bases; `folder` is where relative paths start."""
    if source in recipes.NAMES:
        identity, text, folder = source, recipes.read(source), Path()
    else:
        path = folder / source
        if not os.path.isfile(path):  # unlike Path.is_file without an error for what is too long to be a path
            near = difflib.get_close_matches(source, recipes.NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"built-in recipes are {', '.join(recipes.NAMES)}."
            raise RecipeError(f'"{source}" is neither a built-in recipe nor a TOML file; {hint}')
        identity, folder = str(path.resolve()), path.parent
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path}: cannot be read ({error})") from None
        reading.files.append(path)
    if identity in seen:
        raise RecipeError(f"recipe {source} is its own base; remove one `base` line")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {source}: not TOML: {error}") from None
    base = table.pop("base", None)
    if source not in recipes.NAMES:
        table.setdefault("name", Path(source).stem)
    if base is not None and not isinstance(base, str):
        raise RecipeError(f"recipe {source}: base = {base!r} is not text; give a recipe's name or a path")
    below = {} if base is None else _table(base, folder, (*seen, identity), reading)
    try:
        return _merge(below, _without_aliases(table, below, reading))
    except RecipeError as error:
        raise RecipeError(f"recipe {source}: {error}") from None


def _without_aliases(table: dict[str, Any], below: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """A file's table in own keys."""
    given = {name: value for name, value in table.items() if name in aliases.NAMES and not isinstance(value, dict)}
    own = {name: value for name, value in table.items() if name not in given}
    defaults = _leaves(Recipe().to_dict())
    found = aliases.translated(given, _leaves(own), lambda path: _leaves(below).get(path, defaults[path]), reading)
    for path, value in found.items():
        section, name = path.split(".")
        own = _merge(own, {section: {name: value}})
    return own


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted path."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merge(base[key], top[key]) for key in base.keys() & top.keys() if _tables(base[key], top[key])}
    return {**base, **top, **both}


def _tables(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)
