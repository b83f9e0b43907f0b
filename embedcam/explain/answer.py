"""One query answered: its neighbours' weights transferred, trusted or not, and its map drawn."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import IndexFormatError, InputError
from ..index import Index, Neighbors, Selection
from ..index.calibration import evidence
from ..index.search import draw_negatives, named_neighbors
from ..ops import attended, coefficients, drawn_and_signed, resize, rival_coefficients, signed_cams
from .explanation import Asked, Explanation, may_follow, shared_of
from .opened import Opened

if TYPE_CHECKING:
    from PIL import Image

SAME_WEIGHTS = 1e-3
"""Length of the difference of two weights of length 1 that stored digits can account for."""
_LOG = logging.getLogger("embedcam")


class Fallback(Protocol):
    """Computes weights on a query itself, where transferred ones are not trusted."""

    def weights(
        self, inputs: Any, positives: np.ndarray, negatives: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Weights `[K]` of each layer, deepest first.

        Args:
            inputs: the network's input, `[3 H W]`.
            positives: embeddings of the neighbours, `[P D]`.
            negatives: of other images, `[Q D]`.
        """


@dataclass(frozen=True)
class Choices:
    """How an explainer answers: see there."""

    transfer: str
    trusted_from: float
    fallback: Fallback | None
    only_below: bool
    max_pixels: int


@dataclass(frozen=True, eq=False)
class Query:
    """One query with its features.

    Attributes:
        embedding: `[D]`.
        activations: of each layer, `[K H W]`.
        size: (height, width) of the map, or None for the layer's grid.
        picture: what was given, or None.
        inputs: the network's input `[3 H W]`, or None.
        finer: activations of each layer on a finer grid, of the query shown larger; None without.
    """

    embedding: np.ndarray
    activations: Sequence[np.ndarray]
    size: tuple[int, int] | None = None
    picture: Image.Image | None = None
    inputs: Any = None
    finer: Sequence[np.ndarray] | None = None


@dataclass(frozen=True)
class _Transfer:
    """Weights `[K]` by layer; of the first one the neighbours' norms, shares and fields."""

    weights: list[np.ndarray]
    norms: np.ndarray
    shares: np.ndarray
    fields: Mapping[str, np.ndarray]


def answer(
    opened: Opened,
    choices: Choices,
    query: Query,
    near: Neighbors,
    result: str | None,
    above: str | None = None,
    shown: int | None = None,
) -> Explanation:
    """The explanation of one query.

    Args:
        opened: the index.
        choices: of the explainer.
        query: with its features.
        near: its neighbours in that index.
        result: id of the one image whose weights are to be transferred, or None for all of them.
        above: id of its rival, whose weights are subtracted, or None.
        shown: how many of the neighbours are results; None for all. Match looks at the others, too.
    """
    _check_grids(opened, query)
    rows = opened.index.select(near.positions)
    labels = rows.labels
    match = _match(opened, near, labels)
    if shown is not None and shown < len(near.positions):
        near, labels = near.first(shown), labels[:shown]
        rows = opened.index.select(near.positions)
    made = _transferred(opened, rows, near.distances, choices.transfer)
    norms, used, chosen, asked, rival = made.norms, rows, near, None, None
    if result is not None:
        named = [result] if above is None else [result, above]
        chosen = named_neighbors(opened.index, query.embedding, named)
        used = opened.index.select(chosen.positions)
        made = _transferred(opened, used, chosen.distances, choices.transfer, above is not None)
        asked, *others = _asked(opened, used, chosen, made.norms)
        rival = others[0] if others else None
    # Trust is calibrated for maps that weights add up to, not for their differences.
    trust, low = None, None
    if rival is None:
        trust, low = _trust(opened, made, chosen.distances, query.activations[0])
    weights, doubted = made.weights, low is not None and low < choices.trusted_from
    direct = doubted and query.inputs is not None and choices.fallback is not None
    if direct and choices.fallback is not None:
        _LOG.debug("trust %.2f, one in ten below %.2f: weights computed", trust, low)
        negatives = negatives_for(
            opened.index, [*rows.positions, *used.positions], [*rows.labels, *used.labels]
        )
        weights = list(choices.fallback.weights(query.inputs, used.embeddings, negatives))
    ids, root = rows.ids, opened.root
    drawn, signed, features = _drawn(weights, query)
    return Explanation(
        cam=drawn,
        signed_cam=signed,
        weights=weights[0],
        features=features,
        ids=ids,
        labels=labels,
        paths=_paths(opened, rows),
        distances=near.distances,
        similarities=near.similarities,
        neighbor_cams=rows.coarse(),
        explained=list(ids) if result is None else [result],
        transfer=choices.transfer,
        extent=_extent(opened, query),
        image=query.picture,
        preprocess=opened.preprocess,
        root=Path() if root is None else root,
        only_below=choices.only_below,
        max_pixels=choices.max_pixels,
        neighbor_norms=norms,
        layer_weights=dict(zip(opened.layers, weights, strict=True)),
        trust=trust,
        trust_low=low,
        match=match,
        trusted_from=choices.trusted_from,
        direct=direct,
        asked=asked,
        rival=rival,
        shared=shared_of(opened.index.manifest) is not None,
        prototypes=opened.index.manifest.is_compressed,
        marks=rows.marks if opened.index.marked else None,
    )


