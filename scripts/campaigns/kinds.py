"""A tiny index of every kind, made of features; no picture is read and no network is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embedcam import Recipe, build_from_features
from embedcam.index import Index, PartData, append, create, quantize_coarse, remove
from embedcam.index.reader import Selection
from embedcam.offline.features import AffineHead
from embedcam.prototypes import compress

N, WIDTH, CHANNELS, GRID = 24, 6, 8, (2, 2)
LABELS = [None if n % 7 == 6 else f"class {n % 3}" for n in range(N)]


def features() -> tuple[np.ndarray, np.ndarray, AffineHead]:
    """Unit embeddings `[N D]`, pooled activations `[N K]`, and the head between them."""
    rng = np.random.default_rng(3)
    pooled = rng.random((N, CHANNELS)).astype(np.float32) + 0.1
    head = AffineHead(rng.standard_normal((WIDTH, CHANNELS)).astype(np.float32))
    z = head.output(pooled)
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32), pooled, head


def queries(n_layers: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Unit embeddings `[3 D]` and the activations of each layer `[3 K H W]`."""
    rng = np.random.default_rng(4)
    near = features()[0][:3] + 0.1 * rng.standard_normal((3, WIDTH)).astype(np.float32)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    sides = [(size * GRID[0], size * GRID[1]) for size in (1, 2)[:n_layers]]
    return near, [rng.random((3, CHANNELS, *side)).astype(np.float32) for side in sides]


def _built(path: Path, recipe: Recipe, labelled: bool = True, unit: bool = True) -> None:
    embeddings, pooled, head = features()
    build_from_features(
        embeddings if unit else head.output(pooled), pooled, path, recipe, grid=GRID, head=head,
        normalize=unit, labels=LABELS if labelled else None, progress=False,
    )  # fmt: skip


def _part(rows: Selection, ids: list[str], layers: int = 1, **more: Any) -> PartData:
    """Rows of an index, to be stored again."""
    return PartData(
        ids=ids, labels=rows.labels, paths=more.pop("paths", rows.paths),
        embeddings=rows.embeddings, triplets_used=rows.triplets_used,
        fields=[rows.fields()] * layers, **more,
    )  # fmt: skip


def _changed(path: Path) -> None:
    _built(path, Recipe(encoding="top-m", m=3, faiss="Flat"))
    with Index.open(path) as index:
        added = _part(index.select(np.arange(7)), [f"later {n}" for n in range(7)])
    append(path, added)
    remove(path, ["4", "9", "later 2"])


def _compressed(path: Path) -> None:
    _built(path.with_name("whole"), Recipe())
    compress(path.with_name("whole"), path, 6, progress=False)


def _two_layers(path: Path) -> None:
    _built(path.with_name("one"), Recipe(encoding="low-rank", rank=3))
    with Index.open(path.with_name("one")) as index:
        about, fitted, shared = index.manifest.to_dict(), index.encoding().fitted, index.shared()
        rows = index.select(np.arange(N))
        coarse = quantize_coarse(np.random.default_rng(5).random((N, 2, 3)))
        paths = [f"folder/{n}.png" for n in range(N)]
        part = _part(rows, rows.ids, 2, paths=paths, coarse=[coarse, None])
    layer = about["layers"][0]
    same = ("recipe", "embedding", "metric", "method", "target", "norm", "triplets")
    header = {
        **{key: about[key] for key in same},
        "network": NETWORK,
        "images": {"root": str(path.parent / "pictures"), "files_sha256": "2" * 64},
        "layers": [
            {**layer, "name": "features.18", "coarse_grid": [2, 3]},
            {**layer, "name": "features.10", "grid": [4, 4], "cells": 16},
        ],
        "trust_calibration": {
            "one": _calibration(3, 1, **TRUST),
            "several": _calibration(6, 5, **TRUST),
        },
        "match_calibration": {
            "one": _calibration(1, 1, **MATCH),
            "several": _calibration(4, 10, **MATCH),
        },
    }
    probe = {"probe_embedding": np.ones(WIDTH, "f4"), "probe_pooled": np.ones(CHANNELS, "f4")}
    create(path, header, [fitted, fitted], {**shared, **probe}, part)


def _calibration(width: int, neighbors: int, **curves: Any) -> dict[str, Any]:
    vectors = {"mean": [0.1] * width, "scale": [1.5] * width, "linear": [0.2] * width}
    return {**vectors, "intercept": 0.5, **curves, "neighbors": neighbors, "images": 42}


NETWORK = {
    "parameters_sha256": "0" * 64, "structure_sha256": "1" * 64, "layer": "features.18",
    "preprocess": {
        "kind": "standard", "size": [16, 16], "resize": "crop", "resize_to": 18,
        "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2],
    },
    "normalize": True, "output": None, "layout": "channels first", "precision": "float32",
    "name": "torchvision:mobilenet_v2",
    "loading": {"network": "torchvision:mobilenet_v2", "weights": None, "head": None},
}  # fmt: skip
TRUST = {
    "scores": [-1.0, 0.0, 1.0], "correlations": [0.1, 0.4, 0.9], "lows": [0.0, 0.2, 0.7],
    "largest_distance": 1.5,
}  # fmt: skip
MATCH = {"distances": [0.1, 0.5, 0.9], "shares": [0.9, 0.5, 0.1], "far": 1.5}


KINDS: dict[str, Callable[[Path], None]] = {
    "low-rank, labelled": lambda path: _built(path, Recipe()),
    "low-rank by PCA": lambda path: _built(
        path, Recipe(encoding="low-rank", rank=3, target="margin")
    ),
    "from the embedding": lambda path: _built(path, Recipe(target="centred", norm="around"), False),
    "top-m": lambda path: _built(path, Recipe.paper(m=3)),
    "dense": lambda path: _built(path, Recipe(encoding="dense", dtype="float32")),
    "inner product, any length": lambda path: _built(path, Recipe(metric="ip"), unit=False),
    "HNSW": lambda path: _built(path, Recipe(faiss="HNSW8")),
    "IVF": lambda path: _built(path, Recipe(faiss="IVF4,Flat")),
    "no FAISS": lambda path: _built(path, Recipe(faiss="none")),
    "added and removed": _changed,
    "prototypes": _compressed,
    "two layers, maps, trust": _two_layers,
}


def build_kind(name: str, folder: Path) -> Path:
    """Build the index of a kind in a new folder; returns its path."""
    path = folder / "index"
    KINDS[name](path)
    return path
