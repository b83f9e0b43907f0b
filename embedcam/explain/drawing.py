"""Files of pictures: which of an index are followed, and how drawn ones are written."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from .._files import write_whole
from ..errors import InputError
from ..images import Root, is_url
from ..images.places import PLACE, is_below


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
