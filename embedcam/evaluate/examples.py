"""Measured images as small pictures: read again at the end, so that none is kept before."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from operator import itemgetter

import numpy as np
from PIL import Image, ImageDraw

from ..errors import EmbedcamError
from ..preprocess import Extent
from ..render import Row as PageRow
from ..render import Tile, shrunk
from ..render.overlay import scale_box
from .gallery import sample
from .maps import Question, Questions
from .measures import MEAN, TRANSFERRED
from .settings import Record
from .work import Rows, Work

SIDE, RESULTS, DASH = 320, 3, 6
TRUE_BOX, _DARK = (0, 220, 255), (20, 22, 28)
SCORES: dict[str, Callable[[Record], float | None]] = {
    "the AUC of the object against the other": lambda row: row.get("objects_auc"),
    "pixel AUC": lambda row: row.get("auc"),
    "insertion area less deletion area": lambda row: (
        None if row.get("insertion") is None else row["insertion"] - row["deletion"]
    ),
}
"""What rows are ordered by: the first that any of them has."""
_Shown = tuple[Tile, Questions, str, str]
"""A picture, small, its true boxes on it; what was asked of it; where the object is; a note."""


class Examples:
    """Draws some of the measured images again."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._positions = {item.id: place for place, item in enumerate(work.source.items)}

    def choose(self, rows: Rows, asked: Sequence[Record]) -> list[PageRow]:
        """Draw the best and the worst by what tells most of what was measured."""
        pairs = [row for row in asked if not row["empty"]]
        kinds: dict[str, Iterable[Record]] = {
            "Two pictures": (row for row in pairs if row["second"] >= 0),
            "Two objects": (row for row in pairs if row["second"] < 0),
            "One picture": rows.values(),
        }
        return [row for kind, some in kinds.items() for row in self._ends(kind, list(some))]

    def grid(self, rows: Rows, asked: Sequence[Record]) -> list[PageRow]:
        """Draw a tile for each method of a few questions by lot, rather of two objects."""
        rivals, settings = self.work.rivals, self.work.settings
        if not rivals or not settings.examples:
            return []
        each = {(row["first"], row["second"], row["label"]): row for row in asked}
        boxed = [row for row in each.values() if row["second"] < 0]
        sampled = [row for row in rows.values() if any(f"{name}: empty" in row for name in rivals)]
        pool = boxed or list(each.values()) or sampled
        places = sample(len(pool), 2 * settings.examples, settings.seed)
        return [row for place in places for row in self._attempt(self._compared, pool[place])]

    def _ends(self, kind: str, rows: Sequence[Record]) -> Iterator[PageRow]:
        count = self.work.settings.examples
        for by, score in SCORES.items():
            scored = [(value, row) for row in rows if (value := score(row)) is not None]
            order = [row for _, row in sorted(scored, key=itemgetter(0), reverse=True)]
            ends = order[:count], order[max(count, len(order) - count) :][::-1]
            for number, pair in enumerate(zip_longest(*ends), 1):
                for end, row in zip(("best", "worst"), pair, strict=True):
                    title = f"{kind}, {end if count == 1 else f'{end} {number}'} by {by}"
                    shown = [] if row is None else self._attempt(self._example, row)
                    yield from (replace(one, title=title, compact=True) for one in shown)
            if order:
                return

    def _attempt(self, draw: Callable[[Record], PageRow], row: Record) -> list[PageRow]:
        try:
            return [draw(row)]
        except EmbedcamError:  # a file that has gone meanwhile is no reason to lose the numbers
            return []

    def _compared(self, row: Record) -> PageRow:
        about = "first" in row
        tile, asked, _, note = self._shown(row)
        maps = self.work.draw(asked)
        name = "objects_auc" if about else "auc"
        tiles = []
        for method in (TRANSFERRED, *self.work.rivals, MEAN):
            score = row.get(name if method == TRANSFERRED else f"{method}: {name}")
            words = "" if score is None else f"pixel AUC {score:.2f}"
            tiles.append(Tile(tile.image, maps[method].drawn[0], tile.extent, method, words))
        title = tile.caption + (f", asked for {row['label']}" if about else "")
        return PageRow(tiles[0], tiles[1:], note, title, scale="each")

    def _example(self, row: Record) -> PageRow:
        about = "first" in row
        tile, asked, where, note = self._shown(row)
        explained = self.work.mapper.transferred(asked.seen, asked.near)[0]
        words = [row["label"] or ""]
        if about:
            tile.caption = f"asked for {row['label']}"
            words = [f"AUC {row['objects_auc']:.2f}, share {row['share']:.2f}{where}"]
        else:
            if row.get("energy") is not None:
                words.append(f"pixel AUC {row['auc']:.2f}, energy {row['energy']:.2f}")
            if row.get("insertion") is not None:
                words.append(f"insertion {row['insertion']:.2f}, deletion {row['deletion']:.2f}")
            if explained.empty:
                words.append("no positive evidence")
        text = "\n".join(filter(None, [*words, note]))
        query = Tile(tile.image, explained.cam, tile.extent, tile.caption, text)
        _, results = explained.tiles()
        return PageRow(query, [_shrunk(one) for one in results[: 1 if about else RESULTS]])

    def _shown(self, row: Record) -> _Shown:
        work, about = self.work, "first" in row
        near = [np.array([work.mapper.index.position(row["result"])] if about else [])]
        if row.get("second", -1) >= 0:
            return self._pair(row, near)
        position = row["first"] if about else self._positions[row["id"]]
        picture, item = work.source.open(position), work.source.items[position]
        seen = work.mapper.see(work.preprocess(picture)[None])
        own = work.own_rows.known([position])
        if not about:
            near = work.gallery.nearest(seen.embeddings, own, work.settings.n_neighbors)
        boxes = work.regions.pixels(position, picture.size, row["label"] if about else None)
        tile = _shrunk(Tile(picture, extent=work.preprocess.extent(*picture.size)))
        tile.caption = f"{item.id} {row['label']}" if about else item.id
        asked = Questions(seen, [Question(near[0], own.tolist(), row["label"], tile.caption)])
        tile.caption = item.id.rpartition("/")[2]
        tile.image = small = (tile.image or picture).copy()
        for box in boxes:
            _outline(small, scale_box(box, picture.size, small.size))
        what = row["label"] if about else f"the true box{'es' * (len(boxes) > 1)}"
        return tile, asked, "", f"dashed: {what}" if boxes else ""

    def _pair(self, row: Record, near: list[np.ndarray]) -> _Shown:
        work, places = self.work, (row["first"], row["second"])
        pictures = [work.source.open(place) for place in places]
        seen = work.mapper.see_pair(np.stack([work.preprocess(one) for one in pictures]))
        height, width = seen.size
        scene = Image.new("RGB", (width, height))
        for left, one in zip((0, width // 2), pictures, strict=True):
            extent = work.preprocess.extent(*one.size)
            size = ((width + 1) // 2 if left else width // 2, height)
            half = one.transform(size, Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR)
            scene.paste(half, (left, 0))
        (name, left_out), label = work.of_pictures(row), row["label"]
        asked = Questions(seen, [Question(near[0], left_out, label, f"{name} {label}")])
        other = work.source.items[places[1 - row["side"]]].label or ""
        where = f", on the {('left', 'right')[row['side']]};\nbeside it {other}"
        return Tile(scene, caption=name), asked, where, ""


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
