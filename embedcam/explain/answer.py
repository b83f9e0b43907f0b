"""Queries answered: neighbors' weights transferred, trusted or not, and the maps drawn."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import IndexFormatError, InputError
from ..images import PLACE, located
from ..index import Index, Neighbors, Stored
from ..index.calibration import TEN
from ..index.in_memory import Row, Rows, listed
from ..index.search import draw_negatives, find_neighbors, named_neighbors
from ..ops import coefficients, picture_maps, rival_coefficients, signed_cams
from .explanation import Explanation, Result
from .queries import Query
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .explainer import Explainer
    from .queries import Inputs

SAME_WEIGHTS = 1e-3
"""Length of the difference of two weights of length 1 that stored digits can account for."""
_LOG = logging.getLogger("embedcam")


class Fallback(Protocol):
    """Computes weights on a query itself, where transferred ones are not trusted."""

    def weights(
        self, inputs: Inputs, positives: np.ndarray, negatives: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Return weights `[K]` of each layer, deepest first, of an input `[3 H W]`.

        `positives` `[P D]` are embeddings of its neighbors, `negatives` `[Q D]` of other images.
        """


class RowSource(Protocol):
    """A database that keeps the rows of an index, such as `embedcam.stores.open_store` opens."""

    def search(self, embedding: np.ndarray, n: int) -> Rows:
        """Return the n rows nearest to a query `[D]`."""
        ...

    def fetch(self, ids: Sequence[str]) -> Rows:
        """Return the rows of these ids; those that it does not know are left out."""
        ...


def answers(
    explainer: Explainer,
    snapshot: Snapshot,
    queries: Sequence[Query],
    n_shown: int,
    neighbors: Sequence[Sequence[str]] | None,
    result: str | None,
    above: str | None,
    files: Sequence[str | Path | None] | None = None,
) -> list[Explanation]:
    """Search for all queries at once, or take the neighbors named, and explain each.

    With `result` that image's weights alone are transferred, less those of its rival `above`; an
    indexed image whose file is one of the queries' `files` is none of that query's neighbors. Of a
    model and a store each query is explained by the rows that the store returns for it.
    """
    if not queries:
        return []
    n_searched = count_searched(snapshot, n_shown)
    if explainer.store is not None and not snapshot.index.in_memory:
        wanted = n_searched + (files is not None)
        each = []
        for place, query in enumerate(queries):
            ids = None if neighbors is None else [neighbors[place]]
            file = None if files is None else [files[place]]
            near = rows_of(explainer.store, query.embedding, wanted, ids, (result, above))
            rows = snapshot.with_rows(near, wanted)
            each += answers(explainer, rows, [query], n_shown, ids, result, above, file)
        return each
    if neighbors is not None:
        n_shown = n_searched = len(snapshot.index)
    embeddings = np.array([query.embedding for query in queries])
    found = find_neighbors(snapshot.index, embeddings, n_searched + (files is not None), neighbors)
    if files is not None:
        pairs = zip(found, files, strict=True)
        found = [_without_file(snapshot, near, file, n_searched) for near, file in pairs]
    named = [] if result is None else [result] if above is None else [result, above]
    return [
        _answer(explainer, snapshot, query, near, n_shown, named)
        for query, near in zip(queries, found, strict=True)
    ]


def count_searched(snapshot: Snapshot, n_shown: int) -> int:
    """Return how many neighbors a query is explained by, of which some are shown."""
    # Match is calibrated on ten neighbors, however many are shown.
    return max(n_shown, TEN) if snapshot.matches else n_shown


def rows_of(
    store: RowSource,
    embedding: np.ndarray,
    n_wanted: int,
    neighbors: Sequence[Sequence[str]] | None,
    named: Sequence[str | None],
) -> list[Row]:
    """Return a query's rows: searched, or those of the ids, and those of the `named` ones."""
    found = listed(store.search(embedding, n_wanted) if neighbors is None else [])
    known = {row.get("id") for row in found}
    ids = [*(() if neighbors is None else neighbors[0]), *filter(None, named)]
    if more := [name for name in dict.fromkeys(ids) if name not in known]:
        found += listed(store.fetch(more))
    return found


