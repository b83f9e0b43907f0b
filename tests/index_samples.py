"""Small indexes with known values, for the tests of the format."""

from typing import Any

import numpy as np

from embedcam.index import PartData, create, quantize_coarse
from embedcam.index.encoding import Dense, Encoding, LowRank, TopM

WIDTH, CHANNELS, GRID = 8, 6, (2, 3)


def encoding_of(kind: str) -> Encoding:
    rng = np.random.default_rng(7)
    basis = rng.standard_normal((3, CHANNELS)).astype(np.float32)
    if kind == "top-m":
        return TopM(CHANNELS, 2, "magnitude", "float32")
    if kind == "low-rank":
        return LowRank(basis, basis.mean(axis=0), "pca")
    if kind == "embedding":
        wide = rng.standard_normal((WIDTH, CHANNELS)).astype(np.float32)
        return LowRank(wide, wide[0], "head", "embedding")
    if kind == "by-position":
        wide = rng.standard_normal((3, CHANNELS * GRID[0] * GRID[1])).astype(np.float32)
        return LowRank(wide, wide.mean(axis=0), grid=GRID)
    return Dense(CHANNELS, "float32" if kind == "dense32" else "float16")


def part(start, stop, encoding) -> PartData:
    """Rows start .. stop of an endless index: each row depends on its number alone."""
    rows = range(start, stop)
    noise = [np.random.default_rng([3, row]) for row in rows]
    vectors = np.array([r.standard_normal(WIDTH) for r in noise]).reshape(-1, WIDTH)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = np.array([r.standard_normal(encoding.n_channels) for r in noise])
    weights = weights.reshape(-1, encoding.n_channels)
    if isinstance(encoding, LowRank):
        codes = weights[:, : encoding.rank]
        fields = {} if encoding.uses_embedding else encoding.encode_codes(codes)
    else:
        fields = encoding.encode(weights)
    cams = np.array([r.random(GRID) for r in noise]).reshape(-1, *GRID)
    return PartData(
        ids=[f"image-{row:04d}" for row in rows],
        labels=[None if row % 5 == 4 else f"class {row % 3}" for row in rows],
        paths=[f"folder {row % 3}/é{row}.jpg" for row in rows],
        embeddings=vectors.astype(np.float32),
        triplets_used=np.arange(start, stop).astype(np.uint32),
        fields=[fields],
        coarse=[quantize_coarse(cams)],
    )


def header_of(encoding, width=WIDTH, grid=GRID, metric="l2", **more) -> dict[str, Any]:
    return {
        "recipe": {"method": "gradcam", "seed": 0},
        "embedding": {"width": width, "normalized": True},
        "metric": metric,
        "method": "gradcam",
        "target": "margin",
        "norm": "through",
        "triplets": {"sampling": "random", "count": 50, "hinge": False, "margin": 0.2, "seed": 0},
        "layers": [
            {
                "name": "features.18",
                "channels": encoding.n_channels,
                "grid": list(grid),
                "cells": grid[0] * grid[1],
                "encoding": encoding.spec(),
                "coarse_grid": list(grid),
            }
        ],
        **more,
    }


def make(path, n=12, kind="top-m", factory="Flat", metric="l2", replace=False, start=0, **choices):
    """An index of rows from `start`, or of these `rows`, `normalized` unless told."""
    encoding = encoding_of(kind)
    mean, probe = np.arange(WIDTH, dtype=np.float32), np.ones(WIDTH, np.float32)
    shared = {"embedding_mean": mean, "probe_embedding": probe}
    width = {"width": WIDTH, "normalized": choices.get("normalized", True)}
    header = header_of(encoding, metric=metric, embedding=width)
    rows = choices.get("rows") or part(start, start + n, encoding)
    return create(path, header, [encoding.fitted], shared, rows, factory=factory, replace=replace)
