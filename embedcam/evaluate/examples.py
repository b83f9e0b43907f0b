"""The best and the worst, as small pictures: read again at the end, so that none is kept before."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import EmbedcamError
from ..preprocess import AnyPreprocess
from ..render import Row, Tile
from .work import Work

SIDE = 320
RESULTS = 3
TRUE_BOX = (0, 220, 255)
DASH = 6
_DARK = (20, 22, 28)


class Examples:
    """Draws some of the measured images again."""

    def __init__(self, work: Work) -> None:
        self.mapper, self.gallery, self.regions = work.mapper, work.gallery, work.regions
        self.source, self.own, self.settings = work.reader.source, work.own, work.settings
        self.preprocess: AnyPreprocess = work.reader.preprocess

    def choose(
        self,
        rows: Mapping[int, dict[str, Any]],
        asked: Sequence[dict[str, Any]],
    ) -> list[Row]:
        """The best and the worst by what tells most of what was measured."""
        count = self.settings.examples
        if not count:
            return []
        shown = []
        for what, draw, pasted in (
            ("Two pictures", self._scene, True),
            ("Two objects", self._boxed, False),
        ):
            pairs = [row for row in asked if (row["second"] >= 0) == pasted and not row["empty"]]
            for end, row in _ends(pairs, lambda row: row["share"], count):
                title = f"{end} by the share on the right object"
                made = self._attempt(draw, row)
                if made is not None:
                    shown.append(replace(made, title=f"{what}, {title}", compact=True))
        by, score = _score(rows)
        ranked = [
            {**row, "position": place} for place, row in rows.items() if score(row) is not None
        ]
        for end, row in _ends(ranked, score, count):
            made = self._attempt(self._query, row)
            if made is not None:
                shown.append(replace(made, title=f"One picture, {end} by {by}", compact=True))
        return shown

    def _attempt(self, draw: Any, *given: Any) -> Row | None:
        try:
            made: Row = draw(*given)
        except EmbedcamError:  # a file that has gone meanwhile is no reason to lose the numbers
            return None
        return made

    def _query(self, row: dict[str, Any]) -> Row:
        position = row["position"]
        picture = self.source.open(position)
        seen = self.mapper.see(self.preprocess(picture)[None])
        own = self.own.held([position])
        near = self.gallery.nearest(seen.embeddings, own, self.settings.n_neighbors)
        explained = self.mapper.transferred(seen, near)[0]
        words = []
        if row.get("energy") is not None:
            words.append(f"energy inside {row['energy']:.2f}, area {row['area']:.2f}")
        if row.get("insertion") is not None:
            words.append(f"insertion {row['insertion']:.2f}, deletion {row['deletion']:.2f}")
        if explained.empty:
            words.append("no positive evidence")
        label = [row["label"]] if row["label"] else []
        tile = self._tile(position, picture, explained.cam, "\n".join([*label, *words]))
        _, results = explained.tiles()
        return Row(tile, [_shrunk(one) for one in results[:RESULTS]])

    def _scene(self, row: dict[str, Any]) -> Row:
        places = (row["first"], row["second"])
        pictures = [self.source.open(place) for place in places]
        seen = self.mapper.see_pair(np.stack([self.preprocess(one) for one in pictures]))
        result = self.gallery.index.position(row["result"])
        explained = self.mapper.transferred(seen, [np.array([result])])[0]
        height, width = seen.size
        scene = Image.new("RGB", (width, height))
        for number, one in enumerate(pictures):
            extent = self.preprocess.extent(*one.size)
            across = width // 2 if number == 0 else width - width // 2
            half = one.transform(
                (across, height), Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR
            )
            scene.paste(half, (number * (width // 2), 0))
        side = ("left", "right")[row["side"]]
        labels = [self.source.items[place].label or "" for place in places]
        tile = Tile(
            scene,
            explained.cam,
            None,
            f"asked for {row['label']}",
            f"share {row['share']:.2f}, on the {side};\nbeside it {labels[1 - row['side']]}",
        )
        _, results = explained.tiles()
        return Row(tile, [_shrunk(one) for one in results[:1]])

    def _boxed(self, row: dict[str, Any]) -> Row:
        position = row["first"]
        picture = self.source.open(position)
        seen = self.mapper.see(self.preprocess(picture)[None])
        result = self.gallery.index.position(row["result"])
        explained = self.mapper.transferred(seen, [np.array([result])])[0]
        words = f"asked for {row['label']}:\nshare {row['share']:.2f}"
        tile = self._tile(position, picture, explained.cam, words)
        _, results = explained.tiles()
        return Row(tile, [_shrunk(one) for one in results[:1]])

    def _tile(self, position: int, picture: Image.Image, drawn: np.ndarray, words: str) -> Tile:
        """A query picture, small, with its map and its boxes."""
        small = _small(picture)
        across, down = small.width / picture.width, small.height / picture.height
        boxes = self.regions.pixels(position, picture.size)
        for box in boxes:
            _outline(small, box, across, down)
        if len(boxes):
            words += "\ndashed: the true box" + ("" if len(boxes) == 1 else "es")
        extent = _scaled(self.preprocess.extent(*picture.size), across, down)
        return Tile(small, drawn, extent, self.source.items[position].id.rpartition("/")[2], words)


def _score(rows: Mapping[int, dict[str, Any]]) -> tuple[str, Any]:
    """What one-object pictures are ordered by: energy above chance, else insertion - deletion."""

    def less(more: str, chance: str) -> Any:
        return lambda row: None if row.get(more) is None else row[more] - row[chance]

    if any(row.get("energy") is not None for row in rows.values()):
        return "energy inside less the object's area", less("energy", "area")
    return "insertion area less deletion area", less("insertion", "deletion")


def _ends(rows: Sequence[dict[str, Any]], score: Any, count: int) -> list[tuple[str, Any]]:
    """The best beside the worst, each once; of few rows the best are taken first."""
    order = sorted(range(len(rows)), key=lambda place: -score(rows[place]))
    best = order[:count]
    worst = [place for place in order[::-1][:count] if place not in best]
    return [
        (what if count == 1 else f"{what} {number}", rows[place])
        for number, pair in enumerate(zip_longest(best, worst), 1)
        for what, place in zip(("best", "worst"), pair, strict=True)
        if place is not None
    ]


def _small(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return small


def _shrunk(tile: Tile) -> Tile:
    """A tile whose picture is small, its extent with it."""
    if tile.image is None:
        return tile
    small = _small(tile.image)
    across, down = small.width / tile.image.width, small.height / tile.image.height
    extent = None if tile.extent is None else _scaled(tile.extent, across, down)
    return replace(tile, image=small, extent=extent)


def _scaled(extent: Sequence[float], across: float, down: float) -> Any:
    return (extent[0] * across, extent[1] * down, extent[2] * across, extent[3] * down)


def _outline(picture: Image.Image, box: Sequence[float], across: float, down: float) -> None:
    """A box, dashed in a colour no map has, so that it is not taken for the crop's frame."""
    x0, y0, x1, y1 = (round(edge) for edge in _scaled(box, across, down))
    if x1 - x0 < 4 or y1 - y0 < 4:
        return
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_DARK, width=3)
    for start in range(x0, x1, 2 * DASH):
        for y in (y0 + 1, y1 - 2):
            draw.line((start, y, min(start + DASH, x1) - 1, y), TRUE_BOX, 2)
    for start in range(y0, y1, 2 * DASH):
        for x in (x0 + 1, x1 - 2):
            draw.line((x, start, x, min(start + DASH, y1) - 1), TRUE_BOX, 2)
