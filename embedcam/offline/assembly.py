"""From the finished chunks of a build to a part of an index: embeddings, weights, own maps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..images.sources import relative_path
from ..index import Index, PartData
from ..index.encoding import Dense, Encoding, LowRank, TopM, fit_by_position, fit_pca
from ..index.identity import Identity
from ..network import EmbeddingNetwork
from ..recipe.recipe import Recipe
from ..recipe.registry import PositionMethod
from .passes import Work, own_grid, own_maps, skipped_of, weights_of_layer
from .triplets import pairs_digest

SAMPLE, NUMBERS = 2048, 1 << 25
"""Weights that a basis is fitted on, at most: images, and numbers in all (but `rank` images)."""
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Gathered:
    """What the embedding pass found.

    Attributes:
        positions: places in the source of the images that could be read, `[n]`.
        embeddings: of the images in the index already, then theirs, `[N D]`, on disk.
        skipped: (id, reason) of the others, which cannot be read or embedded.
        n_cropped: images of which a centre crop leaves out more than `passes.CROPPED`.
    """

    positions: np.ndarray
    embeddings: np.ndarray
    skipped: list[tuple[str, str]]
    n_cropped: int = 0

    @property
    def n_before(self) -> int:
        """Images that are in the index already."""
        return len(self.embeddings) - len(self.positions)

    @property
    def own(self) -> np.ndarray:
        """Embeddings of the new images alone, `[n D]`."""
        return self.embeddings[self.n_before :]


def gather(work: Work, index: Index | None = None, live: np.ndarray | None = None) -> Gathered:
    """Collect the chunks of the embedding pass.

    Args:
        work: with every chunk `embed` finished.
        index: whose images come before the new ones.
        live: positions of these images; None for all that are live.

    Raises:
        InputError: not a single image could be used.
    """
    chunks = range(work.n_chunks)
    skipped = [
        (work.source.items[position].id, message)
        for chunk in chunks
        for position, message in skipped_of(work, chunk)
    ]
    positions = np.concatenate([work.embedded(chunk) for chunk in chunks])
    if not len(positions):
        first = skipped[0][1]
        raise InputError(f"none of the {len(skipped)} images could be used; the first: {first}")
    own = [work.scratch.read("embed", c, "embedding")["embedding"] for c in _filled(work)]
    if live is None:
        live = np.empty(0, np.int64) if index is None else index.live_positions()
    shape = (len(live) + len(positions), own[0].shape[1])
    embeddings = work.scratch.array("embeddings", "float32", shape)
    for start in range(0, len(live), _BLOCK):
        assert index is not None
        rows = live[start : start + _BLOCK]
        embeddings[start : start + len(rows)] = index.embeddings(rows)
    np.concatenate(own, out=embeddings[len(live) :])
    n_cropped = sum(int(work.scratch.read("embed", c, "cropped")["cropped"][0]) for c in chunks)
    return Gathered(positions, embeddings, skipped, n_cropped)


def fit_encodings(work: Work, mean: np.ndarray) -> list[Encoding]:
    """The encoding of each layer of a new index, fitted where it has something to fit.

    Args:
        work: with every chunk `weights` finished.
        mean: mean embedding `[D]`.
    """
    matrix = work.network.head_kind.matrix if work.exact else None
    made = []
    for number in range(max(1, len(work.layers))):
        name = weights_of_layer(number)
        # Only mapped: of an array that long, nothing but its shape is looked at.
        first = work.scratch.read("weights", _filled(work)[0], name)[name]
        made.append(
            make_encoding(
                work.recipe,
                matrix,
                grid_of(work),
                mean,
                work.network.normalize,
                partial(_sample, work, name),
                n_channels=first.shape[1] if matrix is None else matrix.shape[1],
            )
        )
    return made


def make_encoding(
    recipe: Recipe,
    matrix: np.ndarray | None,
    grid: tuple[int, int],
    mean: np.ndarray,
    normalize: bool,
    sample: Callable[[], np.ndarray],
    *,
    n_channels: int | None = None,
) -> Encoding:
    """The encoding a recipe asks for.

    Args:
        recipe: the choices.
        matrix: W `[D K]` where dy/dz in the head's own matrix is the whole weight vector.
        grid: (H, W) of the layer.
        mean: mean embedding `[D]`.
        normalize: whether embeddings are L2-normalised.
        sample: gives weights `[n K]`, or `[n K H W]`, to fit on; not asked where nothing is fitted.
        n_channels: K; None counts it in a sample.
    """
    if matrix is not None:
        basis = matrix / np.prod(grid)
        # dy/dz is then embedding - mean: nothing that is not stored already.
        derived = recipe.resolved_target == "centred" and (recipe.norm == "around" or not normalize)
        offset = -mean @ basis if derived else np.zeros(basis.shape[1])
        return LowRank(basis, offset, "head", "embedding" if derived else "stored", recipe.dtype)
    if recipe.encoding == "low-rank":
        by_position = isinstance(recipe.entry, PositionMethod)
        return (fit_by_position if by_position else fit_pca)(sample(), recipe.rank, recipe.dtype)
    width = sample().shape[1] if n_channels is None else n_channels
    if recipe.encoding == "dense":
        return Dense(width, recipe.dtype)
    return TopM(width, recipe.m, recipe.by, recipe.dtype)


def sample_places(n: int, seed: int, most: int = SAMPLE) -> np.ndarray:
    """Which of n weight vectors a basis is fitted on: all, or a seeded sample, in order."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])


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
    *,
    files: str | None = None,
    given: np.ndarray | None = None,
) -> dict[str, Any]:
    """What the manifest of a new index says; see index/README.md.

    Args:
        recipe: the choices.
        network: what `described` says of it, or None.
        root: folder that paths are relative to, or None.
        width: D.
        normalize: whether embeddings are L2-normalised.
        layer: its name.
        grid: (H, W) of the layer.
        encoding: of the weights.
        coarse: grid of the images' own maps, or None.
        files: digest of the files that were read, or None where there were none.
        given: the user's own triplets `[N S 2]`, or None.
    """
    images = {"root": None if root is None else str(root.resolve()), "files_sha256": files}
    return {
        "recipe": recipe.resolved.to_dict(),
        "network": network,
        "images": None if root is None and files is None else images,
        "libraries": {"torch": torch.__version__.split("+")[0]},
        "embedding": {"width": width, "normalized": normalize},
        "metric": recipe.metric,
        "method": recipe.method,
        "target": recipe.resolved_target,
        "norm": recipe.norm,
        "triplets": _evidence(recipe, given),
        "layers": [layer_entry(layer, grid, encoding, coarse)],
    }


