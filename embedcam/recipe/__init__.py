"""What an index is made with: the recipe, and the registry of methods."""

from .recipe import NORMS, TARGETS, WHITENED, Recipe
from .registry import FILLS, METHODS

__all__ = ["FILLS", "METHODS", "NORMS", "TARGETS", "WHITENED", "Recipe"]
