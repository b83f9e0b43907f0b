"""A query's neighbours: searched in the index, or those that another search engine named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .._checks import whole
from ..errors import InputError
from .reader import Index
from .search import Neighbors

N_NEGATIVES = 50


def draw_negatives(
    candidates: np.ndarray,
    near: Iterable[str | None],
    labels_of: Callable[[np.ndarray], Sequence[str | None]],
) -> np.ndarray:
    """Draw seeded random images that are no neighbours, nor labelled as they are.

    Args:
        candidates: positions of all but the neighbours, `[n]`, n >= 1.
        near: labels of the neighbours.
        labels_of: labels of the images at some positions.

    Returns:
        At most `N_NEGATIVES` positions; with a neighbour's label where all drawn have one.
    """
    count = min(8 * N_NEGATIVES, len(candidates))
    drawn = np.random.default_rng(0).choice(candidates, count, False)
    known = {label for label in near if label is not None}
    apart = np.array([label not in known for label in labels_of(drawn)])
    return (drawn[apart] if apart.any() else drawn)[:N_NEGATIVES]


def check_wanted(
    n_neighbors: int | None,
    neighbors: Sequence[Sequence[str]] | None,
    n_queries: int,
    default: int,
) -> int:
    """How many neighbours are to be searched for.

    Raises:
        InputError: a number and names both, no list of names for each query, or no such number.
    """
    if neighbors is not None:
        if n_neighbors is not None:
            raise InputError("give n_neighbors to search, or neighbors to name them, not both")
        if isinstance(neighbors, str) or len(neighbors) != n_queries:
            raise InputError(
                f"neighbors holds {len(neighbors)} lists of ids for {n_queries} queries; give "
                "one list for each"
            )
    return default if n_neighbors is None else whole("n_neighbors", n_neighbors, 1)


def check_rival(result: str | None, above: str | None) -> None:
    """Refuse a rival that goes with no result, or is the result itself.

    Raises:
        InputError: so it is.
    """
    if above is None:
        return
    if result is None:
        raise InputError(
            f"above = {above!r} is a rival, and no result was named; give result, the image that "
            "is to be told from it"
        )
    if result == above:
        raise InputError(f"above = {above!r} is the result itself; name another image")


def find_neighbors(
    index: Index,
    embeddings: np.ndarray,
    n_neighbors: int,
    named: Sequence[Sequence[str]] | None,
) -> list[Neighbors]:
    """For each query `[B D]` its neighbours: searched, or those that were named."""
    if named is None:
        found = index.search(embeddings, n_neighbors)
        return [
            Neighbors(*one)
            for one in zip(found.positions, found.distances, found.similarities, strict=True)
        ]
    return [
        named_neighbors(index, embedding, ids)
        for embedding, ids in zip(embeddings, named, strict=True)
    ]


def named_neighbors(index: Index, embedding: np.ndarray, ids: Sequence[str]) -> Neighbors:
    """Named images beside a query `[D]`, in the order named.

    Raises:
        InputError: no ids, one twice, or an unknown or removed one.
    """
    if isinstance(ids, str):
        raise InputError(f"expected a list of ids as neighbours, got the string {ids!r}")
    if len(ids) == 0:
        raise InputError("no neighbour was given; name at least one id")
    if not all(isinstance(name, str) for name in ids):
        kinds = ", ".join(sorted({type(name).__name__ for name in ids}))
        raise InputError(f"ids are strings, as in `index.ids`; given {kinds}")
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if list(ids).count(name) > 1)
        raise InputError(f"the neighbour {twice!r} was given twice; name each id once")
    positions = index.positions(ids)
    stored = index.embeddings(positions).astype(np.float64)
    difference = stored - embedding
    distances = np.einsum("nd,nd->n", difference, difference)
    return Neighbors.of(positions, distances, stored @ embedding)
