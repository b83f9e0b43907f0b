"""Explanations as pictures: tiles with their words, and picture files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .._files import write_whole
from ..errors import EmbedcamError, InputError
from ..images import file_state, read_image
from ..render import CHANGED, Tile, panel, shrunk
from ..render.tiles import Scale

if TYPE_CHECKING:
    from .explanation import Explanation, Result


def plot(explanation: Explanation, scale: Scale, title: str | None) -> Image.Image:
    """Draw the panel of a query and its results."""
    query, results = tiles(explanation)
    return panel(query, results, scale=scale, title=title)


def tiles(explanation: Explanation, side: int | None = None) -> tuple[Tile, list[Tile]]:
    """Return the query's and the results' tiles; each made small at once where a side is given."""
    doubtful, match = explanation.doubtful, explanation.match_in_words
    words = [] if doubtful or explanation.asked is not None else [match]
    note = "\n".join(filter(None, [*words, _map_note(explanation)]))
    warning = match if doubtful else ""
    query = Tile(
        explanation.image, explanation.cam, explanation.extent, "query", note, warning=warning
    )
    if side is not None:
        query = shrunk(query, side)
    results = []
    for one in explanation.results():
        tile = _tile(explanation, one)
        results.append(tile if side is None else shrunk(tile, side))
    return query, results


def _tile(explanation: Explanation, result: Result) -> Tile:
    picture, extent, changed = None, None, False
    if may_follow(result.path, explanation.root, explanation.only_below):
        changed = result.mark is not None and file_state(result.path, result.mark) == "changed"
        try:
            picture = read_image(result.path, max_pixels=explanation.max_pixels)
            if explanation.preprocess is not None:
                extent = explanation.preprocess.extent(*picture.size)
        except EmbedcamError:
            # A map over the wrong part of a picture would be worse than one beside it.
            picture = None
    name, words = _short_name(explanation, result.id), []
    if result.label is not None:
        pair = (result.label, name) if explanation.prototypes else (name, result.label)
        name, words = pair[0], [pair[1]]
    words.append(f"distance {result.distance:.3f}")
    words += ["asked for"] * (result is explanation.asked)
    words += ["its rival"] * (result is explanation.rival) + [CHANGED] * changed
    # Maps are drawn with weights of length 1.
    cam = result.cam if not result.norm or result.cam is None else result.cam / result.norm
    return Tile(picture, cam, extent, name, "\n".join(words), changed=changed)


def _short_name(explanation: Explanation, id: str) -> str:
    name = id.rpartition("/")[2]
    return f"prototype {name.removeprefix('prototype-')}" if explanation.prototypes else name


def _map_note(explanation: Explanation) -> str:
    if explanation.empty:
        if explanation.rival is None:
            return "no positive evidence\nfor these results"
        if explanation.weights.any() or explanation.method:
            return "no positive evidence for\nthe result rather than the rival"
        return "no map: both images\nhave the same weights"
    if explanation.method:
        return f"{explanation.method}, on the query;\nresults: stored maps"
    if explanation.direct:
        low = f"one in ten below {explanation.trust_low:.2f}"
        return f"computed on the query:\ntransfer not trusted ({low})"
    if explanation.told_apart is not None and explanation.asked is not None:
        one, other = explanation.told_apart
        if one == explanation.asked.id:
            one, other = _short_name(explanation, one), _short_name(explanation, other)
        return f"what here speaks for\n{one}\nrather than\n{other}"
    if explanation.speaks_for is not None:
        return f"what here speaks for\n{explanation.speaks_for}"
    if len(explanation.explained) == 1:
        return f"what here matched\n{_short_name(explanation, explanation.explained[0])}"
    words = f"weights of {len(explanation.explained)} neighbours, {explanation.transfer}"
    return "\n".join(filter(None, (words, explanation.trust_in_words)))


def may_follow(path: str, root: Path | None, only_below: bool) -> bool:
    """Return whether a picture is read whose path is what an index says, whoever wrote it.

    By names alone: links below the root are the reader's own, and followed.
    """
    if not path or root is None:
        return bool(path)
    file = Path(path)
    below = file.is_relative_to(root)
    # Any "..", for behind a link it leads elsewhere than the names say; the root's own are fine.
    if ".." in (file.relative_to(root) if below else file).parts:
        return False
    if below:
        return True
    return file.is_absolute() and (not only_below or file.is_relative_to(os.path.abspath(root)))


def save_picture(draw: Callable[[], Image.Image], path: str | Path) -> Path:
    """Write a picture, drawn once its file's name is known to be good, or raise InputError."""
    path = Path(path)
    check_picture_name(path)
    picture, encoded = draw(), io.BytesIO()
    try:
        picture.save(encoded, Image.registered_extensions()[path.suffix.lower()])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: the picture cannot be written ({reason})") from error
    return write_whole(path, encoded.getvalue())


def check_picture_name(path: Path) -> None:
    """Refuse a file name whose ending is no picture format, before any work is done for it."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        ending = path.suffix or "no ending"
        raise InputError(f"{path}: {ending} is no picture format; name it .png or .jpg")
