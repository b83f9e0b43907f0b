"""What an index is made with: the recipe, and the registry of methods."""

from .recipe import Recipe
from .registry import METHODS

__all__ = ["METHODS", "Recipe"]
