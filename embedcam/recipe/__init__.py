"""What an index is made with: the recipe, and the registry of methods."""

from .recipe import DTYPES, METRICS, NORMS, TARGETS, WHITENED, Recipe
from .registry import FILLS, METHODS

__all__ = ["DTYPES", "FILLS", "METHODS", "METRICS", "NORMS", "TARGETS", "WHITENED", "Recipe"]
