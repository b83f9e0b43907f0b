"""From the finished chunks of a plan to an index: embeddings, encoding, stored maps, header."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..images import Root, root_text
from ..images.places import stored_path
from ..images.progress import Advance
from ..images.texts import LabelColumn, Texts, in_runs
from ..index import Index, PartData
from ..index.calibration import Calibration, MatchCalibration
from ..index.encoding import Dense, Encoding, LowRank, TopM, fit_pca
from ..recipe.recipe import Recipe
from .cotangents import AnchorCotangents, coded_labels
from .plan import Plan
from .shard import map_chunk
from .strategies import HeadCodes, is_derived, weights_of_layer
from .triplets import pairs_digest, sample_of, total_of
from .trust import View, calibrate_trust, forwarded, in_closed_form, trust_rows

SAMPLE, NUMBERS = 2048, 1 << 25
"""Weights that a basis is fitted on, at most: images, and numbers in all (but `rank` images)."""
MOST_COUNTED = np.iinfo(np.uint32).max
_BLOCK, _VIEWED = 1 << 14, 64
_NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class EmbeddedImages:
    """What the embedding pass gave.

    `positions` `[n]` are places in the source of the images that could be used, `ids`, `paths` and
    `labels` theirs; `embeddings` `[N D]` and `codes` of labels `[N]` of the images in the index
    already, then theirs, `mean` `[D]` of the first build; `skipped` (id, reason) of the others.
    """

    positions: np.ndarray
    ids: Texts
    paths: Texts
    labels: LabelColumn
    embeddings: np.ndarray
    mean: np.ndarray
    codes: np.ndarray | None
    skipped: list[tuple[str, str]]
    n_cropped: int

    @property
    def n_before(self) -> int:
        """Images that are in the index already."""
        return len(self.embeddings) - len(self.positions)

    @property
    def new(self) -> np.ndarray:
        """Embeddings of the new images alone, `[n D]`."""
        return self.embeddings[self.n_before :]


def gather(plan: Plan, index: Index | None = None, live: np.ndarray = _NO_ROWS) -> EmbeddedImages:
    """Collect the chunks of the embedding pass behind the index's `live` rows."""
    chunks, skipped = plan.chunks, plan.skipped()
    positions = np.concatenate([plan.embedded(chunk) for chunk in chunks])
    if not len(positions):
        first = skipped[0][1]
        raise InputError(f"none of the {len(skipped)} images could be used; the first: {first}")
    new = plan.columns("embed", "embedding")
    shape = (len(live) + len(positions), new[0].shape[1])
    embeddings = plan.checkpoint.array("float32", shape)
    np.concatenate(new, out=embeddings[len(live) :])
    listed = plan.source.items
    if len(positions) < len(listed):
        listed = listed.only(positions)
    if index is None:
        mean = (total_of(embeddings) / len(embeddings)).astype(np.float32)
    else:
        mean = index.fitted("embedding_mean")
        for start in range(0, len(live), _BLOCK):
            rows = live[start : start + _BLOCK]
            embeddings[start : start + len(rows)] = index.embeddings(rows)
    labels, names = listed.labels, listed.ids
    if len(live):
        assert index is not None
        labels = LabelColumn.of(chain(in_runs(index.labels, live), labels))
        names = Texts.of(chain(in_runs(index.ids, live), names))
    codes = coded_labels(plan.recipe, labels, names)
    n_cropped = sum(int(plan.checkpoint.column("embed", c, "cropped")[0]) for c in chunks)
    columns = positions, listed.ids, listed.paths, listed.labels
    return EmbeddedImages(*columns, embeddings, mean, codes, skipped, n_cropped)


def anchors_of(
    plan: Plan,
    embedded: EmbeddedImages,
    given: np.ndarray | None,
    statistics: Mapping[str, np.ndarray] | None = None,
) -> AnchorCotangents:
    """Return the cotangents of all images; triplets that are given are places in the source."""
    if given is not None and embedded.skipped:
        places = np.full(len(plan.source), -1)
        places[embedded.positions] = np.arange(len(embedded.positions))
        given = places[np.asarray(given)[embedded.positions]]
        if (lost := (given < 0).any((1, 2))).any():
            raise InputError(
                f"the triplets of image {embedded.ids[int(lost.argmax())]!r} name an image that "
                "could not be read (skipped: "
                f"{', '.join(repr(name) for name, _ in embedded.skipped[:3])}); give it others"
            )
    of = (plan.recipe, embedded.embeddings, embedded.codes, embedded.mean, given, statistics)
    return AnchorCotangents(*of, folder=plan.checkpoint.path)