def _answer(
    explainer: Explainer,
    snapshot: Snapshot,
    query: Query,
    near: Neighbors,
    n_shown: int,
    named: Sequence[str],
) -> Explanation:
    """Explain a query: its first `n_shown` neighbors are shown, and all of them tell match."""
    _check_grids(snapshot, query)
    index, match, asked = snapshot.index, None, list[Result]()
    rows = index.fetch(near.positions, n_shown)
    matching = snapshot.matches.get("one" if len(rows.labels) == 1 else "several")
    if matching is not None and (index.is_whole or len(rows.labels) >= TEN):
        match = matching.match(near.distances[:TEN], rows.labels[:TEN])
    near, labels = Neighbors(*(values[:n_shown] for values in near)), rows.labels[:n_shown]
    used, chosen = rows, near
    if named:
        chosen = named_neighbors(index, query.embedding, named)
        used = index.fetch(chosen.positions)
    # Trust is calibrated for maps that weights add up to, not for their differences.
    rival = len(named) > 1
    weights, norms, (trust, low) = _transferred(
        snapshot, used, chosen.distances, explainer.transfer, None if rival else query
    )
    if named:
        paths, marks = picture_paths(snapshot, used.paths), used.marks if snapshot.marked else None
        columns = used.labels, paths, chosen.distances, chosen.similarities
        asked = Result.of(used.ids, *columns, used.maps, norms, marks)
        encoding = snapshot.encodings[0]
        norms = encoding.norms(encoding.unpack(rows.fields[0]))
    direct, fallback = False, explainer.fallback
    doubted = low is not None and low < explainer.trusted_from
    if doubted and fallback is not None and query.inputs is not None:
        direct = True
        _LOG.debug("trust %.2f, one in ten below %.2f: weights computed", trust, low)
        left_out = [*near.positions, *chosen.positions]
        negatives = negatives_for(index, left_out, [*labels, *used.labels])
        positives = index.embeddings(chosen.positions)
        weights = list(fallback.weights(query.inputs, positives, negatives))
    cam, signed, features = _maps(weights, query)
    extent = None
    if query.picture is not None and snapshot.preprocess is not None:
        extent = snapshot.preprocess.extent(*query.picture.size)
    return Explanation(
        cam=cam,
        signed_cam=signed,
        weights=weights[0],
        features=features,
        ids=rows.ids,
        labels=labels,
        paths=picture_paths(snapshot, rows.paths),
        distances=near.distances,
        similarities=near.similarities,
        neighbor_cams=rows.maps,
        explained=[*named[:1]] or [*rows.ids],
        transfer=explainer.transfer,
        extent=extent,
        image=query.picture,
        preprocess=snapshot.preprocess,
        root=snapshot.root,
        only_below=snapshot.only_below,
        neighbor_norms=norms,
        layer_weights=dict(zip(snapshot.layers, weights, strict=True)),
        trust=trust,
        trust_low=low,
        trusted_from=explainer.trusted_from,
        direct=direct,
        asked=asked[0] if asked else None,
        rival=asked[1] if rival else None,
        shared=snapshot.shared is not None,
        prototypes=snapshot.prototypes,
        max_pixels=explainer.max_pixels,
        marks=rows.marks if snapshot.marked else None,
        match=match,
    )


def picture_paths(snapshot: Snapshot, paths: Sequence[str]) -> list[str]:
    """Return where indexed images' pictures lie, `[n]`; "" for those that name no file."""
    folder, root = os.path.join(snapshot.prefix, ""), snapshot.root
    return [
        located(root, path)
        if PLACE.match(path)
        else (path if path[:1] in ("", "/") else folder + path)
        for path in paths
    ]


