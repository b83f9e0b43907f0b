"""From network inputs to maps: transferred by the index, and of any other weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import EmbedcamError, ran_out, reason
from ..explain.explainer import Explainer, Explanation
from ..images import MAX_PIXELS
from ..index import Index
from ..network import EmbeddingNetwork
from ..ops import area_average, drawn_and_signed, resize
from .settings import Clock, Settings


@dataclass(frozen=True)
class Seen:
    """What one forward pass of b inputs `[b 3 H W]` gave: embeddings `[b D]`, maps `[b K h w]`.

    activations: of each layer; size: (H, W) of the maps that are drawn.
    """

    inputs: np.ndarray
    embeddings: np.ndarray
    activations: list[np.ndarray]
    size: tuple[int, int]

    def row(self, place: int) -> "Seen":
        """One of them, still as a batch."""
        one = slice(place, place + 1)
        activations = [maps[one] for maps in self.activations]
        return Seen(self.inputs[one], self.embeddings[one], activations, self.size)

    def small(self) -> "Seen":
        """The same, for maps on the layer's own grid; of several layers the finest one's."""
        height, width = self.activations[-1].shape[-2:]
        return replace(self, size=(int(height), int(width)))


class Maps(NamedTuple):
    """Maps of b images: what is scored by contrast, and what is scored without."""

    drawn: np.ndarray
    """As a picture shows them, `[b H W]`, >= 0."""
    signed: np.ndarray
    """Before the ReLU, `[b H W]`."""

    @classmethod
    def of(cls, explained: Sequence[Explanation]) -> "Maps":
        """The maps of some explanations of one size."""
        return cls(
            np.stack([one.cam for one in explained]),
            np.stack([one.signed_cam for one in explained]),
        )


@dataclass(frozen=True)
class Questions:
    """What b maps are to show: for each query the images it is explained by.

    Attributes:
        seen: the queries.
        near: rows of the index, nearest first, `[b]` arrays.
        left_out: rows that show the query itself.
        labels: that are asked about, None where there is none.
        names: what is random hangs on.
    """

    seen: Seen
    near: Sequence[np.ndarray]
    left_out: Sequence[Sequence[int]]
    labels: Sequence[str | None]
    names: Sequence[str]


Way = Callable[[Questions], Maps]
"""A way of drawing."""


class Mapper:
    """Draws maps of an index, refusing a network that is not its own."""

    def __init__(
        self,
        index: Index,
        network: EmbeddingNetwork,
        settings: Settings,
        clock: Clock,
        images: Path | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.index, self.network, self.clock = index, network, clock
        self.explainer = Explainer(
            index,
            network,
            n_neighbors=settings.n_neighbors,
            transfer=settings.transfer,
            images=images,
            max_pixels=max_pixels,
        )
        self.layers = index.manifest.layer_names
        self.channels = [layer.channels for layer in index.manifest.layers]
        by_position = index.encoding().grid is not None
        kept = "the index keeps weights by position, for inputs of one size"
        self.squeezed = kept if by_position else ""
        """Why pairs are squeezed into the size of one picture; empty where they are not."""

    def see(self, inputs: Any, network: EmbeddingNetwork | None = None) -> Seen:
        """One forward pass of `[b 3 H W]`, by the index's network or another of its shape."""
        network = network or self.network
        with self.clock("forward"):
            if len(self.layers) == 1:
                features = network.forward(inputs)
                activations = [features.activations]
            else:
                features, activations = network.forward_layers(inputs, self.layers)
        size = (int(inputs.shape[-2]), int(inputs.shape[-1]))
        embeddings = _numpy(features.embedding)
        return Seen(np.asarray(inputs), embeddings, [_numpy(maps) for maps in activations], size)

    def see_pair(self, images: np.ndarray) -> Seen:
        """One forward pass of two inputs `[2 3 H W]` side by side.

        A network that takes one size only is shown both at half their width.
        """
        if not self.squeezed:
            wide = side_by_side(images)
            try:
                return self.see(wide)
            except EmbedcamError as error:
                if ran_out(error):
                    raise
                self.squeezed = (
                    f"the network takes no picture of {wide.shape[2]} x {wide.shape[3]} "
                    f"({reason(error)})"
                )
        return self.see(side_by_side(images, squeezed=True))

    def transferred(self, seen: Seen, rows: Sequence[np.ndarray]) -> list[Explanation]:
        """Each query explained by the images at some rows of the index, `[b]` arrays of rows."""
        return self.explained(seen, [self.index.ids[list(map(int, places))] for places in rows])

    def explained(self, seen: Seen, ids: Sequence[Sequence[str]]) -> list[Explanation]:
        """Each query explained by images of some ids."""
        with self.clock("explaining"):
            given: Any = seen.activations[0] if len(self.layers) == 1 else seen.activations
            found: list[Explanation] = self.explainer.explain_features(
                seen.embeddings, given, neighbors=ids, size=seen.size
            )
        return found

    def drawn(self, seen: Seen, weights: Sequence[np.ndarray]) -> Maps:
        """Maps of given weights, `[b K]` of each layer."""
        with self.clock("explaining"):
            maps, signed = drawn_and_signed(weights, seen.activations)
            return Maps(resize(maps, seen.size), resize(signed, seen.size))


def side_by_side(images: np.ndarray, squeezed: bool = False) -> np.ndarray:
    """Two inputs `[2 3 H W]` as one, `[1 3 H 2W]`.

    Args:
        images: the left one first.
        squeezed: into the size of one, `[1 3 H W]`: columns are averaged, to W // 2 on the left and
            the rest on the right, so that no column holds something of both.
    """
    halves = list(images)
    if squeezed:
        height, width = images.shape[-2:]
        sides = (width // 2, width - width // 2)
        halves = [area_average(one, (height, w)) for one, w in zip(images, sides, strict=True)]
    return np.concatenate(halves, axis=2)[None]


def _numpy(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.cpu().numpy()
    return found.astype(np.float32, copy=False)