def fit_encodings(plan: Plan, mean: np.ndarray) -> list[Encoding]:
    """Return the encoding of each layer of a new index, fitted where it has something to fit."""
    strategy, grid = plan.strategy, grid_of(plan)
    matrix = strategy.matrix if isinstance(strategy, HeadCodes) else None
    encodings = []
    for name in map(weights_of_layer, range(max(1, len(strategy.layers)))):
        width, sample = plan.columns("weights", name)[0].shape[1], partial(_sample, plan, name)
        of = (plan.recipe, matrix, grid, mean, plan.network.normalize, sample, width)
        encodings.append(make_encoding(*of))
    return encodings


def make_encoding(
    recipe: Recipe,
    matrix: np.ndarray | None,
    grid: tuple[int, int],
    mean: np.ndarray,
    normalize: bool,
    sample: Callable[[], np.ndarray],
    n_channels: int,
) -> Encoding:
    """Return the encoding a recipe asks for; `sample` gives weights `[n K ...]` to fit on.

    `matrix` is W `[D K]` where dy/dz in it is the whole weight vector.
    """
    if matrix is not None:
        basis = matrix / np.prod(grid)
        # dy/dz is then embedding - mean: nothing that is not stored already.
        derived = is_derived(recipe, normalize)
        offset = -mean @ basis if derived else np.zeros(basis.shape[1])
        return LowRank(basis, offset, "head", "embedding" if derived else "stored", recipe.dtype)
    if recipe.encoding == "low-rank":
        return fit_pca(sample(), recipe.rank, recipe.dtype)
    if recipe.encoding == "dense":
        return Dense(n_channels, recipe.dtype)
    return TopM(n_channels, recipe.m, recipe.by, recipe.dtype)


