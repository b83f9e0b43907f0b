"""What an index is made with: the recipe, and the registry of methods."""

from typing import TYPE_CHECKING

from .choices import NORMS, TARGETS, WHITENED
from .registry import FILLS, METHODS

if TYPE_CHECKING:
    from .recipe import Recipe
else:

    def __getattr__(name):  # on first use: `--help` does without
        if name != "Recipe":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .recipe import Recipe

        return Recipe


__all__ = ["FILLS", "METHODS", "NORMS", "TARGETS", "WHITENED", "Recipe"]
