"""A finer map of a query: the picture shown to the network once more, larger, without a gradient.

Weights belong to channels and not to positions, so the weights that were transferred draw the
larger picture's activations too. No torch: the network is an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EmbedcamError, EmbeddingError, InputError, ran_out
from ..ops import resize
from ..preprocess import AnyPreprocess, Network, Preprocess

if TYPE_CHECKING:
    from PIL import Image

    from .opened import Opened

DETAILS = (1, 2)
"""How many times the side of its input a query may be shown at."""


def check_detail(detail: Any) -> int:
    """How often the side of the network's input a map is drawn at.

    Raises:
        InputError: neither 1 nor 2.
    """
    number = isinstance(detail, int | float | np.integer) and not isinstance(detail, bool)
    if not number or detail not in DETAILS:
        raise InputError(
            f"detail = {detail!r}; give 1, or 2 for a finer map from one more forward pass at "
            "twice the side"
        )
    return int(detail)


def refuse_by_position(opened: Opened) -> None:
    """Refuse a finer map where weights belong to positions of the network's own input size.

    Raises:
        InputError: they do.
    """
    if opened.by_position:
        raise InputError(
            "this index keeps weights by position, which a query shown larger does not have; leave "
            "out detail (--detail), or use an index of weights by channel, such as of 'gradcam'"
        )


def check_larger(larger: Sequence[Any], inputs: tuple[int, ...], detail: int) -> None:
    """Refuse inputs at twice the side that are not those of the queries.

    Args:
        larger: the inputs.
        inputs: shape of the queries' own, `(B, 3, H, W)`.
        detail: 1 or 2.

    Raises:
        InputError: of detail 1, another number of them, or another shape.
    """
    count, channels, height, width = inputs
    expected = (channels, 2 * height, 2 * width)
    found = [tuple(getattr(one, "shape", ())) for one in larger]
    if detail == 1:
        raise InputError("larger is of a finer map; give detail=2 with it, or leave it out")
    if found != [expected] * count:
        raise InputError(
            f"larger has the shapes {found[:3]}; expected {count} of {list(expected)}, the "
            "network's inputs at twice the side"
        )


def larger_input(
    picture: Image.Image | None, inputs: Any, preprocess: AnyPreprocess | None
) -> np.ndarray:
    """The network's input of a query at twice the side, float32 `[3 2H 2W]`.

    Args:
        picture: the query, upright; None where only the network's input is known.
        inputs: the network's input, `[3 H W]`, which is resized where the picture is not known, or
            its preparation is the caller's own and of one size.
        preprocess: how pictures are prepared.
    """
    if picture is not None and isinstance(preprocess, Preprocess):
        height, width = preprocess.size
        shorter = None if preprocess.resize_to is None else 2 * preprocess.resize_to
        twice = replace(preprocess, size=(2 * height, 2 * width), resize_to=shorter)
        return twice(picture)
    given = inputs if isinstance(inputs, np.ndarray) else inputs.detach().cpu().numpy()
    height, width = given.shape[-2:]
    return resize(given.astype(np.float32, copy=False), (2 * height, 2 * width))


class Finer:
    """Activations of inputs at twice the side, by one network; calls from any thread.

    A network of one input size sees the four quarters of each, laid side by side again; which size
    it refused is remembered, so that it is not tried for every query.
    """

    def __init__(self) -> None:
        self._refused: set[tuple[int, ...]] = set()

    def activations(
        self, network: Network, layers: Sequence[str], batch: np.ndarray
    ) -> list[np.ndarray]:
        """Of each layer, `[B K 2h 2w]`.

        Args:
            network: that embeds, the same in every call.
            layers: names, deepest first.
            batch: `[B 3 2H 2W]`, see `larger_input`.

        Raises:
            EmbedcamError: the network takes neither.
        """
        size = batch.shape[2:]
        if size not in self._refused:
            try:
                return _activations(network, layers, batch)
            except EmbedcamError as error:
                # Neither is about the size: quarters would hide the picture at fault, or fail too.
                if ran_out(error) or isinstance(error, EmbeddingError):
                    raise
        found = _of_quarters(network, layers, batch)
        self._refused.add(size)
        return found


def _of_quarters(network: Network, layers: Sequence[str], batch: np.ndarray) -> list[np.ndarray]:
    height, width = batch.shape[2:]
    rows, columns = (slice(0, height // 2), slice(height // 2, height)), (
        slice(0, width // 2), slice(width // 2, width)
    )  # fmt: skip
    parts = [[_activations(network, layers, np.ascontiguousarray(batch[:, :, y, x]))
              for x in columns] for y in rows]  # fmt: skip
    return [
        np.concatenate([np.concatenate([part[layer] for part in row], 3) for row in parts], 2)
        for layer in range(len(layers))
    ]


def _activations(network: Network, layers: Sequence[str], batch: np.ndarray) -> list[np.ndarray]:
    maps = network.embed(batch, layers).activations
    return [one.astype(np.float32, copy=False) for one in maps]
