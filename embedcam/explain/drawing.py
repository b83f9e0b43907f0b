"""Files of pictures: which of an index are followed and drawn, and how pictures are written."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from PIL import Image

from .._files import write_whole
from ..errors import EmbedcamError, InputError
from ..images import (
    PLACE,
    FileState,
    Root,
    file_state,
    is_there,
    is_url,
    open_place,
    place_state,
    read_image,
)
from ..images.places import is_below
from ..preprocess import AnyPreprocess, Extent
from ..render import in_notebook
from ..render.tiles import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .explanation import Result
    from .text_explanation import TextResult


def may_follow(path: str, root: Root | None, only_below: bool) -> bool:
    """Return whether a picture is read whose path is what an index says, whoever wrote it.

    By names alone: links below the root are the reader's own, and followed. Addresses are read
    below a root that the reader named, and nowhere else.
    """
    if PLACE.match(path) is not None and is_url(path):
        return only_below and root is not None and is_below(path, root)
    if not path or root is None:
        return bool(path)
    file = Path(path)
    if isinstance(root, str):
        return file.is_absolute() and not only_below and ".." not in file.parts
    below = file.is_relative_to(root)
    # Any "..", for behind a link it leads elsewhere than the names say; the root's own are fine.
    if ".." in (file.relative_to(root) if below else file).parts:
        return False
    if below:
        return True
    return file.is_absolute() and (not only_below or file.is_relative_to(os.path.abspath(root)))


class Drawn(ABC):
    """What was found in an index, drawn with its pictures, of which those are read that may be.

    See `may_follow`; the attributes are as of an `Explanation`.
    """

    preprocess: AnyPreprocess | None
    root: Root | None
    only_below: bool
    max_pixels: int

    @overload
    def plot(
        self, *, scale: Scale = ..., title: str | None = ..., ax: None = ...
    ) -> Image.Image: ...
    @overload
    def plot(self, *, scale: Scale = ..., title: str | None = ..., ax: Axes) -> Axes: ...
    def plot(
        self, *, scale: Scale = "joint", title: str | None = None, ax: Axes | None = None
    ) -> Image.Image | Axes:
        """Draw a query and its results, or those of words, each with its map, as one picture.

        Parameters
        ----------
        scale
            "joint" draws all results on one color scale, so that weak evidence does not look
            strong; "each" gives every result its own.
        title
            Heading; where words asked, None takes them.
        ax
            Matplotlib axes to draw the query with its map into, or the first result of words,
            alone, `title` above it; they are returned. Words stay vectors in SVG and PDF.
        """
        return self._draw(scale, title, ax)

    def save(self, path: str | Path, *, scale: Scale = "joint", title: str | None = None) -> Path:
        """Write the picture of `plot`; the file's ending chooses the format.

        Raises
        ------
        InputError
            An ending that names no format, or a place that cannot be written.
        """
        return save_picture(lambda: self.plot(scale=scale, title=title), path)

    def _repr_html_(self) -> str:
        return in_notebook(self.plot(), self._alt)

    def not_found(self) -> list[str]:
        """Return ids of the results whose pictures are not where the index says; none are read."""
        paths = ((one.id, one.path) for one in self._shown() if one.path)
        return [
            name
            for name, path in paths
            if not (may_follow(path, self.root, self.only_below) and is_there(path))
        ]

    @property
    @abstractmethod
    def _alt(self) -> str: ...

    @abstractmethod
    def _draw(self, scale: Scale, title: str | None, ax: Axes | None) -> Image.Image | Axes: ...

    @abstractmethod
    def _shown(self) -> Sequence[Result | TextResult]: ...

    def _state(self, result: Result | TextResult) -> FileState | None:
        """Return what became of a result's file since the build; None where unknown."""
        if result.mark is None or not result.path:
            return None
        followed = may_follow(result.path, self.root, self.only_below)
        return place_state(result.path, result.mark) if followed else "missing"

    def _read(self, result: Result | TextResult) -> tuple[Image.Image | None, Extent | None, bool]:
        """Return a result's picture, what of it the network saw, and whether it was changed.

        None where it is not read: a map over the wrong part of a picture would be worse than one
        beside it.
        """
        path, mark = result.path, result.mark
        if not may_follow(path, self.root, self.only_below):
            return None, None, False
        own = PLACE.match(path) is None  # a file of its own, as most are
        state: Callable[..., FileState | None] = file_state if own else place_state
        read: Callable[..., Image.Image] = read_image if own else open_place
        changed = mark is not None and state(path, mark) == "changed"
        try:
            picture = read(path, max_pixels=self.max_pixels)
            preprocess = self.preprocess
            extent = None if preprocess is None else preprocess.extent(*picture.size)
            return picture, extent, changed
        except EmbedcamError:
            return None, None, changed


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