def layer_entry(
    name: str, grid: tuple[int, int], encoding: Encoding, coarse: tuple[int, int] | None
) -> dict[str, Any]:
    """What the manifest says of one layer."""
    return {
        "name": name,
        "channels": encoding.n_channels,
        "grid": list(grid),
        "cells": grid[0] * grid[1],
        "encoding": encoding.spec(),
        "coarse_grid": None if coarse is None else list(coarse),
    }


def _evidence(recipe: Recipe, given: np.ndarray | None) -> dict[str, Any]:
    """The triplets behind the weights; a count of 0 says that none were drawn."""
    sampling, count = recipe.resolved_sampling, recipe.n_triplets
    if recipe.resolved_target == "centred":
        sampling, count = "none", 0
    elif sampling == "all":
        count = 0
    elif given is not None:
        count = given.shape[1]
    about = {
        "sampling": sampling,
        "count": count,
        "hinge": recipe.hinge,
        "margin": recipe.margin,
        "seed": recipe.seed,
    }
    return about if given is None else {**about, "sha256": pairs_digest(given)}


def described(network: EmbeddingNetwork, identity: Identity) -> dict[str, Any]:
    """What the manifest says of a network: its identity, and what loads it again."""
    return {**identity.to_dict(), "loading": network.spec}


