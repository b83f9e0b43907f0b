"""Measured images as small pictures: read again at the end, so that none is kept before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
from PIL import Image, ImageDraw

from ..errors import EmbedcamError
from ..preprocess import Extent
from ..render import Row as PageRow
from ..render import Tile, shrunk
from ..render.overlay import scale_box
from .gallery import sample
from .maps import Questions
from .measures import MEAN, TRANSFERRED
from .work import Row, Rows, Work

SIDE, RESULTS, DASH = 320, 3, 6
TRUE_BOX, _DARK = (0, 220, 255), (20, 22, 28)
Score = Callable[[Row], float | None]


@dataclass
class _Shown:
    """A measured picture as it is shown: small, its true boxes on it, with what was asked of it."""

    picture: Image.Image
    extent: Extent | None
    asked: Questions
    name: str
    where: str = ""
    notes: Sequence[str] = ()


class Examples:
    """Draws some of the measured images again."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def choose(self, rows: Rows, asked: Sequence[Row]) -> list[PageRow]:
        """Draw the best and the worst by what tells most of what was measured."""
        pairs = [row for row in asked if not row["empty"]]
        kinds = [("Two pictures", [row for row in pairs if row["second"] >= 0])]
        kinds += [("Two objects", [row for row in pairs if row["second"] < 0])]
        by, score = "the AUC of the object against the other", lambda row: row.get("objects_auc")
        shown = self._ends(kinds, by, score)
        by, score = "pixel AUC", lambda row: row.get("auc")
        if not any(score(row) is not None for row in rows.values()):
            by, score = "insertion area less deletion area", _insertion_gain
        ranked = [{**row, "position": place} for place, row in rows.items()]
        return shown + self._ends([("One picture", ranked)], by, score)

    def grid(self, rows: Rows, asked: Sequence[Row]) -> list[PageRow]:
        """Draw a tile for each method of a few questions by lot, rather of two objects."""
        rivals, settings = self.work.rivals, self.work.settings
        if not rivals or not settings.examples:
            return []
        each = {(row["first"], row["second"], row["label"]): row for row in asked}
        boxed = [row for row in each.values() if row["second"] < 0]
        sampled = [
            {**row, "position": place}
            for place, row in rows.items()
            if any(f"{method}: empty" in row for method in rivals)
        ]
        pool = boxed or list(each.values()) or sampled
        places = sample(len(pool), 2 * settings.examples, settings.seed)
        drawn = [self._attempt(self._compared, pool[place]) for place in places]
        return [row for row in drawn if row is not None]

    def _ends(self, kinds: Sequence[tuple[str, list[Row]]], by: str, score: Score) -> list[PageRow]:
        count, shown = self.work.settings.examples, []
        for kind, rows in kinds:
            scores = {place: score(row) for place, row in enumerate(rows)}
            known = {place: value for place, value in scores.items() if value is not None}
            order = sorted(known, key=lambda place: -known[place])
            best = order[:count]
            worst = [place for place in order[::-1][:count] if place not in best]
            for number, pair in enumerate(zip_longest(best, worst), 1):
                for end, place in zip(("best", "worst"), pair, strict=True):
                    row = None if place is None else self._attempt(self._example, rows[place])
                    if row is not None:
                        title = f"{kind}, {end if count == 1 else f'{end} {number}'} by {by}"
                        shown.append(replace(row, title=title, compact=True))
        return shown

    def _attempt(self, draw: Callable[[Row], PageRow], row: Row) -> PageRow | None:
        try:
            return draw(row)
        except EmbedcamError:  # a file that has gone meanwhile is no reason to lose the numbers
            return None

    def _compared(self, row: Row) -> PageRow:
        shown, about = self._shown(row), "first" in row
        maps = self.work.draw(shown.asked)
        name = "objects_auc" if about else "auc"
        tiles = []
        for method in (TRANSFERRED, *self.work.rivals, MEAN):
            score = row.get(name if method == TRANSFERRED else f"{method}: {name}")
            words = "" if score is None else f"pixel AUC {score:.2f}"
            drawn = maps[method].drawn[0]
            tiles.append(Tile(shown.picture, drawn, shown.extent, method, words))
        title = shown.name + (f", asked for {row['label']}" if about else "")
        return PageRow(tiles[0], tiles[1:], "; ".join(shown.notes), title, scale="each")

    def _example(self, row: Row) -> PageRow:
        shown, about = self._shown(row), "first" in row
        explained = self.work.mapper.transferred(shown.asked.seen, shown.asked.near)[0]
        words = []
        if about:
            words.append(f"AUC {row['objects_auc']:.2f}, share {row['share']:.2f}{shown.where}")
        else:
            words += [row["label"]] if row["label"] else []
            if row.get("energy") is not None:
                words.append(f"pixel AUC {row['auc']:.2f}, energy {row['energy']:.2f}")
            if row.get("insertion") is not None:
                words.append(f"insertion {row['insertion']:.2f}, deletion {row['deletion']:.2f}")
            if explained.empty:
                words.append("no positive evidence")
        caption = f"asked for {row['label']}" if about else shown.name
        subcaption = "\n".join([*words, *shown.notes])
        tile = Tile(shown.picture, explained.cam, shown.extent, caption, subcaption)
        _, results = explained.tiles()
        return PageRow(tile, [_shrunk(one) for one in results[: 1 if about else RESULTS]])

    def _shown(self, row: Row) -> _Shown:
        work, about = self.work, "first" in row
        near = [np.array([work.mapper.index.position(row["result"])] if about else [])]
        if row.get("second", -1) >= 0:
            return self._pair(row, near)
        position = row["first"] if about else row["position"]
        picture, item = work.source.open(position), work.source.items[position]
        seen = work.mapper.see(work.preprocess(picture)[None])
        own = work.own_rows.known([position])
        if not about:
            near = work.gallery.nearest(seen.embeddings, own, work.settings.n_neighbors)
        boxes = work.regions.pixels(position, picture.size, row["label"] if about else None)
        extent = work.preprocess.extent(*picture.size)
        tile = _shrunk(Tile(picture, extent=extent))
        small = (tile.image or picture).copy()
        for box in boxes:
            _outline(small, scale_box(box, picture.size, small.size))
        what = row["label"] if about else f"the true box{'es' * (len(boxes) > 1)}"
        name = f"{item.id} {row['label']}" if about else item.id
        return _Shown(
            small,
            tile.extent,
            Questions(seen, near, [own.tolist()], [row["label"]], [name]),
            item.id.rpartition("/")[2],
            notes=[f"dashed: {what}"] if boxes else [],
        )

    def _pair(self, row: Row, near: list[np.ndarray]) -> _Shown:
        work, places = self.work, (row["first"], row["second"])
        pictures = [work.source.open(place) for place in places]
        seen = work.mapper.see_pair(np.stack([work.preprocess(one) for one in pictures]))
        height, width = seen.size
        scene = Image.new("RGB", (width, height))
        for number, one in enumerate(pictures):
            extent = work.preprocess.extent(*one.size)
            size = (width // 2 if number == 0 else width - width // 2, height)
            half = one.transform(size, Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR)
            scene.paste(half, (number * (width // 2), 0))
        name = " | ".join(work.source.items[place].id for place in places)
        left_out = work.own_rows.known(places).tolist()
        label, other = row["label"], work.source.items[places[1 - row["side"]]].label or ""
        asked = Questions(seen, near, [left_out], [label], [f"{name} {label}"])
        where = f", on the {('left', 'right')[row['side']]};\nbeside it {other}"
        return _Shown(scene, None, asked, name, where)


def _insertion_gain(row: Row) -> float | None:
    if row.get("insertion") is None:
        return None
    return float(row["insertion"] - row["deletion"])


def _shrunk(tile: Tile) -> Tile:
    return tile if tile.image is None else shrunk(tile, min(SIDE, max(tile.image.size)))


def _outline(picture: Image.Image, box: Extent) -> None:
    x0, y0, x1, y1 = (round(edge) for edge in box)
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
