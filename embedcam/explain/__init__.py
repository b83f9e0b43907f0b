"""ONLINE: a picture and an index -> maps, without back-propagation."""

from .explainer import Explainer
from .explanation import Explanation

__all__ = ["Explainer", "Explanation"]