def encode(
    work: Work,
    encodings: Sequence[Encoding],
    gathered: Gathered,
    mean: np.ndarray,
    with_maps: bool,
    root: Path | None,
) -> PartData:
    """The images of the chunks as one part of an index.

    Args:
        work: with every chunk `weights` finished.
        encodings: of the index's layers.
        gathered: what the embedding pass found.
        mean: mean embedding the index was fitted with, `[D]`.
        with_maps: whether each image's own coarse map is kept.
        root: folder that the index's paths are relative to.
    """
    n = len(gathered.positions)
    marks = np.concatenate([work.scratch.read("embed", c, "marks")["marks"] for c in _filled(work)])
    items = [work.source.items[position] for position in gathered.positions]
    fields = [
        {
            name: work.scratch.array(f"{name}{number or ''}", field.dtype, (n, *field.shape))
            for name, field in encoding.fields.items()
        }
        for number, encoding in enumerate(encodings)
    ]
    counts = np.zeros(n, np.uint32)
    grid = own_grid(work, grid_of(work))
    maps = work.scratch.array("maps", "uint8", (n, *grid)) if with_maps else None
    scales = np.zeros(n, np.float32)
    done = 0
    for chunk in _filled(work):
        arrays = work.scratch.read("weights", chunk)
        rows = slice(done, done + len(arrays["counts"]))
        factors = []
        for number, encoding in enumerate(encodings):
            weights = np.asarray(arrays[weights_of_layer(number)])
            encoded, drawn_by = _encoded(work, encoding, weights, gathered.own[rows], mean)
            factors.append(drawn_by)
            for name, values in encoded.items():
                fields[number][name][rows] = values
        counts[rows] = np.minimum(arrays["counts"], np.iinfo(np.uint32).max)
        if maps is not None:
            maps[rows], scales[rows] = own_maps(work, chunk, factors[0])
        done = rows.stop
    return PartData(
        ids=[item.id for item in items],
        labels=[item.label for item in items],
        paths=[_stored_path(item.path, work.source.root, root) for item in items],
        embeddings=gathered.own,
        triplets_used=counts,
        fields=[dict(one) for one in fields],
        coarse=[None if maps is None else (maps, scales), *[None] * (len(encodings) - 1)],
        marks=marks if marks.any() else None,
    )


def _stored_path(path: str, root: Path | None, index_root: Path | None) -> str:
    """A source's path as an index keeps it: relative to the index's root where it lies below."""
    if not path or root == index_root:
        return path
    absolute = str((root or Path()).resolve() / path)
    return absolute if index_root is None else relative_path(absolute, index_root.resolve())


def grid_of(work: Work) -> tuple[int, int]:
    """(H, W) of the layer, the same for every image of a build."""
    found = {
        tuple(work.scratch.read("embed", chunk, "grid")["grid"].tolist()) for chunk in _filled(work)
    }
    if len(found) != 1:
        grids = ", ".join(f"{h} x {w}" for h, w in sorted(found))
        raise InputError(
            f"the layer's grid differs between images ({grids}); use a preprocessing that gives "
            "every image the same size"
        )
    height, width = found.pop()
    return height, width


def _encoded(
    work: Work, encoding: Encoding, weights: np.ndarray, embeddings: np.ndarray, mean: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of the fields, and what they say multiplies the kept activations; see `own_maps`."""
    if not (work.exact and isinstance(encoding, LowRank)):
        rows = encoding.encode(weights)
        return rows, encoding.decode(rows)
    rows = encoding.encode_codes(weights)
    codes = embeddings - mean if encoding.uses_embedding else encoding.stored_codes(rows)
    return rows, codes / np.prod(grid_of(work))


def _sample(work: Work, name: str) -> np.ndarray:
    """Weights of a seeded sample of the images, `[n ...]`, of the layer of that name."""
    arrays = [work.scratch.read("weights", c, name)[name] for c in _filled(work)]
    starts = np.cumsum([0, *map(len, arrays)])
    most = max(work.recipe.rank, min(SAMPLE, NUMBERS // arrays[0][0].size))
    places = sample_places(int(starts[-1]), work.recipe.seed, most)
    owner = np.searchsorted(starts, places, side="right") - 1
    return np.concatenate([array[places[owner == c] - starts[c]] for c, array in enumerate(arrays)])


def _filled(work: Work) -> list[int]:
    """Chunks in which at least one image could be read."""
    return [chunk for chunk in range(work.n_chunks) if len(work.embedded(chunk))]
