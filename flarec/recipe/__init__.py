"""Recipes: typed data that says how a model is converted. TOML outside, frozen dataclasses inside."""

from .aliases import Reading
from .files import load_recipe
from .sections import Recipe, RecipeKey, recipe_from_toml

__all__ = ["Reading", "Recipe", "RecipeKey", "load_recipe", "recipe_from_toml"]
