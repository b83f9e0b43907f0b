"""How `data/golden-format-1/` was made: run once, with format version 1, and never again.

    python tests/make_golden.py FOLDER [--marked | --by-position | --concepts]

A later version of this program may write other bytes; it says where every value came from. Two
layers (low-rank in half precision with coarse maps, and top-m), two parts, one removed image, Flat.
`data/golden-marks-1/` is the same with marks of files, `data/golden-positions-1/` has weights by
position in place of low-rank ones, of the same codes. `data/golden-concepts-1/` also keeps
the mean embedding of texts, parts of activations, and exemplars.
"""

import sys
from pathlib import Path

import numpy as np
from index_samples import header_of

from embedcam.index import PartData, append, create, quantize_coarse, remove, verify
from embedcam.index.concepts import Best, arrays_of
from embedcam.index.encoding import Encoding, LowRank, TopM

WIDTH, CHANNELS = 4, 6
NAMES = ["owl", "crane", "åland", "猫", "owl 2", "none", "late"]


def encodings(by_position: bool = False) -> list[Encoding]:
    numbers = CHANNELS * 6 if by_position else CHANNELS
    basis = np.arange(2 * numbers, dtype=np.float32).reshape(2, numbers) / 4
    offset = np.full(numbers, 0.5, np.float32)
    return [
        LowRank(basis, offset, grid=(2, 3) if by_position else None),
        TopM(CHANNELS, 2, "signed", "float32"),
    ]


def rows(start: int, stop: int) -> PartData:
    """Image i: unit vector i mod 4 (negative from 4 on), codes (i, -i / 2), map with corner i."""
    numbers = np.arange(start, stop)
    embeddings = np.zeros((len(numbers), WIDTH), np.float32)
    embeddings[np.arange(len(numbers)), numbers % WIDTH] = np.where(numbers < WIDTH, 1, -1)
    low_rank, top_m = encodings()
    codes = np.stack([numbers, -numbers / 2], axis=1)
    weights = numbers[:, None] + np.arange(CHANNELS)[None, :] / 8
    cams = np.zeros((len(numbers), 2, 3), np.float32)
    cams[:, 0, 0], cams[:, 1, 2] = numbers, numbers / 5
    return PartData(
        ids=[f"{NAMES[n]}.jpg" for n in numbers],
        labels=[None if n == 5 else ("bird" if n in (0, 1, 4) else "other") for n in numbers],
        paths=[f"pictures/{NAMES[n]}.jpg" for n in numbers],
        embeddings=embeddings,
        triplets_used=(numbers * 10).astype(np.uint32),
        fields=[low_rank.encode_codes(codes), top_m.encode(weights)],
        coarse=[quantize_coarse(cams), None],
    )


def concepts() -> dict[str, np.ndarray]:
    """Channel k answers 6 - k in image k at position k, and 1 in the image added later.

    Channel 5 is dead. Concept 0 is strongest in the image that is removed.
    """
    number = np.arange(CHANNELS)
    values = np.stack([6 - number, np.ones(CHANNELS)], 1) * (number < 5)[:, None]
    channels = Best(values, np.stack([number, number * 0 + 6], 1), np.stack([number, number], 1))
    places, cells = np.array([[1, 0], [3, 2]]), np.array([[5, 4], [0, 3]])
    parts = np.array([[1, 2, 1, 0, 0, 0], [0, 0, 2, 1, 2, 0]], np.float32) / 4
    ids = [f"{name}.jpg" for name in NAMES]
    found = arrays_of(channels, Best(np.array([[4, 3], [2, 1]]), places, cells), parts, ids)
    return found | {"text_mean": np.array([0.5, 0, -0.25, 0.125], np.float32)}


def main(path: Path, marked: bool = False, by_position: bool = False, shown: bool = False) -> None:
    layers = [header_of(encoding)["layers"][0] for encoding in encodings(by_position)]
    layers[1] |= {"name": "features.10", "grid": [14, 14], "cells": 196, "coarse_grid": None}
    network, images = {"name": "golden", "layer": "features.18"}, {"root": "pictures"}
    given = {"network": network, "images": images, "layers": layers}
    header = header_of(encodings()[0], WIDTH, **given)
    shared = {
        "embedding_mean": np.full(WIDTH, 0.25, np.float32),
        "probe_embedding": np.array([1, 0, 0, 0], np.float32),
        "probe_pooled": np.arange(CHANNELS, dtype=np.float32),
    }
    if shown:
        shared |= concepts()
    first = rows(0, 6)
    if marked:
        first.marks = np.arange(6, dtype=np.uint32)[:, None] * np.array([1, 10, 100, 1000], "u4")
    create(path, header, [e.fitted for e in encodings(by_position)], shared, first, factory="Flat")
    append(path, rows(6, 7))
    remove(path, ["crane.jpg"])
    verify(path)
    (path / ".lock").unlink()


if __name__ == "__main__":
    given = [name in sys.argv for name in ("--marked", "--by-position", "--concepts")]
    main(Path(sys.argv[1]), *given)
