"""Recipes: typed data that says how a model is converted. TOML outside, frozen dataclasses inside."""

from .files import load_recipe
from .sections import Recipe, RecipeKey, recipe_from_toml

__all__ = ["Recipe", "RecipeKey", "load_recipe", "recipe_from_toml"]
