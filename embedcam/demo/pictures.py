"""The pictures of the demonstration: one PNG panel and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..explain.explainer import Explainer, Explanation
from ..render import Row, Table, Tile, overlay, page
from .scene_files import SceneFile

_SIDE, _GAP, _MARGIN, _ROUND = 208, 14, 36, 10
_INK, _QUIET, _ACCENT = (24, 28, 36), (98, 106, 120), (196, 60, 24)


@dataclass(frozen=True)
class Single:
    """A held-out query and its explanation by its nearest images."""

    file: SceneFile
    why: Explanation


@dataclass(frozen=True)
class Double:
    """A two-digit scene, and for each of its digits a result and why that result came back."""

    file: SceneFile
    whys: tuple[Explanation, Explanation]


def explain_singles(explainer: Explainer, files: Sequence[SceneFile]) -> list[Single]:
    """The main job on files: each query by its four nearest images."""
    found = explainer.explain_batch([file.path for file in files], n_neighbors=4)
    return [Single(file, why) for file, why in zip(files, found, strict=True)]


def explain_doubles(
    explainer: Explainer, files: Sequence[SceneFile], results: Sequence[Sequence[str]]
) -> list[Double]:
    """Each scene twice: by the given result of its left digit, and of its right one."""
    made = []
    for file, ids in zip(files, results, strict=True):
        left, right = (explainer.explain(file.path, neighbors=[name]) for name in ids)
        made.append(Double(file, (left, right)))
    return made


def panel_picture(singles: Sequence[Single], doubles: Sequence[Double]) -> Image.Image:
    """Five columns: two-digit scenes with two results each, then queries with nearest images."""
    sheet = _Sheet(len(singles) + len(doubles))
    sheet.words(
        "Why did this image come back?",
        "Two handwritten digits, two results. The weights stored with each result light up, in the "
        "query, the digit that matched.",
    )
    for double in doubles:
        sheet.row(_double_cells(double))
    sheet.words(
        "",
        "Held-out queries and their nearest images, each with its own stored map. "
        "Every map has its own scale.",
    )
    for single in singles:
        sheet.row(_single_cells(single))
    return sheet.picture()


def html_page(
    singles: Sequence[Single],
    doubles: Sequence[Double],
    table: Sequence[Sequence[str]],
    intro: str,
    notes: str,
) -> str:
    """The same as a page, with the measured table; `table` begins with its header."""
    rows = []
    for double in doubles:
        left, right = (_matched_tile(double, side) for side in (0, 1))
        digits = " and ".join(digit.label for digit in double.file.digits)
        query = Tile(_picture(double.file), None, None, double.file.path.stem, digits)
        results = [_result_tile(double.whys[0]), left, _result_tile(double.whys[1]), right]
        rows.append(Row(query, results, title=f"One query, two results: {digits}"))
    for single in singles:
        query, results = single.why.tiles()
        label = single.file.digits[0].label
        rows.append(Row(query, results, title=f"A held-out {label} and its nearest images"))
    measured = Table(table[0], table[1:], "Where the maps lie", notes)
    return page(
        rows,
        title="embedcam: why did this image come back?",
        intro=intro,
        tables=[measured],
        scale="each",
    )


def _matched_tile(double: Double, side: int) -> Tile:
    why = double.whys[side]
    label = double.file.digits[side].label
    return Tile(_picture(double.file), why.cam, why.extent, f"matched this {label}", "in the query")


def _result_tile(why: Explanation) -> Tile:
    tile: Tile = why.tiles()[1][0]
    return tile


@dataclass(frozen=True)
class _Cell:
    picture: Image.Image
    caption: str
    accent: bool = False


def _double_cells(double: Double) -> list[_Cell]:
    picture = _picture(double.file)
    digits = " and ".join(f"a {digit.label}" for digit in double.file.digits)
    cells = [_Cell(picture, f"query: {digits}")]
    for digit, why in zip(double.file.digits, double.whys, strict=True):
        result = _result_tile(why)
        assert result.image is not None
        cells.append(_Cell(result.image, f"result: a {digit.label}"))
        drawn = overlay(picture, why.cam, why.extent)
        cells.append(_Cell(drawn, f"what matched the {digit.label}", accent=True))
    return cells


def _single_cells(single: Single) -> list[_Cell]:
    why = single.why
    _, results = why.tiles()
    picture = _picture(single.file)
    cells = [
        _Cell(picture, f"query: a {single.file.digits[0].label}"),
        _Cell(overlay(picture, why.cam, why.extent), "what matched", accent=True),
    ]
    assert why.neighbor_cams is not None
    shown = zip(results, why.neighbor_cams, why.labels, why.distances, strict=True)
    for tile, own, label, distance in list(shown)[:3]:
        assert tile.image is not None
        drawn = overlay(tile.image, own, tile.extent)
        cells.append(_Cell(drawn, f"result: a {label}, distance {distance:.2f}"))
    return cells


def _picture(file: SceneFile) -> Image.Image:
    with Image.open(file.path) as image:
        return image.convert("RGB")


class _Sheet:
    """Rows of five cells, with words between them, on white paper."""

    def __init__(self, n_rows: int) -> None:
        width = 2 * _MARGIN + 5 * _SIDE + 4 * _GAP
        self._sheet = Image.new("RGB", (width, 300 + n_rows * (_SIDE + 60)), "white")
        self._draw = ImageDraw.Draw(self._sheet)
        self._y = _MARGIN
        # Drawn four times as large, for smooth round corners.
        large = Image.new("L", (4 * _SIDE, 4 * _SIDE))
        edge = (0, 0, 4 * _SIDE - 1, 4 * _SIDE - 1)
        ImageDraw.Draw(large).rounded_rectangle(edge, 4 * _ROUND, fill=255)
        self._corners = large.resize((_SIDE, _SIDE), Image.Resampling.BOX)

    def words(self, title: str, text: str) -> None:
        """A heading and a line below it."""
        if title:
            self._draw.text((_MARGIN, self._y), title, _INK, _font(26, bold=True))
            self._y += 42
        self._draw.text((_MARGIN, self._y), text, _QUIET, _font(15))
        self._y += 36

    def row(self, cells: Sequence[_Cell]) -> None:
        """Pictures beside each other with a line of words below each."""
        for column, cell in enumerate(cells):
            x = _MARGIN + column * (_SIDE + _GAP)
            picture = cell.picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            self._sheet.paste(picture, (x, self._y), self._corners)
            color = _ACCENT if cell.accent else _INK
            self._draw.text((x, self._y + _SIDE + 6), cell.caption, color, _font(13, cell.accent))
        self._y += _SIDE + 40

    def picture(self) -> Image.Image:
        """The sheet, cut to what is on it."""
        return self._sheet.crop((0, 0, self._sheet.width, self._y + _MARGIN // 2))


def _font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans, which matplotlib brings along."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)
