"""Recipes: typed data that says how a model is converted. TOML outside, frozen dataclasses inside."""

from .files import load_recipe
from .sections import Entry, Recipe, recipe_from_toml

__all__ = ["Entry", "Recipe", "load_recipe", "recipe_from_toml"]
