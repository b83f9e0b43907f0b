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


class Fallback(Protocol):
    """Computes weights on a query itself, where transferred ones are not trusted."""

    def weights(
        self, inputs: Inputs, positives: np.ndarray, negatives: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Return weights `[K]` of each layer, deepest first, of an input `[3 H W]`.

        `positives` `[P D]` are embeddings of its neighbors, `negatives` `[Q D]` of other images.
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
    """Return the explanation of a query: the first `n_shown` neighbors are shown, all tell match.

    With `result` that image's weights alone are transferred, less those of its rival `above`.
    """
    _check_grids(snapshot, query)
    index, match = snapshot.index, None
    rows = index.select(near.positions)
    labels = rows.labels
    matching = snapshot.matches.get("one" if len(labels) == 1 else "several")
    if matching is not None:
        match = matching.match(near.distances, labels)
    if n_shown < len(labels):
        near, labels = near.first(n_shown), labels[:n_shown]
        rows = index.select(near.positions)
    used, distances = rows, near.distances
    if result is not None:
        pair = [result] if above is None else [result, above]
        chosen = named_neighbors(index, query.embedding, pair)
        used, distances = index.select(chosen.positions), chosen.distances
    # Trust is calibrated for maps that weights add up to, not for their differences.
    weights, used_norms, (trust, low) = _transferred(
        snapshot, used, distances, explainer.transfer, query if above is None else None
    )
    norms, named = used_norms, list[Result]()
    if result is not None:
        norms = _stored(snapshot, rows, 0)[2]
        columns = used.labels, picture_paths(snapshot, used), distances, chosen.similarities
        marks = used.marks if snapshot.marked else None
        named = Result.of(used.ids, *columns, used.coarse(), used_norms, marks)
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
        asked=named[0] if named else None,
        rival=named[1] if len(named) > 1 else None,
        shared=snapshot.shared is not None,
        prototypes=snapshot.prototypes,
        max_pixels=explainer.max_pixels,
        marks=rows.marks if snapshot.marked else None,
        match=match,
    )


def picture_paths(snapshot: Snapshot, rows: Selection) -> list[str]:
    """Return where the rows' pictures lie, `[n]`; "" for those that name no file."""
    root = str(snapshot.root or "")
    return [os.path.join(root, path) if path else path for path in rows.paths]


def without_file(
    snapshot: Snapshot, near: Neighbors, file: str | Path | None, most: int
) -> Neighbors:
    """Return the first `most` of a query's neighbors that are not the query's own file."""
    paths = picture_paths(snapshot, snapshot.index.select(near.positions))
    kept = [row for row, path in enumerate(paths) if not _is_file(snapshot, path, file)][:most]
    if not kept:
        raise InputError(
            f"nothing but the query itself comes back ({file}); leave out --exclude-query "
            "(exclude_query=True), or ask an index of more images"
        )
    return Neighbors(near.positions[kept], near.distances[kept], near.similarities[kept])


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


def _is_file(snapshot: Snapshot, path: str, file: str | Path | None) -> bool:
    if file is None or not may_follow(path, snapshot.root or Path(), snapshot.only_below):
        return False
    try:
        return os.path.samefile(path, file)
    except (OSError, ValueError):
        return False


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


def _stored(
    snapshot: Snapshot, rows: Selection, layer: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return a layer's stored fields, unpacked, and the L2 norms of its weights `[n]`."""
    encoding, fields = snapshot.encodings[layer], rows.fields(layer)
    unpacked = encoding.unpack(fields)
    norms = encoding.norms(unpacked)
    if not all(map(math.isfinite, norms.tolist())):
        raise IndexFormatError(
            f"{snapshot.index.path}: stored weights hold a NaN or an infinity; `embedcam verify` "
            "says which file is damaged"
        )
    return fields, unpacked, norms


def _transferred(
    snapshot: Snapshot, rows: Selection, distances: np.ndarray, mode: str, query: Query | None
) -> tuple[list[np.ndarray], np.ndarray, tuple[float, float] | tuple[None, None]]:
    """Return weights `[K]` by layer, norms of the first layer's `[n]`, and trust with its low.

    Without a query the rows are a result and its rival, whose weights are subtracted.
    """
    layers = [_stored(snapshot, rows, number) for number in range(len(snapshot.encodings))]
    weights: list[np.ndarray] = []
    for encoding, (_, unpacked, norms) in zip(snapshot.encodings, layers, strict=True):
        if query is not None:
            weights.append(encoding.combine(unpacked, coefficients(norms, distances, mode)))
            continue
        difference = encoding.combine(unpacked, rival_coefficients(norms))
        if norms.all() and np.linalg.norm(difference) <= SAME_WEIGHTS:
            difference = np.zeros_like(difference)  # A map of rounding would look like evidence.
        weights.append(difference)
    fields, _, norms = layers[0]
    calibration = snapshot.calibrations.get("one" if len(distances) == 1 else "several")
    if calibration is None or query is None:
        return weights, norms, (None, None)
    # What overflows, of weights that are no honest index's, is not trusted.
    with np.errstate(over="ignore", invalid="ignore"):
        raw = signed_cams(snapshot.encodings[0].decode(fields), query.activations[0])
        shares = coefficients(norms, distances, mode)
        seen = evidence(raw, shares, float(np.linalg.norm(weights[0])), distances)
    return weights, norms, calibration.trust(seen, float(np.min(distances)))
