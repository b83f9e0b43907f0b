"""Whether a network gives one embedding for one picture: alone, again, and in a batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import NetworkError
from .gradients import Features


def difference(one: Features, other: Features) -> float:
    """|a - b| / |a| of the first picture's embeddings, or of its pooled activations if larger."""
    found = 0.0
    for key in ("embedding", "activations"):
        a, b = (getattr(features, key)[0].double() for features in (one, other))
        if key == "activations":
            a, b = a.mean((1, 2)), b.mean((1, 2))
        size = float(torch.linalg.vector_norm(a))
        found = max(found, float(torch.linalg.vector_norm(a - b)) / (size or 1.0))
    return found


def by_chance(drawn: set[str], off: float, allowed: float) -> NetworkError:
    """The error for a network that embeds one picture otherwise each time.

    Args:
        drawn: names of the operations in it that draw random numbers.
        off, allowed: relative differences.
    """
    said = "something in it depends on chance or on what ran before"
    if drawn:
        said = (
            f"it draws random numbers ({', '.join(sorted(drawn)[:3])}), as a dropout that is "
            "always on does"
        )
    return NetworkError(
        f"the same picture run twice gives embeddings that differ by {off:.2g} (allowed: "
        f"{allowed:g}): {said}; switch that off in eval mode, as in F.dropout(x, p, self.training)"
    )


def by_batch(module: nn.Module, off: float, allowed: float) -> NetworkError:
    """The error for a network that embeds a picture otherwise beside another one."""
    norm = next(
        (
            (name, type(part).__name__)
            for name, part in module.named_modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None
        ),
        None,
    )
    said = "something in it mixes the pictures of a batch, such as a norm by the batch's statistics"
    if norm is not None:
        said = (
            f"{norm[0]!r} ({norm[1]}) keeps no running statistics and norms by those of the batch"
        )
    return NetworkError(
        f"a picture alone and beside another gives embeddings that differ by {off:.2g} (allowed: "
        f"{allowed:g}): {said}; make each picture's embedding its own, as batch norm with "
        "track_running_stats=True in eval mode does"
    )


class Drawn(TorchDispatchMode):
    """Notes the names of the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(str(func.name()).partition("::")[2].partition(".")[0].rstrip("_"))
        return func(*args, **(kwargs or {}))


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Without TF32, which on GPUs alone would move a deep network's probe by about `SAME`."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    ):
        yield
