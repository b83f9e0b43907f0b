"""Files of pictures: which of an index are followed, and how drawn ones are written."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .._files import write_whole
from ..errors import EmbedcamError, InputError
from ..images import (
    PLACE,
    FileState,
    Root,
    file_state,
    is_url,
    open_place,
    place_state,
    read_image,
)
from ..images.places import is_below
from ..preprocess import AnyPreprocess, Extent


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


def read_shown(
    path: str,
    mark: np.ndarray | None,
    root: Root | None,
    only_below: bool,
    max_pixels: int,
    preprocess: AnyPreprocess | None,
) -> tuple[Image.Image | None, Extent | None, bool]:
    """Return an indexed image's picture, what of it the network saw, and whether it was changed.

    None where it is not read: a map over the wrong part of a picture would be worse than one
    beside it.
    """
    if not may_follow(path, root, only_below):
        return None, None, False
    own = PLACE.match(path) is None  # a file of its own, as most are
    state: Callable[..., FileState | None] = file_state if own else place_state
    read: Callable[..., Image.Image] = read_image if own else open_place
    changed = mark is not None and state(path, mark) == "changed"
    try:
        picture = read(path, max_pixels=max_pixels)
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
