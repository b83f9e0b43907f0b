"""Whether an embedding follows from its own picture alone: not from chance, nor from its batch."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import NetworkError
from .module import uncompiled
from .runner import Features

# Runs of one picture that show chance which leaves most embeddings as they are.
_REPEATS = 8


def takes_batches(
    forward: Callable[[np.ndarray], Features],
    module: nn.Module,
    alone: Features,
    probes: np.ndarray,
    allowed: float,
) -> bool:
    """Return whether several pictures can go together; refuse results that depend on more than one.

    `alone` is what `forward` made of the first of two `probes`; results may differ by `allowed`.
    """
    random = RandomOperations()

    def run_again() -> None:
        with uncompiled(), random:
            again = forward(probes[:1])
        how = "the same picture run twice"
        refuse_difference(alone, again, allowed, how, by_chance(random.names))

    run_again()
    # What is drawn may change an embedding only now and then.
    for _ in range(_REPEATS if random.names else 0):
        run_again()
    try:
        beside = forward(probes)
    except NetworkError:
        return False
    try:
        how = "a picture alone and beside another"
        refuse_difference(alone, beside, allowed, how, by_batch(module))
    except NetworkError:
        for _ in range(_REPEATS):  # chance that torch knows nothing of
            run_again()
        raise
    return True


def refuse_difference(one: Features, other: Features, allowed: float, how: str, cause: str) -> None:
    """Refuse first embeddings or pooled activations that differ by more than |a - b| / |a|."""
    off = 0.0
    for a, b in (
        (one.embedding[0].double(), other.embedding[0].double()),
        (one.activations[0].double().mean((1, 2)), other.activations[0].double().mean((1, 2))),
    ):
        off = max(off, float((a - b).norm()) / (float(a.norm()) or 1.0))
    if off > allowed:
        raise NetworkError(
            f"{how} gives embeddings that differ by {off:.2g} (allowed: {allowed:g}): {cause}"
        )


class RandomOperations(TorchDispatchMode):
    """Notes the names of the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(func.name().partition("::")[2].partition(".")[0].rstrip("_"))
        return func(*args, **(kwargs or {}))


def by_chance(operations: set[str]) -> str:
    """Return what is wrong with a network that embeds one picture otherwise each time."""
    cause = "something in it depends on chance or on what ran before"
    if operations:
        names = ", ".join(sorted(operations)[:3])
        cause = f"it draws random numbers ({names}), as a dropout that is always on does"
    return f"{cause}; switch that off in eval mode, as in F.dropout(x, p, self.training)"


def by_batch(module: nn.Module) -> str:
    """Return what is wrong with a network that embeds a picture otherwise beside another one."""
    cause = "something mixes the pictures of a batch, such as a norm by the batch's statistics"
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            kind = type(part).__name__
            cause = f"{name!r} ({kind}) keeps no running statistics and norms by the batch's"
            break
    return f"{cause}; make each its own, as batch norm with running statistics does"
