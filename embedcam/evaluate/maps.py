"""From network inputs to maps: transferred by the index, and of any other weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..errors import EmbedcamError, ran_out, reason
from ..explain.explainer import Explainer, Explanation
from ..network import EmbeddingNetwork
from ..ops import area_average, drawn_and_signed, resize
from .measures import Clock, Maps


@dataclass(frozen=True)
class Seen:
    """One forward pass of b inputs `[b 3 H W]`, and the size (H, W) of maps drawn from it."""

    inputs: np.ndarray
    embeddings: np.ndarray
    activations: list[np.ndarray]
    size: tuple[int, int]

    def row(self, place: int) -> "Seen":
        """Return one of them, still as a batch."""
        one = slice(place, place + 1)
        activations = [maps[one] for maps in self.activations]
        return Seen(self.inputs[one], self.embeddings[one], activations, self.size)

    def small(self) -> "Seen":
        """Return the same for maps on the layer's own grid; of several layers the finest one's."""
        height, width = self.activations[-1].shape[-2:]
        return replace(self, size=(height, width))


class Question(NamedTuple):
    """What one map is to show: the rows of the index that the query is explained by.

    left_out: rows that show the query itself; name: what is random hangs on it.
    """

    near: np.ndarray
    left_out: Sequence[int]
    label: str | None
    name: str


class Questions(NamedTuple):
    """What b maps are to show, a question a query."""

    seen: Seen
    each: Sequence[Question]

    @property
    def near(self) -> list[np.ndarray]:
        """Return the rows of each question."""
        return [one.near for one in self.each]


Draw = Callable[[Questions], Maps]


class Mapper:
    """Draws maps of an index."""

    def __init__(self, explainer: Explainer, network: EmbeddingNetwork, clock: Clock) -> None:
        self.explainer, self.network, self.clock = explainer, network, clock
        self.index = index = explainer.index
        self.layers = index.manifest.layer_names
        self.channels = [layer.channels for layer in index.manifest.layers]
        # Why pairs are squeezed into the size of one picture; empty where they are not.
        self.squeezed = ""
        if index.encoding().grid is not None:
            self.squeezed = "the index keeps weights by position, for inputs of one size"

    def see(self, inputs: np.ndarray, network: EmbeddingNetwork | None = None) -> Seen:
        """Run `[b 3 H W]` through the index's network or another of its shape."""
        layers = self.layers if len(self.layers) > 1 else None
        with self.clock("forward"):
            found = (network or self.network).embed(inputs, layers)
        embeddings, *maps = (
            one.astype(np.float32, copy=False) for one in (found.embedding, *found.activations)
        )
        return Seen(inputs, embeddings, maps, (inputs.shape[-2], inputs.shape[-1]))

    def see_pair(self, images: np.ndarray) -> Seen:
        """Run two inputs `[2 3 H W]` side by side; both at half their width where it must be."""
        if not self.squeezed:
            wide = np.concatenate([*images], axis=2)[None]
            try:
                return self.see(wide)
            except EmbedcamError as error:
                if ran_out(error):
                    raise
                size = f"{wide.shape[2]} x {wide.shape[3]}"
                self.squeezed = f"the network takes no picture of {size} ({reason(error)})"
        height, width = images.shape[-2:]
        sides = (width // 2, width - width // 2)
        halves = [area_average(one, (height, w)) for one, w in zip(images, sides, strict=True)]
        return self.see(np.concatenate(halves, axis=2)[None])

    def transferred(self, seen: Seen, rows: Sequence[np.ndarray]) -> list[Explanation]:
        """Explain each query by the images at some rows of the index, b arrays of rows."""
        return self.explained(seen, [self.index.ids[places.tolist()] for places in rows])

    def explained(self, seen: Seen, ids: Sequence[Sequence[str]]) -> list[Explanation]:
        """Explain each query by images of some ids."""
        several = seen.activations[0] if len(self.layers) == 1 else seen.activations
        with self.clock("explaining"):
            return self.explainer.explain_features(
                seen.embeddings, several, neighbors=ids, size=seen.size
            )

    def maps(self, seen: Seen, rows: Sequence[np.ndarray]) -> Maps:
        """Return the maps of each query by the images at some rows."""
        return maps_of(self.transferred(seen, rows))

    def draw(self, seen: Seen, weights: Sequence[np.ndarray]) -> Maps:
        """Draw the maps of weights `[b K]` of each layer."""
        with self.clock("explaining"):
            drawn, signed = drawn_and_signed(weights, seen.activations)
            return Maps(resize(drawn, seen.size), resize(signed, seen.size))


def maps_of(explained: Sequence[Explanation]) -> Maps:
    """Return the maps of explanations of one size."""
    drawn, signed = ([one.cam for one in explained], [one.signed_cam for one in explained])
    return Maps(np.stack(drawn), np.stack(signed))
