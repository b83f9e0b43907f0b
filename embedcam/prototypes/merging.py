"""What a prototype holds: a mean embedding, mean weights, and the picture and map of its medoid."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..index import Index
from ..index.encoding import Encoding, LowRank, Rows
from .grouping import Groups, sums_of_groups

_LENGTH = 1e-6
"""A mean of unit vectors shorter than this points nowhere: its members cancel."""
_ROWS = 4096


@dataclass(frozen=True)
class Centres:
    """Where the prototypes lie.

    Args:
        embeddings: float32 `[G D]`, of unit length where the index is normalised.
        medoids: row of the member nearest to each, int64 `[G]`.
        sums: of the members' embeddings, float64, for the groups that were asked for, in their
            order.
    """

    embeddings: np.ndarray
    medoids: np.ndarray
    sums: np.ndarray


@dataclass(frozen=True)
class Merged:
    """The prototypes' weights on one layer.

    Args:
        encoding: how they are kept.
        fields: its rows, `[G ...]`.
        sums: of the members' weights before they are encoded, float64, for the groups that were
            asked for, in their order.
    """

    encoding: Encoding
    fields: dict[str, np.ndarray]
    sums: np.ndarray

    def weights(self, rows: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """Decoded weights of prototypes, float32 `[n K]`.

        Args:
            rows: numbers `[n]`.
            embeddings: of all prototypes, `[G D]`; some encodings decode them.
        """
        fields = {name: values[rows] for name, values in self.fields.items()}
        return self.encoding.decode({**fields, "embedding": embeddings[rows]})


def centres_of(vectors: np.ndarray, groups: Groups, normalized: bool, kept: np.ndarray) -> Centres:
    """Mean embeddings of groups, and the members nearest to them.

    A group of one is its member, to the bit. Where the members of a normalised index cancel, the
    first of them stands for all.

    Args:
        vectors: float32 `[n D]`.
        groups: of the n rows.
        normalized: whether means are made unit vectors again.
        kept: groups whose sums are wanted, rising.
    """
    width = vectors.shape[1]
    embeddings, wanted = vectors[groups.firsts], np.empty((len(kept), width))
    for start, sums in sums_of_groups(groups, lambda rows: vectors[rows], width):
        some, alone = slice(start, start + len(sums)), embeddings[start : start + len(sums)]
        sizes = groups.sizes[some, None]
        embeddings[some] = np.where(sizes > 1, as_stored(sums / sizes, alone, normalized), alone)
        keep(wanted, kept, start, sums)
    distances = np.empty(len(vectors))
    for start in range(0, len(vectors), _ROWS):
        near = embeddings[groups.of[start : start + _ROWS]].astype(np.float64)
        distances[start : start + _ROWS] = ((vectors[start : start + _ROWS] - near) ** 2).sum(1)
    nearest_first = np.lexsort((distances, groups.of))  # stable: ties fall to the first row
    return Centres(embeddings, nearest_first[groups.ends - groups.sizes], wanted)


def as_stored(means: np.ndarray, instead: np.ndarray, normalized: bool) -> np.ndarray:
    """Means `[g D]` as an index keeps them, float32; `instead` where one has no direction."""
    if not normalized:
        return means.astype(np.float32)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    units = means / np.where(lengths > _LENGTH, lengths, 1)
    return np.where(lengths > _LENGTH, units, instead).astype(np.float32)


def encoding_of_prototypes(encoding: Encoding, normalized: bool) -> Encoding:
    """How merged weights are kept: as the index keeps them, in the same fitted basis.

    Codes that are the stored embedding itself are linear in it, but a mean that was made a unit
    vector again is no longer the mean of the codes: they are then stored beside it.
    """
    if isinstance(encoding, LowRank) and encoding.uses_embedding and normalized:
        basis, offset = encoding.fitted["basis"], encoding.fitted["offset"]
        return LowRank(basis, offset, encoding.origin, "stored", encoding.dtype)
    return encoding


def merge(
    index: Index,
    live: np.ndarray,
    groups: Groups,
    layer: int,
    kept: np.ndarray,
    tick: Callable[[int], object],
) -> Merged:
    """Mean weights of each group on one layer, encoded as the index encodes them.

    The mean is taken over decoded weights (of low-rank ones over the codes, which is the same); a
    group of one keeps its member's rows as they are.

    Args:
        index: opened.
        live: position of each of the n rows.
        groups: of the n rows.
        layer: its number.
        kept: groups whose sums are wanted, rising.
        tick: told how many images were dealt with.
    """
    source = index.encoding(layer)
    encoding = encoding_of_prototypes(source, index.normalized)
    width = source.rank if isinstance(source, LowRank) else source.n_channels

    def fetch(rows: np.ndarray) -> np.ndarray:
        tick(len(rows))
        return numbers_of(source, index.select(live[rows]).fields(layer))

    fields = {
        name: np.empty((len(groups), *field.shape), field.dtype)
        for name, field in encoding.fields.items()
    }
    wanted = np.empty((len(kept), width))
    for start, sums in sums_of_groups(groups, fetch, width):
        stop = start + len(sums)
        for name, values in encode(encoding, sums / groups.sizes[start:stop, None]).items():
            fields[name][start:stop] = values
        keep(wanted, kept, start, sums)
    if encoding is source:
        _copy_alone(index, live, groups, layer, fields)
    return Merged(encoding, fields, wanted)


def keep(wanted: np.ndarray, kept: np.ndarray, start: int, sums: np.ndarray) -> None:
    """Write into `wanted` those of the sums of groups `start` .. that are among `kept`, rising."""
    here = slice(*np.searchsorted(kept, (start, start + len(sums))))
    wanted[here] = sums[kept[here] - start]


def numbers_of(encoding: Encoding, rows: Rows) -> np.ndarray:
    """What a mean is taken over, `[n C]`: the codes of low-rank weights, else the weights."""
    return encoding.stored_codes(rows) if isinstance(encoding, LowRank) else encoding.decode(rows)


def encode(encoding: Encoding, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the encoding's fields for means of `numbers_of`, `[n C]`."""
    if isinstance(encoding, LowRank):
        return encoding.encode_codes(numbers)
    return encoding.encode(numbers)