def _sample(plan: Plan, name: str) -> np.ndarray:
    """Return weights of a sample of the images, `[n ...]`, of the layer of that name."""
    arrays, ids = plan.columns("weights", name), plan.source.ids
    starts = np.cumsum([0, *map(len, arrays)])
    most = max(plan.recipe.rank, min(SAMPLE, NUMBERS // arrays[0][0].size))
    if starts[-1] < len(ids):
        ids = ids.select(np.concatenate([plan.embedded(chunk) for chunk in plan.chunks]))
    places = sample_of(ids, plan.recipe.seed, most)
    owner = np.searchsorted(starts, places, side="right") - 1
    return np.concatenate([array[places[owner == c] - starts[c]] for c, array in enumerate(arrays)])


def encode_rows(
    encoding: Encoding,
    weights: np.ndarray,
    embeddings: np.ndarray,
    mean: np.ndarray,
    grid: tuple[int, int],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return rows of the encoding's fields, and what they say multiplies cached activations.

    In the head's own matrix W `weights` are dy/dz, which multiply W A.
    """
    if not isinstance(encoding, LowRank) or encoding.origin != "head":
        rows = encoding.encode(weights)
        return rows, encoding.decode(rows)
    rows = encoding.encode_codes(weights)
    codes = embeddings - mean if encoding.uses_embedding else encoding.stored_codes(rows)
    return rows, codes / (grid[0] * grid[1])


def encode(
    plan: Plan,
    encodings: Sequence[Encoding],
    embedded: EmbeddedImages,
    with_maps: bool,
    root: Root | None,
    progressed: Advance,
) -> PartData:
    """Return the images of the chunks as one part of an index; paths are relative to `root`."""
    n, grid = len(embedded.positions), grid_of(plan)
    marks = plan.checkpoint.array("uint32", (n, 4))
    np.concatenate(plan.columns("embed", "marks"), out=marks)
    array = plan.checkpoint.array
    fields = [
        {name: array(one.dtype, (n, *one.shape)) for name, one in encoding.fields.items()}
        for encoding in encodings
    ]
    counts, scales = np.zeros(n, np.uint32), np.zeros(n, np.float32)
    map_shape = (n, *plan.strategy.map_grid(grid))
    maps = plan.checkpoint.array("uint8", map_shape) if with_maps else None
    done = 0
    for chunk in plan.filled():
        arrays = plan.checkpoint.read("weights", chunk)
        rows = slice(done, done + len(arrays["counts"]))
        factors = []
        for number, encoding in enumerate(encodings):
            weights = np.asarray(arrays[weights_of_layer(number)])
            own = encode_rows(encoding, weights, embedded.new[rows], embedded.mean, grid)
            factors.append(own[1])
            for name, values in own[0].items():
                fields[number][name][rows] = values
        counts[rows] = np.minimum(arrays["counts"], MOST_COUNTED)
        if maps is not None:
            maps[rows], scales[rows] = map_chunk(plan, chunk, factors[0])
        done = rows.stop
        progressed(len(arrays["counts"]))
    return PartData(
        ids=embedded.ids,
        labels=embedded.labels,
        paths=_stored_paths(embedded.paths, plan.source.root, root),
        embeddings=embedded.new,
        triplets_used=counts,
        fields=list(fields),
        coarse=[None if maps is None else (maps, scales), *[None] * (len(encodings) - 1)],
        marks=marks if marks.any() else None,
    )


def _stored_paths(paths: Texts, root: Root | None, index_root: Root | None) -> Texts:
    """Return a source's paths as an index keeps them: relative to the index's root if below it."""
    roots = root_text(root), root_text(index_root)
    return paths if roots[0] == roots[1] else Texts.of(stored_path(path, *roots) for path in paths)


def grid_of(plan: Plan) -> tuple[int, int]:
    """Return (H, W) of the layer, the same for every image of a build."""
    grids = {tuple(grid.tolist()) for grid in plan.columns("embed", "grid")}
    if len(grids) != 1:
        listed = ", ".join(f"{h} x {w}" for h, w in sorted(grids))
        raise InputError(
            f"the layer's grid differs between images ({listed}); use a preprocessing that gives "
            "every image the same size"
        )
    ((height, width),) = grids
    return height, width


def calibrate_build(
    plan: Plan, encodings: Sequence[Encoding], embedded: EmbeddedImages, part: PartData
) -> dict[str, Calibration] | None:
    """Calibrate trust for a new index, with the activations that its build cached."""
    rows = trust_rows(part.ids, plan.recipe, plan.network)

    def fields(layer: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
        stored = {name: np.asarray(array)[chosen] for name, array in part.fields[layer].items()}
        return {**stored, "embedding": embedded.new[chosen]}

    with plan.stages("trust", len(rows)) as progressed:
        of = (plan.recipe, plan.network, encodings, fields, embedded.new, part.labels, rows)
        return calibrate_trust(*of, _views(plan, embedded, rows), progressed)


def _views(plan: Plan, embedded: EmbeddedImages, rows: np.ndarray) -> Iterator[View]:
    """Yield views of the rows from cached activations, or where these are missing by a forward."""
    closed, strategy, first = in_closed_form(plan.recipe, plan.network), plan.strategy, 0
    for chunk in plan.chunks:
        n = len(plan.embedded(chunk))
        chosen = rows[(rows >= first) & (rows < first + n)] - first
        if len(chosen):
            arrays = plan.checkpoint.read(strategy.stage, chunk)
            if not closed or "activations" not in arrays:
                batches = plan.batches(embedded.positions[first + chosen])
                yield from forwarded(plan.network, [name for name, _ in strategy.layers], batches)
            else:
                # A block at a time: NumPy widens halves twenty times slower than torch does.
                for start in range(0, len(chosen), _VIEWED):
                    some = chosen[start : start + _VIEWED]
                    halves = torch.from_numpy(np.array(arrays["activations"][some])).float()
                    for maps, peak in zip(halves.numpy(), arrays["peaks"][some], strict=True):
                        yield View([maps * np.float32(peak)], strategy.mixed)
        first += n


def header(
    recipe: Recipe,
    network: dict[str, Any] | None,
    root: Root | None,
    width: int,
    normalize: bool,
    layers: list[dict[str, Any]],
    *,
    files: str | None = None,
    given: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return what the manifest of a new index says (index/README.md); `files` is a digest."""
    images = {"root": root_text(root), "files_sha256": files}
    centred, sampling = recipe.resolved_target == "centred", recipe.resolved_sampling
    n_drawn = recipe.n_triplets if given is None else given.shape[1]
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
        "triplets": {
            "sampling": "none" if centred else sampling,
            # 0 says that none were drawn.
            "count": 0 if centred or sampling == "all" else n_drawn,
            "hinge": recipe.hinge,
            "margin": recipe.margin,
            "seed": recipe.seed,
            **({} if given is None else {"sha256": pairs_digest(given)}),
        },
        "layers": layers,
    }


def plain(
    calibrations: Mapping[str, Calibration | MatchCalibration] | None,
) -> dict[str, dict[str, Any]] | None:
    """Return calibrations by name as a manifest keeps them."""
    if calibrations is None:
        return None
    return {name: one.to_dict() for name, one in calibrations.items()}


def layer_entry(
    name: str, grid: tuple[int, int], encoding: Encoding, coarse: tuple[int, int] | None
) -> dict[str, Any]:
    """Return what the manifest says of one layer."""
    return {
        "name": name,
        "channels": encoding.n_channels,
        "grid": list(grid),
        "cells": grid[0] * grid[1],
        "encoding": encoding.spec(),
        "coarse_grid": None if coarse is None else list(coarse),
    }
