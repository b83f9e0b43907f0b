"""What one request, and all of them together, may cost."""

import math
from dataclasses import dataclass, fields

from ..errors import InputError


@dataclass(frozen=True)
class Limits:
    """The limits of a service; each refusal names the one that was met.

    Attributes:
        body_bytes: of a request's body, counted while it comes in.
        pixels: of an uploaded picture, told from its header before any is decoded.
        n_neighbors: results that a request may ask for.
        seconds: from the first byte of the body to the answer.
        concurrency: requests that are worked on at the same time; one more is told to come back.
        batch: pictures that go through the network together.
        batch_seconds: how long a picture waits for others that are being read meanwhile.

    Raises:
        InputError: a limit that nothing could pass.
    """

    body_bytes: int = 20_000_000
    pixels: int = 25_000_000
    n_neighbors: int = 100
    seconds: float = 30.0
    concurrency: int = 16
    batch: int = 8
    batch_seconds: float = 0.005

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type is int
            kinds = int if whole else (int, float)
            least = 0 if field.name == "batch_seconds" else 1 if whole else 0.01
            fits = isinstance(value, kinds) and not isinstance(value, bool)
            if not fits or not least <= value < math.inf:
                kind = "a whole number" if whole else "a number"
                raise InputError(f"limit {field.name} = {value!r}; give {kind} of at least {least}")
