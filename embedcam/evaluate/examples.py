"""The best and the worst, as small pictures: read again at the end, so that none is kept before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import EmbedcamError
from ..preprocess import AnyPreprocess, Extent
from ..render import Row, Tile
from .controls import MEAN
from .maps import Questions
from .queries import chosen
from .settings import METHOD
from .work import Work

SIDE = 320
RESULTS = 3
TRUE_BOX = (0, 220, 255)
DASH = 6
_DARK = (20, 22, 28)


class Examples:
    """Draws some of the measured images again."""

    def __init__(self, work: Work) -> None:
        self.work = work
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
        for what, pasted in (("Two pictures", True), ("Two objects", False)):
            pairs = [row for row in asked if (row["second"] >= 0) == pasted and not row["empty"]]
            for end, row in _ends(pairs, lambda row: row["objects_auc"], count):
                title = f"{end} by the AUC of the object against the other"
                made = self._attempt(self._example, row)
                if made is not None:
                    shown.append(replace(made, title=f"{what}, {title}", compact=True))
        by, score = _score(rows)
        ranked = [
            {**row, "position": place} for place, row in rows.items() if score(row) is not None
        ]
        for end, row in _ends(ranked, score, count):
            made = self._attempt(self._example, row)
            if made is not None:
                shown.append(replace(made, title=f"One picture, {end} by {by}", compact=True))
        return shown

    def _attempt(self, draw: Any, *given: Any) -> Row | None:
        try:
            made: Row = draw(*given)
        except EmbedcamError:  # a file that has gone meanwhile is no reason to lose the numbers
            return None
        return made

    def grid(
        self, rows: Mapping[int, dict[str, Any]], asked: Sequence[dict[str, Any]]
    ) -> list[Row]:
        """A row for each of a few questions, drawn by lot, and a tile for each way of drawing.

        Of what was asked about two objects, in real pictures where there are any; else of images.
        """
        if not self.work.rivals or not self.settings.examples:
            return []
        columns = (METHOD, *self.work.rivals, MEAN)
        each = {(row["first"], row["second"], row["label"]): row for row in asked}
        boxed = [row for row in each.values() if row["second"] < 0]
        sampled = [
            {**row, "position": place}
            for place, row in rows.items()
            if any(f"{way}: empty" in row for way in self.work.rivals)
        ]
        pool = boxed or list(each.values()) or sampled
        places = chosen(len(pool), 2 * self.settings.examples, self.settings.seed)
        made = [self._attempt(self._compared, pool[place], columns) for place in places]
        return [row for row in made if row is not None]

    def _compared(self, row: dict[str, Any], columns: Sequence[str]) -> Row:
        shown = self._shown(row)
        maps = self.work.drawn(shown.asked)
        name = "objects_auc" if "first" in row else "auc"
        tiles = []
        for way in columns:
            score = row.get(name if way == METHOD else f"{way}: {name}")
            words = "" if score is None else f"pixel AUC {score:.2f}"
            tiles.append(Tile(shown.picture, maps[way].drawn[0], shown.extent, way, words))
        asked = f", asked for {row['label']}" if "first" in row else ""
        notes = "; ".join(shown.notes)
        return Row(tiles[0], tiles[1:], notes, f"{shown.name}{asked}", scale="each")

    def _example(self, row: dict[str, Any]) -> Row:
        """One picture with its map and what it was explained by."""
        shown = self._shown(row)
        explained = self.mapper.transferred(shown.asked.seen, shown.asked.near)[0]
        words, count = [], 1
        if "first" not in row:
            count = RESULTS
            words += [row["label"]] if row["label"] else []
            if row.get("energy") is not None:
                words.append(f"pixel AUC {row['auc']:.2f}, energy {row['energy']:.2f}")
            if row.get("insertion") is not None:
                words.append(f"insertion {row['insertion']:.2f}, deletion {row['deletion']:.2f}")
            if explained.empty:
                words.append("no positive evidence")
        else:
            words.append(f"AUC {row['objects_auc']:.2f}, share {row['share']:.2f}{shown.where}")
        tile = Tile(
            shown.picture,
            explained.cam,
            shown.extent,
            shown.name if "first" not in row else f"asked for {row['label']}",
            "\n".join([*words, *shown.notes]),
        )
        _, results = explained.tiles()
        return Row(tile, [_shrunk(one) for one in results[:count]])

    def _shown(self, row: dict[str, Any]) -> "_Shown":
        """What a row was measured on, read again."""
        result = [] if "first" not in row else [self.gallery.index.position(row["result"])]
        if row.get("second", -1) >= 0:
            return self._pair(row, result)
        position = row["first"] if result else row["position"]
        picture, item = self.source.open(position), self.source.items[position]
        seen, own = self.mapper.see(self.preprocess(picture)[None]), self.own.held([position])
        near = [np.array(result)]
        if not result:
            near = self.gallery.nearest(seen.embeddings, own, self.settings.n_neighbors)
        small = _small(picture)
        across, down = small.width / picture.width, small.height / picture.height
        boxes = self.regions.pixels(position, picture.size, row["label"] if result else None)
        for box in boxes:
            _outline(small, box, across, down)
        name = f"{item.id} {row['label']}" if result else item.id
        what = f"the true box{'es' * (len(boxes) > 1)}"
        return _Shown(
            small,
            _scaled(self.preprocess.extent(*picture.size), across, down),
            Questions(seen, near, [own.tolist()], [row["label"]], [name]),
            item.id.rpartition("/")[2],
            notes=[f"dashed: {row['label'] if result else what}"] if len(boxes) else [],
        )

    def _pair(self, row: dict[str, Any], result: list[int]) -> "_Shown":
        places = (row["first"], row["second"])
        pictures = [self.source.open(place) for place in places]
        seen = self.mapper.see_pair(np.stack([self.preprocess(one) for one in pictures]))
        height, width = seen.size
        scene = Image.new("RGB", (width, height))
        for number, one in enumerate(pictures):
            extent = self.preprocess.extent(*one.size)
            across = width // 2 if number == 0 else width - width // 2
            half = one.transform(
                (across, height), Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR
            )
            scene.paste(half, (number * (width // 2), 0))
        name = " | ".join(self.source.items[place].id for place in places)
        left_out = self.own.held(places).tolist()
        label, other = row["label"], self.source.items[places[1 - row["side"]]].label or ""
        asked = Questions(seen, [np.array(result)], [left_out], [label], [f"{name} {label}"])
        where = f", on the {('left', 'right')[row['side']]};\nbeside it {other}"
        return _Shown(scene, None, asked, name, where)


@dataclass
class _Shown:
    """A measured picture as it is shown: small, its true boxes on it, with what was asked of it."""

    picture: Image.Image
    extent: Extent | None
    asked: Questions
    name: str
    where: str = ""
    notes: Sequence[str] = ()


def _score(rows: Mapping[int, dict[str, Any]]) -> tuple[str, Any]:
    """What one-object pictures are ordered by: the signed map's AUC, else insertion - deletion."""
    if any(row.get("auc") is not None for row in rows.values()):
        return "pixel AUC", lambda row: row.get("auc")
    return (
        "insertion area less deletion area",
        lambda row: None if row.get("insertion") is None else row["insertion"] - row["deletion"],
    )


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
