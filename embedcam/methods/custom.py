"""Any function of the embedding as a target, differentiated by autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..targets import Target


class Custom(Target):
    """y = score(f) of the user's own function.

    Args:
        function: embeddings `[B D]` -> scores `[B]`, each image by itself.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def score(self, embeddings: Any) -> Any:
        """y `[B]`.

        Raises:
            InputError: the function returned something else, or no finite number.
        """
        found = self.function(embeddings)
        if not isinstance(found, Tensor) or found.shape != embeddings.shape[:1]:
            given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"the target returned {given} for embeddings {list(embeddings.shape)}; expected "
                f"one score an image, a tensor [{len(embeddings)}]"
            )
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                "the target returned a NaN or an infinity; a score must be a number for every "
                "embedding"
            )
        return found

    def cotangents(self, embeddings: Any) -> tuple[Any, None]:
        """dy/df, `[B 1 D]`.

        Raises:
            InputError: the score does not depend on the embedding.
        """
        with torch.inference_mode(False), torch.enable_grad():
            leaf = embeddings.detach().clone().requires_grad_()
            score = self.score(leaf)
            if not score.requires_grad:
                raise InputError(
                    "the target's score does not depend on the embedding, or was cut from it "
                    "(detach, numpy); compute it with torch from the embeddings it is given"
                )
            found = torch.autograd.grad(score.sum(), leaf, allow_unused=True)[0]
        return (torch.zeros_like(embeddings) if found is None else found)[:, None], None


def as_target(given: Any) -> Target:
    """A target as it is, a callable as one.

    Raises:
        InputError: neither.
    """
    if isinstance(given, Target):
        return given
    if callable(given) and not isinstance(given, type):
        return Custom(given)
    raise InputError(
        f"target is {given!r}; give one such as Similarity(reference), or a function from "
        "embeddings [B D] to scores [B]"
    )