def maps_of_medoids(
    index: Index, live: np.ndarray, centres: Centres, merged: Merged, layer: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The medoids' own maps, bytes `[G h w]` and scales `[G]`, or None where none are kept.

    Pictures divide a result's map by the length of its stored weights. The scales are therefore
    those of the medoid's weights brought to the length of the merged ones: the map that is drawn is
    the one that the medoid itself has in the index it came from.
    """
    columns = index.layers[layer].coarse
    if columns is None:
        return None
    rows = index.select(live[centres.medoids])
    source = index.encoding(layer)

    def own_fields(some: slice) -> Rows:
        return index.select(live[centres.medoids[some]]).fields(layer)

    def merged_fields(some: slice) -> Rows:
        fields = {name: values[some] for name, values in merged.fields.items()}
        return {**fields, "embedding": centres.embeddings[some]}

    own = _lengths(source, own_fields, len(rows))
    lengths = _lengths(merged.encoding, merged_fields, len(rows))
    factors = np.where(own > 0, lengths / np.where(own > 0, own, 1), 1)
    maps, scales = (rows.array(column) for column in columns)
    return maps, (scales * factors).astype(np.float32)


def _lengths(encoding: Encoding, fetch: Callable[[slice], Rows], n: int) -> np.ndarray:
    """Norms of weights `[n]`, a block at a time."""
    blocks = (slice(start, start + _ROWS) for start in range(0, n, _ROWS))
    return np.concatenate([encoding.norms(encoding.unpack(fetch(some))) for some in blocks])


def _copy_alone(
    index: Index, live: np.ndarray, groups: Groups, layer: int, fields: Mapping[str, np.ndarray]
) -> None:
    """Rows of groups of one as they stand: signed top-m would lose the negative values it kept."""
    alone = np.flatnonzero(groups.sizes == 1)
    for start in range(0, len(alone), _ROWS):
        some = alone[start : start + _ROWS]
        rows = index.select(live[groups.firsts[some]]).fields(layer)
        for name, values in fields.items():
            values[some] = rows[name]
