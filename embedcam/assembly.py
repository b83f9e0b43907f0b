"""From the finished chunks of a build to a part of an index: embeddings, weights, own maps."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .encoding import Dense, Encoding, LowRank, TopM, fit_pca
from .errors import InputError
from .index import PartData
from .passes import Work, coarse_grid, own_maps
from .recipe import Recipe

SAMPLE = 2048
"""Weight vectors that a low-rank basis is fitted on, at most."""


@dataclass(frozen=True)
class Gathered:
    """What the embedding pass found.

    Attributes:
        positions: places in the source of the images that could be read, `[N]`.
        embeddings: theirs, `[N D]`, on disk.
        skipped: (id, reason) of the others.
    """

    positions: np.ndarray
    embeddings: np.ndarray
    skipped: list[tuple[str, str]]


def gather(work: Work, before: np.ndarray | None = None) -> Gathered:
    """Collect the chunks of the embedding pass.

    Args:
        work: with every chunk `embed` finished.
        before: embeddings to put in front of the new ones, `[M D]`.

    Raises:
        InputError: not a single image could be read.
    """
    positions, skipped, parts = [], [], []
    for chunk in range(work.n_chunks):
        arrays = work.scratch.read("embed", chunk)
        for position, message in json.loads(bytes(arrays["errors"])):
            skipped.append((work.source.items[position].id, message))
        if "positions" in arrays:
            positions.append(np.array(arrays["positions"]))
            parts.append(arrays["embedding"])
    if not parts:
        first = skipped[0][1]
        raise InputError(f"none of the {len(skipped)} images could be read; the first: {first}")
    parts = parts if before is None else [before, *parts]
    shape = (sum(map(len, parts)), parts[-1].shape[1])
    embeddings = work.scratch.array("embeddings", "float32", shape)
    np.concatenate(parts, out=embeddings)
    return Gathered(np.concatenate(positions), embeddings, skipped)


def fit_encoding(work: Work, mean: np.ndarray) -> Encoding:
    """The encoding of a new index, fitted where it has something to fit.

    Args:
        work: with every chunk `weights` finished.
        mean: mean embedding `[D]`.
    """
    matrix = work.network.head_kind.matrix if work.exact else None
    return make_encoding(
        work.recipe, matrix, grid_of(work), mean, work.network.normalize, lambda: _sample(work)
    )


def make_encoding(
    recipe: Recipe,
    matrix: np.ndarray | None,
    grid: tuple[int, int],
    mean: np.ndarray,
    normalize: bool,
    sample: Callable[[], np.ndarray],
) -> Encoding:
    """The encoding a recipe asks for.

    Args:
        recipe: the choices.
        matrix: W `[D K]` where dy/dz in the head's own matrix is the whole weight vector.
        grid: (H, W) of the layer.
        mean: mean embedding `[D]`.
        normalize: whether embeddings are L2-normalised.
        sample: gives weight vectors `[n K]` to fit on.
    """
    if matrix is not None:
        basis = matrix / np.prod(grid)
        # dy/dz is then embedding - mean: nothing that is not stored already.
        derived = recipe.target == "centred" and (recipe.norm == "around" or not normalize)
        offset = -mean @ basis if derived else np.zeros(basis.shape[1])
        return LowRank(basis, offset, "head", "embedding" if derived else "stored", recipe.dtype)
    weights = sample()
    if recipe.encoding == "dense":
        return Dense(weights.shape[1], recipe.dtype)
    if recipe.encoding == "top-m":
        return TopM(weights.shape[1], recipe.m, recipe.by, recipe.dtype)
    return fit_pca(weights, recipe.rank, recipe.dtype)


def sample_places(n: int, seed: int) -> np.ndarray:
    """Which of n weight vectors a basis is fitted on: all, or a seeded sample, in order."""
    if n <= SAMPLE:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:SAMPLE])


def header(
    recipe: Recipe,
    network: dict[str, Any] | None,
    root: Path | None,
    width: int,
    normalize: bool,
    layer: str,
    grid: tuple[int, int],
    encoding: Encoding,
    coarse: tuple[int, int] | None,
) -> dict[str, Any]:
    """What the manifest of a new index says; see index/README.md."""
    return {
        "recipe": recipe.to_dict(),
        "network": network,
        "images": None if root is None else {"root": str(root.resolve())},
        "libraries": {"torch": torch.__version__.split("+")[0]},
        "embedding": {"width": width, "normalized": normalize},
        "metric": recipe.metric,
        "method": recipe.method,
        "target": recipe.target,
        "norm": recipe.norm,
        "triplets": {
            "sampling": recipe.sampling,
            "count": recipe.triplets,
            "hinge": recipe.hinge,
            "margin": recipe.margin,
            "seed": recipe.seed,
        },
        "layers": [
            {
                "name": layer,
                "channels": encoding.n_channels,
                "grid": list(grid),
                "cells": grid[0] * grid[1],
                "encoding": encoding.spec(),
                "coarse_grid": None if coarse is None else list(coarse),
            }
        ],
    }


def encode(
    work: Work, encoding: Encoding, gathered: Gathered, mean: np.ndarray, with_maps: bool
) -> PartData:
    """The images of the chunks as one part of an index.

    Args:
        work: with every chunk `weights` finished.
        encoding: of the index.
        gathered: what the embedding pass found.
        mean: mean embedding the index was fitted with, `[D]`.
        with_maps: whether each image's own coarse map is kept.
    """
    n = len(gathered.positions)
    items = [work.source.items[position] for position in gathered.positions]
    fields = {
        name: work.scratch.array(name, field.dtype, (n, *field.shape))
        for name, field in encoding.fields.items()
    }
    counts = np.zeros(n, np.uint32)
    grid = coarse_grid(grid_of(work))
    maps = work.scratch.array("maps", "uint8", (n, *grid)) if with_maps else None
    scales = np.zeros(n, np.float32)
    own = gathered.embeddings[len(gathered.embeddings) - n :]
    done = 0
    for chunk in _filled(work):
        arrays = work.scratch.read("weights", chunk)
        rows = slice(done, done + len(arrays["counts"]))
        encoded, weights, codes = _encoded(work, encoding, arrays["weights"], own[rows], mean)
        for name, values in encoded.items():
            fields[name][rows] = values
        counts[rows] = np.minimum(arrays["counts"], np.iinfo(np.uint32).max)
        if maps is not None:
            maps[rows], scales[rows] = own_maps(work, chunk, weights, codes)
        done = rows.stop
    return PartData(
        ids=[item.id for item in items],
        labels=[item.label for item in items],
        paths=[item.path for item in items],
        embeddings=own,
        triplets_used=counts,
        fields=[fields],
        coarse=[None if maps is None else (maps, scales)],
    )


def grid_of(work: Work) -> tuple[int, int]:
    """(H, W) of the layer, the same for every image of a build."""
    stage = "embed" if work.pooled else "weights"
    grids = {
        tuple(int(n) for n in row)
        for chunk in _filled(work)
        for row in np.unique(work.scratch.read(stage, chunk, "grid")["grid"], axis=0)
    }
    if len(grids) != 1:
        found = ", ".join(f"{h} x {w}" for h, w in sorted(grids))
        raise InputError(
            f"the layer's grid differs between images ({found}); use a preprocessing that gives "
            "every image the same size"
        )
    height, width = grids.pop()
    return height, width


def _encoded(
    work: Work, encoding: Encoding, weights: np.ndarray, embeddings: np.ndarray, mean: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Rows of the fields, and what they decode to: weights `[n K]`, and codes where exact."""
    if work.exact and isinstance(encoding, LowRank):
        rows = encoding.encode_codes(np.asarray(weights))
        if encoding.uses_embedding:
            codes = embeddings - mean
            return rows, encoding.decode({"embedding": embeddings}), codes
        return rows, encoding.decode(rows), encoding.stored_codes(rows)
    rows = encoding.encode(np.asarray(weights))
    return rows, encoding.decode(rows), None


def _sample(work: Work) -> np.ndarray:
    """Weight vectors of a seeded sample of the images, `[n K]`."""
    arrays = [work.scratch.read("weights", c, "weights")["weights"] for c in _filled(work)]
    starts = np.cumsum([0, *map(len, arrays)])
    places = sample_places(int(starts[-1]), work.recipe.seed)
    owner = np.searchsorted(starts, places, side="right") - 1
    return np.concatenate([array[places[owner == c] - starts[c]] for c, array in enumerate(arrays)])


def _filled(work: Work) -> list[int]:
    """Chunks in which at least one image could be read."""
    return [
        chunk
        for chunk in range(work.n_chunks)
        if work.scratch.has("embed", chunk) and work.scratch.holds("embed", chunk, "positions")
    ]