def without_file(
    opened: Opened, choices: Choices, near: Neighbors, file: str | Path | None, most: int
) -> Neighbors:
    """The first `most` of a query's neighbours that are not the query's own file.

    Raises:
        InputError: nothing is left.
    """
    root = Path() if opened.root is None else opened.root
    paths = _paths(opened, opened.index.select(near.positions))
    kept = [
        place
        for place, path in enumerate(paths)
        if file is None
        or not may_follow(path, root, choices.only_below)
        or not _same_file(path, file)
    ][:most]
    if not kept:
        raise InputError(
            f"nothing but the query itself comes back ({file}); leave out --exclude-query "
            "(exclude_query=True), or ask an index of more images"
        )
    return Neighbors(near.positions[kept], near.distances[kept], near.similarities[kept])


def _same_file(one: str, other: str | Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _paths(opened: Opened, rows: Selection) -> list[str]:
    """Where the rows' pictures lie."""
    if opened.root is None:
        return rows.paths
    root = "" if opened.root == Path() else str(opened.root)
    return [os.path.join(root, path) if path else path for path in rows.paths]


def _asked(opened: Opened, used: Selection, chosen: Neighbors, norms: np.ndarray) -> list[Asked]:
    """The records of the images that were named."""
    own, paths = used.coarse(), _paths(opened, used)
    return [
        Asked(
            used.ids[place],
            used.labels[place],
            paths[place],
            float(chosen.distances[place]),
            float(chosen.similarities[place]),
            None if own is None else own[place],
            float(norms[place]),
            used.marks[place] if opened.index.marked else None,
        )
        for place in range(len(used.ids))
    ]


def _drawn(
    weights: Sequence[np.ndarray], query: Query
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map of a query and the same before its ReLU, at the size asked for, and its features."""
    layers = query.activations if query.finer is None else query.finer
    with np.errstate(over="ignore", invalid="ignore"):
        found, signed = drawn_and_signed(weights, query.activations, query.finer)
        features = attended(layers[0], found)
        if query.size is not None:
            found, signed = (resize(one, query.size) for one in (found, signed))
    if not np.isfinite(found).all():
        weight, activation = (max(float(np.abs(one).max()) for one in arrays)
                              for arrays in (weights, query.activations))  # fmt: skip
        raise InputError(
            f"the map overflows: activations up to {activation:.3g} with weights up to "
            f"{weight:.3g} go beyond float32; scale the activations down, or build the index again"
        )
    return found, signed, features


def _check_grids(opened: Opened, query: Query) -> None:
    """Refuse activations on another grid than the one that weights by position belong to."""
    for encoding, activations in zip(opened.encodings, query.activations, strict=True):
        if encoding.grid is not None and activations.shape[1:] != encoding.grid:
            here, kept = (f"{h} x {w}" for h, w in (activations.shape[1:], encoding.grid))
            raise InputError(
                f"the activations lie on a grid of {here}, and this index keeps weights by position"
                f" on one of {kept}; give the query at the input size that the index was built with"
            )


def _extent(opened: Opened, query: Query) -> tuple[float, float, float, float] | None:
    if query.picture is None or opened.preprocess is None:
        return None
    return opened.preprocess.extent(*query.picture.size)


def _transferred(
    opened: Opened, rows: Selection, distances: np.ndarray, mode: str, rival: bool = False
) -> _Transfer:
    """The query's weights of each layer from its neighbours'.

    Args:
        opened: the index.
        rows: the neighbours; with `rival` a result and the one that it is to be told from.
        distances: squared, of the rows.
        mode: of the transfer.
        rival: subtract the second's weights from the first's, both of length 1.
    """
    weights, lengths, shares = [], [], []
    first: Mapping[str, np.ndarray] = {}
    for number, encoding in enumerate(opened.encodings):
        fields = rows.fields(number)
        first = first or fields
        unpacked = encoding.unpack(fields)
        norms = encoding.norms(unpacked)
        if not all(map(math.isfinite, norms.tolist())):
            raise IndexFormatError(
                f"{opened.index.path}: stored weights hold a NaN or an infinity; `embedcam verify` "
                "says which file is damaged"
            )
        share = rival_coefficients(norms) if rival else coefficients(norms, distances, mode)
        combined = encoding.combine(unpacked, share)
        if rival and norms.all() and np.linalg.norm(combined) <= SAME_WEIGHTS:
            combined = np.zeros_like(combined)  # A map of rounding would look like evidence.
        weights.append(combined)
        lengths.append(norms)
        shares.append(share)
    return _Transfer(weights, lengths[0], shares[0], first)


def _trust(
    opened: Opened, made: _Transfer, distances: np.ndarray, activations: np.ndarray
) -> tuple[float, float] | tuple[None, None]:
    """Expected correlation with the map that is computed on the query, and what nine in ten such
    queries reach; None where nothing was calibrated.

    Args:
        opened: the index.
        made: what was transferred.
        distances: squared, of the images it was transferred from.
        activations: of the first layer, `[K H W]`.
    """
    calibration = opened.calibrations.get("one" if len(distances) == 1 else "several")
    if calibration is None:
        return None, None
    # What overflows, of weights that are no honest index's, is not trusted.
    with np.errstate(over="ignore", invalid="ignore"):
        decoded = opened.encodings[0].decode(made.fields)
        raw = signed_cams(decoded, activations)
        norm = float(np.linalg.norm(made.weights[0]))
        seen = evidence(raw, made.shares, norm, distances)
    return calibration.trust(seen, float(np.min(distances)))


def _match(opened: Opened, near: Neighbors, labels: Sequence[str | None]) -> float | None:
    """Probability that the first result is of the query's kind; None where nothing says so."""
    calibration = opened.matches.get("one" if len(near.positions) == 1 else "several")
    if calibration is None:
        return None
    return calibration.match(near.distances, labels)


def negatives_for(
    index: Index, left_out: Sequence[int], labels: Sequence[str | None]
) -> np.ndarray:
    """Embeddings of seeded random images that a query is told from, `[Q D]`.

    Args:
        index: of its neighbours.
        left_out: rows that are none: the neighbours, and images that show the query itself.
        labels: of the neighbours; images that share one are taken only where there are no others.

    Raises:
        InputError: nothing else is there.
    """
    live = index.live_positions()
    live = live[~np.isin(live, left_out)]
    if len(live) == 0:
        raise InputError(
            "the index holds no image but the neighbours, so nothing is left to tell the query "
            "from; ask for fewer neighbours, or leave out fallback"
        )
    places = draw_negatives(live, labels, lambda drawn: index.select(drawn).labels)
    return index.embeddings(places)
