"""One query answered: its neighbors' weights transferred, trusted or not, and its map drawn."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import IndexFormatError, InputError
from ..index import Index, Neighbors, Selection
from ..index.calibration import evidence
from ..index.search import draw_negatives, named_neighbors
from ..ops import coefficients, picture_maps, rival_coefficients, signed_cams
from .drawing import may_follow
from .explanation import Explanation, Result
from .queries import Query
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .explainer import Explainer
    from .queries import Inputs

SAME_WEIGHTS = 1e-3
"""Length of the difference of two weights of length 1 that stored digits can account for."""
_LOG = logging.getLogger("embedcam")

Transfer = tuple[list[np.ndarray], np.ndarray, tuple[float, float] | tuple[None, None]]
"""Weights `[K]` by layer, norms of the first layer's stored weights `[n]`, trust and its low."""


class Fallback(Protocol):
    """Computes weights on a query itself, where transferred ones are not trusted."""

    def weights(
        self, inputs: Inputs, positives: np.ndarray, negatives: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Return weights `[K]` of each layer, deepest first.

        Of the network's input `[3 H W]`, with embeddings of its neighbors `[P D]` and of other
        images `[Q D]`.
        """


def answer(
    explainer: Explainer,
    snapshot: Snapshot,
    query: Query,
    near: Neighbors,
    n_shown: int,
    result: str | None = None,
    above: str | None = None,
) -> Explanation:
    """Return the explanation of one query by its neighbors.

    The first `n_shown` neighbors are results; match looks at the others too. With `result` that
    image's weights alone are transferred, less those of its rival `above`.
    """
    _check_grids(snapshot, query)
    index, match = snapshot.index, None
    matching = snapshot.matches.get("one" if len(near.positions) == 1 else "several")
    rows = index.select(near.positions)
    labels = rows.labels
    if matching is not None:
        match = matching.match(near.distances, labels)
    if n_shown < len(near.positions):
        near = near.first(n_shown)
        labels = labels[:n_shown]
        rows = index.select(near.positions)
    named: list[Result | None] = [None, None]
    if result is None:
        weights, norms, (trust, low) = _transferred(
            snapshot, rows, near.distances, explainer.transfer, query
        )
        used = rows
    else:
        norms = _norms(snapshot, rows)
        ids = [result] if above is None else [result, above]
        chosen = named_neighbors(index, query.embedding, ids)
        used = index.select(chosen.positions)
        # Trust is calibrated for maps that weights add up to, not for their differences.
        asked = None if above is not None else query
        weights, lengths, (trust, low) = _transferred(
            snapshot, used, chosen.distances, explainer.transfer, asked
        )
        named[: len(ids)] = _results(snapshot, used, chosen, lengths)
    direct, fallback = False, explainer.fallback
    doubted = low is not None and low < explainer.trusted_from
    if doubted and fallback is not None and query.inputs is not None:
        direct = True
        _LOG.debug("trust %.2f, one in ten below %.2f: weights computed", trust, low)
        left_out = [*rows.positions, *used.positions]
        negatives = negatives_for(index, left_out, [*labels, *used.labels])
        weights = list(fallback.weights(query.inputs, used.embeddings, negatives))
    cam, signed, features = _maps(weights, query)
    extent, ids = None, rows.ids
    if query.picture is not None and snapshot.preprocess is not None:
        extent = snapshot.preprocess.extent(*query.picture.size)
    return Explanation(
        cam=cam,
        signed_cam=signed,
        weights=weights[0],
        features=features,
        ids=ids,
        labels=labels,
        paths=picture_paths(snapshot, rows),
        distances=near.distances,
        similarities=near.similarities,
        neighbor_cams=rows.coarse(),
        explained=list(ids) if result is None else [result],
        transfer=explainer.transfer,
        extent=extent,
        image=query.picture,
        preprocess=snapshot.preprocess,
        root=snapshot.root or Path(),
        only_below=snapshot.only_below,
        neighbor_norms=norms,
        layer_weights=dict(zip(snapshot.layers, weights, strict=True)),
        trust=trust,
        trust_low=low,
        trusted_from=explainer.trusted_from,
        direct=direct,
        asked=named[0],
        rival=named[1],
        shared=snapshot.shared is not None,
        prototypes=snapshot.prototypes,
        max_pixels=explainer.max_pixels,
        marks=rows.marks if snapshot.marked else None,
        match=match,
    )


def picture_paths(snapshot: Snapshot, rows: Selection) -> list[str]:
    """Return where the rows' pictures lie, `[n]`; "" for those that name no file."""
    if snapshot.root is None or snapshot.root == Path():
        return rows.paths
    root = str(snapshot.root)
    return [os.path.join(root, path) if path else path for path in rows.paths]


def without_file(
    snapshot: Snapshot, near: Neighbors, file: str | Path | None, most: int
) -> Neighbors:
    """Return the first `most` of a query's neighbors that are not the query's own file."""
    root, paths = (
        snapshot.root or Path(),
        picture_paths(snapshot, snapshot.index.select(near.positions)),
    )
    kept = [
        place
        for place, path in enumerate(paths)
        if file is None
        or not may_follow(path, root, snapshot.only_below)
        or not _same_file(path, file)
    ][:most]
    if not kept:
        raise InputError(
            f"nothing but the query itself comes back ({file}); leave out --exclude-query "
            "(exclude_query=True), or ask an index of more images"
        )
    return Neighbors(near.positions[kept], near.distances[kept], near.similarities[kept])


def negatives_for(
    index: Index, left_out: Sequence[int], labels: Sequence[str | None]
) -> np.ndarray:
    """Return embeddings of seeded random images that a query is told from, `[Q D]`.

    None is among the rows `left_out`; one of the neighbors' `labels` only where no others are left.
    """
    live = index.live_positions()
    live = live[~np.isin(live, left_out)]
    if len(live) == 0:
        raise InputError(
            "the index holds no image but the neighbours, so nothing is left to tell the query "
            "from; ask for fewer neighbours, or leave out fallback"
        )
    places = draw_negatives(live, labels, lambda rows: index.select(rows).labels)
    return index.embeddings(places)


def _same_file(one: str, other: str | Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _results(
    snapshot: Snapshot, rows: Selection, near: Neighbors, norms: np.ndarray
) -> list[Result]:
    paths, cams, marks = picture_paths(snapshot, rows), rows.coarse(), rows.marks
    return [
        Result(
            name,
            rows.labels[place],
            paths[place],
            float(near.distances[place]),
            float(near.similarities[place]),
            None if cams is None else cams[place],
            float(norms[place]),
            marks[place] if snapshot.marked else None,
        )
        for place, name in enumerate(rows.ids)
    ]


def _maps(weights: Sequence[np.ndarray], query: Query) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.errstate(over="ignore", invalid="ignore"):
        cam, signed, features = picture_maps(weights, query.activations, query.finer, query.size)
    if not np.isfinite(cam).all():
        weight, activation = (
            max(float(np.abs(one).max()) for one in arrays)
            for arrays in (weights, query.activations)
        )
        raise InputError(
            f"the map overflows: activations up to {activation:.3g} with weights up to "
            f"{weight:.3g} go beyond float32; scale the activations down, or build the index again"
        )
    return cam, signed, features


def _check_grids(snapshot: Snapshot, query: Query) -> None:
    """Refuse activations on another grid than the one that weights by position belong to."""
    for encoding, activations in zip(snapshot.encodings, query.activations, strict=True):
        if encoding.grid is not None and activations.shape[1:] != encoding.grid:
            here, kept = (f"{h} x {w}" for h, w in (activations.shape[1:], encoding.grid))
            raise InputError(
                f"the activations lie on a grid of {here}, and this index keeps weights by position"
                f" on one of {kept}; give the query at the input size that the index was built with"
            )


def _finite_norms(snapshot: Snapshot, norms: np.ndarray) -> np.ndarray:
    if not all(map(math.isfinite, norms.tolist())):
        raise IndexFormatError(
            f"{snapshot.index.path}: stored weights hold a NaN or an infinity; `embedcam verify` "
            "says which file is damaged"
        )
    return norms


def _norms(snapshot: Snapshot, rows: Selection) -> np.ndarray:
    """Return the L2 norms of the first layer's stored weights of rows, `[n]`."""
    encoding = snapshot.encodings[0]
    return _finite_norms(snapshot, encoding.norms(encoding.unpack(rows.fields(0))))


def _transferred(
    snapshot: Snapshot, rows: Selection, distances: np.ndarray, mode: str, query: Query | None
) -> Transfer:
    """Return a query's weights from those of rows at squared distances.

    Without a query the rows are a result and its rival, whose weights are subtracted.
    """
    weights: list[np.ndarray] = []
    first_norms = np.zeros(0)
    trust: tuple[float, float] | tuple[None, None] = (None, None)
    for number, encoding in enumerate(snapshot.encodings):
        fields = rows.fields(number)
        unpacked = encoding.unpack(fields)
        norms = _finite_norms(snapshot, encoding.norms(unpacked))
        if query is None:
            shares = rival_coefficients(norms)
        else:
            shares = coefficients(norms, distances, mode)
        combined = encoding.combine(unpacked, shares)
        if query is None and norms.all() and np.linalg.norm(combined) <= SAME_WEIGHTS:
            combined = np.zeros_like(combined)  # A map of rounding would look like evidence.
        weights.append(combined)
        if number > 0:
            continue
        first_norms = norms
        calibration = snapshot.calibrations.get("one" if len(distances) == 1 else "several")
        if calibration is not None and query is not None:
            # What overflows, of weights that are no honest index's, is not trusted.
            with np.errstate(over="ignore", invalid="ignore"):
                raw = signed_cams(encoding.decode(fields), query.activations[0])
                norm = float(np.linalg.norm(combined))
                seen = evidence(raw, shares, norm, distances)
            trust = calibration.trust(seen, float(np.min(distances)))
    return weights, first_norms, trust
