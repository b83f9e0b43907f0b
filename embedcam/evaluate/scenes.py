"""Telling objects apart: where in a picture of two objects is what a given result shows?

A picture of one object hardly tells an explanation from a saliency map. In one of two a map that
ignores the question scores exactly one half, as both objects are asked about in turn.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..cam import area_average
from ..errors import EmbedcamError, EmbeddingError, InputError
from ..images import ImageSource, load_batches
from ..memory import ran_out
from ..printing import reason
from .controls import MEAN, RANDOM, WRONG, mean_weights, random_weights
from .gallery import Gallery
from .maps import Mapper, Maps, Seen
from .measures import shares, told_apart
from .queries import generator
from .settings import METHOD, Settings

LEAST = 0.02
"""Share of a picture that an object needs alone to be asked about."""


class NoScenesError(InputError):
    """Two pictures cannot be put side by side, and why."""


class Scenes:
    """Asks about pictures of two objects with the weights of one result at a time."""

    def __init__(self, mapper: Mapper, gallery: Gallery, settings: Settings) -> None:
        self.mapper, self.gallery, self.settings = mapper, gallery, settings
        self.squeezed = ""
        """Why pairs are squeezed into the size of one picture; empty where they are not."""

    def ask(
        self, seen: Seen, label: str, left_out: list[int], name: str
    ) -> tuple[int, dict[str, Maps]] | None:
        """The map of one picture for a label: by its nearest image of that label in the index.

        Args:
            seen: one picture, as a batch.
            label: asked about.
            left_out: rows of the index that the picture itself shows.
            name: of the picture, for what is random.

        Returns:
            The result's row, and the map `[1 H W]` by each way; None where no image has the label.
            The mean activation is always among them.
        """
        gallery = self.gallery
        rows = gallery.of_label(label)
        rows = rows[~np.isin(rows, left_out)]
        if not len(rows):
            return None
        vectors = gallery.index.embeddings(rows).astype(np.float64)
        nearness = vectors @ seen.embeddings[0].astype(np.float64)
        if gallery.index.metric == "l2":
            nearness = 2 * nearness - (vectors**2).sum(1)
        result = int(rows[int(nearness.argmax())])
        channels, seed = self.mapper.channels, self.settings.seed
        maps = {
            METHOD: Maps.of(self.mapper.transferred(seen, [np.array([result])])),
            MEAN: self.mapper.drawn(seen, mean_weights(channels)),
        }
        if self.settings.controls:
            drawn = random_weights(channels, seed, f"{name} {label}")
            maps[RANDOM] = self.mapper.drawn(seen, drawn)
            others = gallery.positions[gallery.codes != gallery.code(label)]
            others = others[~np.isin(others, left_out)]
            if len(others):
                wrong = generator(seed, "wrong", name, label).choice(others, 1)
                maps[WRONG] = Maps.of(self.mapper.transferred(seen, [wrong]))
        return result, maps

    def record(
        self, asked: dict[str, Any], maps: dict[str, Maps], own: np.ndarray, other: np.ndarray
    ) -> dict[str, Any]:
        """One question's numbers, those of controls under their names."""
        with self.mapper.clock("metrics"):
            row = dict(asked)
            for way, found in maps.items():
                prefix = "" if way == METHOD else f"{way}: "
                numbers = told_apart(found, own, other)
                row |= {f"{prefix}{name}": value for name, value in numbers.items()}
            row["share_chance"] = shares(np.zeros_like(own), own, other)[2]
            row["right_chance"] = 0.5
            row["empty"] = not maps[METHOD].drawn.any()
        return row

    def of_boxes(
        self, seen: Seen, by_label: dict[str, np.ndarray], own: int, position: int, name: str
    ) -> Iterator[dict[str, Any]]:
        """Every ordered pair of labels that the boxes of one picture name and the index knows.

        Pixels that belong to one of the two alone are compared, where each has at least `LEAST` of
        the picture.
        """
        known = [label for label in by_label if len(self.gallery.of_label(label))]
        for label in known:
            mine = by_label[label]
            others = [
                theirs
                for theirs in (by_label[other] for other in known if other != label)
                if min((mine * (1 - theirs)).mean(), (theirs * (1 - mine)).mean()) >= LEAST
            ]
            asked = self.ask(seen, label, [own], name) if others else None
            if asked is None:
                continue
            result, maps = asked
            row = {
                "first": position,
                "second": -1,
                "side": -1,
                "label": label,
                "result": self.gallery.index.ids[result],
            }
            for theirs in others:
                yield self.record(row, maps, mine, theirs)

    def pasted(
        self, source: ImageSource, positions: np.ndarray, own: Any, on_unreadable: Any, tick: Any
    ) -> Iterator[dict[str, Any]]:
        """Pairs of pictures of different labels side by side, each at the network's input size.

        A network that takes one size only is shown both at half their width.

        Args:
            source: of the queries.
            positions: among which pairs are drawn.
            own: `OwnPositions` of them.
            on_unreadable: "fail" or "skip".
            tick: called with 1 after each scene.

        Raises:
            NoScenesError: no two labels that the index knows.
        """
        pairs = self._pairs(source, positions)
        preprocess = self.mapper.network.preprocess
        for first, second in pairs:
            (batch,) = load_batches(
                source, [first, second], preprocess, 2, workers=0, on_error=on_unreadable
            )
            tick(1)
            if len(batch) < 2:
                continue
            name = f"{source.items[first].id} | {source.items[second].id}"
            try:
                seen = self.see(batch.images)
            except EmbeddingError as error:
                if on_unreadable == "fail":
                    raise error.of_one(name) from None
                continue
            unsure = own.unsure([first, second])
            singles = self.mapper.see(batch.images).embeddings if unsure else None
            left_out = [int(row) for row in own.of([first, second], singles)]
            height, width = seen.size
            left = np.zeros((height, width))
            left[:, : width // 2] = 1
            for side, half in enumerate((left, 1 - left)):
                label = source.items[(first, second)[side]].label
                assert label is not None
                asked = self.ask(seen, label, left_out, name)
                if asked is None:
                    continue
                result, maps = asked
                row: dict[str, Any] = {
                    "first": first,
                    "second": second,
                    "side": side,
                    "label": label,
                    "result": self.gallery.index.ids[result],
                }
                yield self.record(row, maps, half, 1 - half)

    def see(self, images: np.ndarray) -> Seen:
        """One forward pass of two inputs `[2 3 H W]` side by side."""
        if self.mapper.index.encoding().grid is not None:
            self.squeezed = "the index keeps weights by position, for inputs of one size"
        if not self.squeezed:
            wide = side_by_side(images)
            try:
                return self.mapper.see(wide)
            except EmbedcamError as error:
                if ran_out(error):
                    raise
                self.squeezed = (
                    f"the network takes no picture of {wide.shape[2]} x {wide.shape[3]} "
                    f"({reason(error)})"
                )
        return self.mapper.see(side_by_side(images, squeezed=True))

    def _pairs(self, source: ImageSource, positions: np.ndarray) -> list[tuple[int, int]]:
        """Seeded pairs of different labels that the index knows."""
        labels = [source.items[place].label for place in positions.tolist()]
        codes = np.array([self.gallery.code(label) for label in labels])
        usable, codes = positions[codes >= 0], codes[codes >= 0]
        if len(np.unique(codes)) < 2:
            raise NoScenesError(
                "pairs of pictures need two labels that the index knows, too"
                if any(label is not None for label in labels)
                else "pairs of pictures need labels, and the images have none"
            )
        drawn = generator(self.settings.seed, "scenes")
        pairs = []
        for _ in range(self.settings.scenes):
            a = int(drawn.integers(len(usable)))
            b = int(drawn.choice(np.flatnonzero(codes != codes[a])))
            pairs.append((int(usable[a]), int(usable[b])))
        return pairs


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