def negatives_for(
    index: Index, left_out: Sequence[int], labels: Sequence[str | None]
) -> np.ndarray:
    """Return embeddings `[Q D]` of seeded random images to tell a query from.

    None is of the rows `left_out`; one of the neighbors' `labels` only where no others are left.
    """
    live = index.live_positions()
    live = live[~np.isin(live, left_out)]
    if len(live) == 0:
        raise InputError(
            "the index holds no image but the neighbours, so nothing is left to tell the query "
            "from; ask for fewer neighbours, or leave out fallback"
        )
    return index.embeddings(draw_negatives(live, labels, lambda rows: index.select(rows).labels))


def _without_file(
    snapshot: Snapshot, near: Neighbors, file: str | Path | None, most: int
) -> Neighbors:
    """Return the first `most` of a query's neighbors that are not the query's own file."""

    def is_own(path: str) -> bool:
        if file is None or not snapshot.follows(path):
            return False
        try:
            return os.path.samefile(path, file)
        except (OSError, ValueError):
            return False

    paths = picture_paths(snapshot, snapshot.index.paths[near.positions])
    kept = [row for row, path in enumerate(paths) if not is_own(path)][:most]
    if not kept:
        raise InputError(
            f"nothing but the query itself comes back ({file}); leave out --exclude-query "
            "(exclude_query=True), or ask an index of more images"
        )
    return Neighbors(*(values[kept] for values in near))


def _maps(weights: Sequence[np.ndarray], query: Query) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.errstate(over="ignore", invalid="ignore"):
        maps = picture_maps(weights, query.activations, query.finer, query.size)
    if not np.isfinite(maps[0].max()):
        weight, activation = (
            max(float(np.abs(one).max()) for one in arrays)
            for arrays in (weights, query.activations)
        )
        raise InputError(
            f"the map overflows: activations up to {activation:.3g} with weights up to "
            f"{weight:.3g} go beyond float32; scale the activations down, or build the index again"
        )
    return maps


def _check_grids(snapshot: Snapshot, query: Query) -> None:
    """Refuse activations on another grid than the one that weights by position belong to."""
    for encoding, activations in zip(snapshot.encodings, query.activations, strict=True):
        if encoding.grid is not None and activations.shape[1:] != encoding.grid:
            here, kept = (f"{h} x {w}" for h, w in (activations.shape[1:], encoding.grid))
            raise InputError(
                f"the activations lie on a grid of {here}, and this index keeps weights by position"
                f" on one of {kept}; give the query at the input size that the index was built with"
            )


def _transferred(
    snapshot: Snapshot, rows: Stored, distances: np.ndarray, mode: str, query: Query | None
) -> tuple[list[np.ndarray], np.ndarray, tuple[float, float] | tuple[None, None]]:
    """Return weights `[K]` by layer, norms of the first layer's `[n]`, and trust with its low.

    Without a query the rows are a result and its rival, whose weights are subtracted.
    """
    calibration, shares_of = None, rival_coefficients
    if query is not None:
        calibration = snapshot.calibrations.get("one" if len(distances) == 1 else "several")
        shares_of = partial(coefficients, distances=distances, mode=mode)
    try:
        layers = [
            encoding.transfer(fields, shares_of, decoded=calibration is not None)
            for encoding, fields in zip(snapshot.encodings, rows.fields, strict=True)
        ]
    except IndexFormatError as error:
        raise IndexFormatError(f"{snapshot.index.path}: {error}") from None
    weights, first = [layer.weights for layer in layers], layers[0]
    for place, layer in enumerate(layers if query is None else ()):
        if layer.norms.all() and np.linalg.norm(layer.weights) <= SAME_WEIGHTS:
            # A map of rounding would look like evidence.
            weights[place] = np.zeros_like(layer.weights)
    if calibration is None or query is None or first.each is None:
        return weights, first.norms, (None, None)
    # What overflows, of weights that are no honest index's, is not trusted.
    with np.errstate(over="ignore", invalid="ignore"):
        raw = signed_cams(first.each, query.activations[0])
        length = float(np.linalg.norm(weights[0]))
        return weights, first.norms, calibration.of_query(raw, first.shares, length, distances)
