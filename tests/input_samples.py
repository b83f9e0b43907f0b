"""Shards, tables and stores of small pictures."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from embedcam.images import ImageSource


def png(value: int) -> bytes:
    """A picture of one gray."""
    held = io.BytesIO()
    Image.new("RGB", (6, 5), (value,) * 3).save(held, "PNG")
    return held.getvalue()


def shard(path: Path, members: Sequence[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of files, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(samples: Mapping[str, tuple[int, str]]) -> list[tuple[str, bytes]]:
    """Members of samples by key, of a gray and a class."""
    return [
        member
        for key, (value, name) in samples.items()
        for member in ((f"{key}.png", png(value)), (f"{key}.cls", name.encode()))
    ]


def grays(source: ImageSource) -> list[int]:
    """What each picture's gray is, read in order."""
    return [int(np.asarray(source.open(place))[0, 0, 0]) for place in range(len(source))]
