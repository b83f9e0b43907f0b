"""Small indexes with known values, for the tests of the format."""

from pathlib import Path
from typing import Any

import numpy as np

from embedcam.index import PartData, create, quantize_coarse
from embedcam.index.encoding import Dense, Encoding, LowRank, TopM

WIDTH, CHANNELS, GRID = 8, 6, (2, 3)


def encoding_of(kind: str, width: int = WIDTH, channels: int = CHANNELS) -> Encoding:
    rng = np.random.default_rng(7)
    basis = rng.standard_normal((3, channels)).astype(np.float32)
    if kind == "top-m":
        return TopM(channels, min(2, channels), "magnitude", "float32")
    if kind == "low-rank":
        return LowRank(basis, basis.mean(axis=0), "pca")
    if kind == "embedding":
        wide = rng.standard_normal((width, channels)).astype(np.float32)
        return LowRank(wide, wide[0], "head", "embedding")
    if kind == "by-position":
        wide = rng.standard_normal((3, channels * GRID[0] * GRID[1])).astype(np.float32)
        return LowRank(wide, wide.mean(axis=0), grid=GRID)
    return Dense(channels, "float32" if kind == "dense32" else "float16")


def part(
    start: int,
    stop: int,
    encoding: Encoding,
    width: int = WIDTH,
    grid: tuple[int, int] | None = GRID,
) -> PartData:
    """Rows start .. stop of an endless index: each row depends on its number alone."""
    rows = range(start, stop)
    noise = [np.random.default_rng([3, row]) for row in rows]
    vectors = np.array([r.standard_normal(width) for r in noise]).reshape(-1, width)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = np.array([r.standard_normal(encoding.n_channels) for r in noise])
    weights = weights.reshape(-1, encoding.n_channels)
    if isinstance(encoding, LowRank):
        codes = weights[:, : encoding.rank] if encoding.n_channels >= encoding.rank else None
        fields = {} if encoding.uses_embedding else encoding.encode_codes(codes)
    else:
        fields = encoding.encode(weights)
    cams = np.array([r.random(grid or (1, 1)) for r in noise]).reshape(-1, *(grid or (1, 1)))
    return PartData(
        ids=[f"image-{row:04d}" for row in rows],
        labels=[None if row % 5 == 4 else f"class {row % 3}" for row in rows],
        paths=[f"folder {row % 3}/é{row}.jpg" for row in rows],
        embeddings=vectors.astype(np.float32),
        triplets_used=np.arange(start, stop).astype(np.uint32),
        fields=[fields],
        coarse=[None if grid is None else quantize_coarse(cams)],
    )


def header_of(
    encoding: Encoding,
    width: int = WIDTH,
    grid: tuple[int, int] | None = GRID,
    metric: str = "l2",
    **more: Any,
) -> dict[str, Any]:
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
                "grid": None if grid is None else list(grid),
                "cells": None if grid is None else grid[0] * grid[1],
                "encoding": encoding.spec(),
                "coarse_grid": None if grid is None else list(grid),
            }
        ],
        **more,
    }


def make(
    path: Path,
    n: int = 12,
    kind: str = "top-m",
    factory: str = "Flat",
    metric: str = "l2",
    replace: bool = False,
    start: int = 0,
    normalized: bool = True,
    rows: PartData | None = None,
) -> Path:
    encoding = encoding_of(kind)
    mean, probe = np.arange(WIDTH, dtype=np.float32), np.ones(WIDTH, np.float32)
    shared = {"embedding_mean": mean, "probe_embedding": probe}
    width = {"width": WIDTH, "normalized": normalized}
    header = header_of(encoding, metric=metric, embedding=width)
    rows = rows or part(start, start + n, encoding)
    return create(path, header, [encoding.fitted], shared, rows, factory=factory, replace=replace)
