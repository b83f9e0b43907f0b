"""A small index out of a large one: k-means prototypes with merged weights, and what that loses."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import whole
from ..errors import IndexFormatError, InputError
from ..images.progress import Advance, progress_of
from ..index import Index, PartData, check_target, create, nearest
from ..index.arrays import wrong_embeddings
from ..index.concepts import EXEMPLARS
from ..index.encoding import Encoding, LowRank, Rows
from ..index.search import rank, without_itself
from ..index.verify import check_files
from ..ops import transfer
from .groups import Groups, group, sums_of_groups

SAMPLE = 1000
"""Images that are left out to measure what is lost, at most."""
COUNTS = (1, 5)
"""Neighbors that weights are transferred from; fewer where there are fewer."""
_STEP = 32
_DIGITS = 6
_LENGTH = 1e-6
"""A mean of unit vectors shorter than this points nowhere: its members cancel."""
_ROWS = 4096


@dataclass(frozen=True)
class CompressReport:
    """What a compression did.

    Attributes
    ----------
    path, n_prototypes, bytes
        The new index, its rows and its size; the old one's is `compressed["from_bytes"]`.
    n_images
        Live images of the index it was made of.
    compressed
        What its manifest says of itself, `fidelity` included; see index/README.md.
    seconds
        Wall time.
    """

    path: Path
    n_images: int
    n_prototypes: int
    compressed: dict[str, Any]
    bytes: int
    seconds: float


def compress(
    index: Index | str | Path,
    path: str | Path,
    prototypes: int,
    *,
    per_class: bool = False,
    seed: int = 0,
    replace: bool = False,
    progress: bool | None = None,
) -> CompressReport:
    """Write a small index of prototypes, and measure what is lost.

    A prototype is the mean embedding of a k-means group of images (of unit length again where the
    index is normalised) with the mean of their decoded channel weights. Its path and own map are
    those of its medoid, the member nearest to it; its label is the one that all members share, else
    None. The new index is searched and explained like any other; its FAISS type is Flat.

    Parameters
    ----------
    index
        An open index or its folder; it is only read.
    path
        Folder of the new index: missing, empty, or holding an unfinished one.
    prototypes
        How many, 1 to the number of live images; with `per_class` for each label. Images that are
        alike and labels of fewer images make fewer, and the batches in which a large index is
        divided can leave a few empty.
    per_class
        Divide each label by itself, so that every prototype has its label; images without one are
        divided by themselves.
    seed
        Of k-means and of the sample that the loss is measured on, 0 to 2^32 - 1.
    replace
        Swap a finished index of prototypes at `path` for the new one, once that is whole; who reads
        the old one goes on with it. An index of images is never replaced.
    progress
        Bars; None shows them on a terminal or in a notebook, else logs how far it is.

    Raises
    ------
    InputError
        A number out of range, no labels with `per_class`, a folder that holds something else, or an
        index that holds prototypes already.
    IndexFormatError
        No index, or a file that does not match its checksum.
    """
    began, path = time.perf_counter(), Path(path)
    with ExitStack() as stack:
        if not isinstance(index, Index):
            index = stack.enter_context(Index.open(index, with_faiss=False))
        _check(index, path, prototypes, seed, replace)
        live = index.live_positions()
        # Of numbers a group shares none.
        numbers = index.manifest.near_share is not None
        labels = [None] * len(live) if numbers else list(index.labels[live])
        if per_class and all(label is None for label in labels):
            why = "the labels are numbers" if numbers else "no image has a label"
            raise InputError(
                f"{index.path}: {why}, so prototypes cannot be made for each; leave out "
                "--per-class (per_class=False)"
            )
        check_files(index, "")
        bars = partial(progress_of, shown=progress)
        vectors = index.embeddings(live)
        if (what := wrong_embeddings(vectors, index.normalized)) is not None:
            raise IndexFormatError(
                f"{index.path}: of the embeddings, {what}; `embedcam verify` names the damaged file"
            )
        with bars("group", len(live)) as progressed:
            groups = group(vectors, labels if per_class else None, prototypes, seed, progressed)
        sample = np.sort(np.random.default_rng(seed).permutation(len(live))[:SAMPLE])
        with bars("merge", len(index.layers) * len(live)) as progressed:
            merged = _Prototypes(index, vectors, labels, groups, sample, progressed)
        with bars("measure", len(sample)) as progressed:
            lost = _fidelity(merged, sample, progressed)
        about = {
            "from_rows": len(live),
            "from_bytes": index.manifest.named_bytes,
            "prototypes": prototypes,
            "rows": len(groups),
            "per_class": per_class,
            "seed": seed,
            "fidelity": lost,
        }
        specs = [encoding.spec() for encoding in merged.encodings]
        header = {**index.manifest.derived_header(specs), "compressed": about}
        part = _part(merged, per_class)
        fitted = [encoding.fitted for encoding in merged.encodings]
        # Flat whatever the index had: lists and graphs are for many rows.
        # Exemplars are pictures, and no row is one any more.
        shared = {name: one for name, one in index.shared().items() if name not in EXEMPLARS}
        create(path, header, fitted, shared, part, factory="Flat", replace=replace)
    with Index.open(path, with_faiss=False) as small:
        n_bytes = small.manifest.named_bytes
    return CompressReport(path, len(live), len(groups), about, n_bytes, time.perf_counter() - began)


def _check(index: Index, path: Path, prototypes: int, seed: int, replace: bool) -> None:
    index.refuse_prototypes("compress the index it was made of, with another number")
    if not len(index):
        raise InputError(f"{index.path}: every image was removed; there is nothing to compress")
    whole("prototypes", prototypes, 1, len(index))
    whole("seed", seed, 0, 2**32 - 1)
    if (path / "manifest.json").exists():
        with Index.open(path, with_faiss=False) as there:
            merged = there.manifest.is_compressed
        if not merged or not replace:
            what = "an index of images, which prototypes do not replace; choose another folder"
            if merged:
                what = (
                    "a finished index of prototypes; --replace (replace=True) swaps it for the new "
                    "one, or choose another folder"
                )
            raise InputError(f"{path}: holds {what}")
    check_target(path, replace)


def ids_of(names: Sequence[str | None], per_class: bool) -> list[str]:
    """Name prototypes "prototype-0001" ..., or in each label "LABEL/0001" ...: all different."""
    if not per_class:
        return [f"prototype-{number:04d}" for number in range(1, len(names) + 1)]
    ids, last = [], Counter[str | None]()
    for name in names:
        last[name] += 1
        # Without a slash, so that no label can make the same.
        ids.append(("prototype-" if name is None else f"{name}/") + f"{last[name]:04d}")
    return ids


class _Prototypes:
    """What the groups of an index's n live rows hold, and what they would hold without one row.

    `embeddings` `[G D]` are of unit length where the index is normalised, `medoids` `[G]` positions
    in the index of the members nearest to them, `names` their labels.
    """

    def __init__(
        self,
        index: Index,
        vectors: np.ndarray,
        labels: Sequence[str | None],
        groups: Groups,
        sample: np.ndarray,
        progressed: Advance,
    ) -> None:
        self.index, self.live = index, index.live_positions()
        self.vectors, self.labels, self.groups = vectors, labels, groups
        # Groups whose sums are kept, for what a row of the sample is left out of.
        self._kept = np.unique(groups.of[sample])
        self.names = [labels[row] for row in groups.firsts]
        for label, number in zip(labels, groups.of, strict=True):
            if self.names[number] != label:
                self.names[number] = None
        self._merge_embeddings()
        self.medoids = self.live[self._nearest_members()]
        self.encodings: list[Encoding] = []
        self.fields: list[dict[str, np.ndarray]] = []
        self._weight_sums: list[np.ndarray] = []
        for layer in range(len(index.layers)):
            self._merge_weights(layer, progressed)

    def weights(self, prototypes: np.ndarray, layer: int) -> np.ndarray:
        """Return decoded weights of prototypes `[n]`, float32 `[n K]`."""
        return self.encodings[layer].decode(self.rows(prototypes, layer))

    def rows(self, prototypes: np.ndarray | slice, layer: int) -> dict[str, np.ndarray]:
        """Return the fields of some prototypes, with what some encodings decode them with."""
        fields = {name: values[prototypes] for name, values in self.fields[layer].items()}
        return {**fields, "embedding": self.embeddings[prototypes]}

    def embeddings_without(self, rows: np.ndarray) -> np.ndarray:
        """Return embeddings of each row's prototype without it, `[b D]`; of groups of one any."""
        means = self._without(rows, self._sums, self.vectors[rows])
        return _as_stored(means, self.embeddings[self.groups.of[rows]], self.index.normalized)

    def weights_without(self, rows: np.ndarray, layer: int) -> np.ndarray:
        """Return weights of each row's prototype without it, as they would be stored, `[b K]`."""
        fields, encoding = self.index.select(self.live[rows]).fields(layer), self.encodings[layer]
        share = _numbers_of(self.index.encoding(layer), fields)
        means = self._without(rows, self._weight_sums[layer], share)
        return encoding.decode({**_encode(encoding, means), "embedding": means.astype(np.float32)})

    def _without(self, rows: np.ndarray, sums: np.ndarray, share: np.ndarray) -> np.ndarray:
        numbers = self.groups.of[rows]
        rest = np.maximum(self.groups.sizes[numbers] - 1, 1)[:, None]
        left = sums[np.searchsorted(self._kept, numbers)] - share.astype(np.float64)
        return np.asarray(left / rest)

    def _merge_embeddings(self) -> None:
        # A group of one is its member, to the bit. Where the members of a normalised index cancel,
        # the first of them stands for all.
        groups = self.groups
        sums = sums_of_groups(groups, self.vectors.__getitem__, self.vectors.shape[1])
        alone, sizes = self.vectors[groups.firsts], groups.sizes[:, None]
        means = _as_stored(sums / sizes, alone, self.index.normalized)
        self.embeddings, self._sums = np.where(sizes > 1, means, alone), sums[self._kept]

    def _nearest_members(self) -> np.ndarray:
        distances = np.empty(len(self.vectors))
        for start in range(0, len(self.vectors), _ROWS):
            some = slice(start, start + _ROWS)
            near = self.embeddings[self.groups.of[some]].astype(np.float64)
            distances[some] = ((self.vectors[some] - near) ** 2).sum(1)
        nearest_first = np.lexsort((distances, self.groups.of))  # stable: ties to the first row
        return np.asarray(nearest_first[self.groups.starts])

    def _merge_weights(self, layer: int, progressed: Advance) -> None:
        """Encode the mean of decoded weights, or of the codes of low-rank ones: it is the same."""
        source = encoding = self.index.encoding(layer)
        if isinstance(source, LowRank) and source.uses_embedding and self.index.normalized:
            # Codes that are the stored embedding itself are linear in it, but a mean made a unit
            # vector again is no longer the mean of the codes: they are stored beside it.
            basis, offset = source.fitted["basis"], source.fitted["offset"]
            encoding = LowRank(basis, offset, source.origin, "stored", source.dtype)
        width = source.rank if isinstance(source, LowRank) else source.n_channels

        def fetch(rows: np.ndarray) -> np.ndarray:
            progressed(len(rows))
            return _numbers_of(source, self.index.select(self.live[rows]).fields(layer))

        n, sums = len(self.groups), sums_of_groups(self.groups, fetch, width)
        fields = {name: np.empty((n, *f.shape), f.dtype) for name, f in encoding.fields.items()}
        for start in range(0, n, _ROWS):
            some = slice(start, start + _ROWS)
            means = sums[some] / self.groups.sizes[some, None]
            for name, values in _encode(encoding, means).items():
                fields[name][some] = values
        if encoding is source:
            # As they stand: signed top-m would lose the negative values it kept.
            alone = np.flatnonzero(self.groups.sizes == 1)
            for start in range(0, len(alone), _ROWS):
                few = alone[start : start + _ROWS]
                rows = self.index.select(self.live[self.groups.firsts[few]]).fields(layer)
                for name, values in fields.items():
                    values[few] = rows[name]
        self.encodings.append(encoding)
        self.fields.append(fields)
        self._weight_sums.append(sums[self._kept])


def _as_stored(means: np.ndarray, instead: np.ndarray, normalized: bool) -> np.ndarray:
    """Return means `[g D]` as an index keeps them; `instead` where one has no direction."""
    if not normalized:
        return means.astype(np.float32)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    units = means / np.where(lengths > _LENGTH, lengths, 1)
    return np.where(lengths > _LENGTH, units, instead).astype(np.float32)


def _numbers_of(encoding: Encoding, rows: Rows) -> np.ndarray:
    """Return what a mean is taken over, `[n C]`: codes of low-rank weights, else the weights."""
    return encoding.stored_codes(rows) if isinstance(encoding, LowRank) else encoding.decode(rows)


def _encode(encoding: Encoding, numbers: np.ndarray) -> dict[str, np.ndarray]:
    if isinstance(encoding, LowRank):
        return encoding.encode_codes(numbers)
    return encoding.encode(numbers)


def _part(merged: _Prototypes, per_class: bool) -> PartData:
    index, medoids = merged.index, merged.medoids
    used = np.bincount(merged.groups.of, weights=index.triplets_used(merged.live))
    return PartData(
        ids=ids_of(merged.names, per_class),
        labels=merged.names,
        paths=index.paths[medoids],
        embeddings=merged.embeddings,
        triplets_used=np.minimum(used, np.iinfo(np.uint32).max).astype(np.uint32),
        fields=merged.fields,
        coarse=[_maps_of_medoids(merged, layer) for layer in range(len(index.layers))],
        marks=index.select(medoids).marks if index.marked else None,
    )


def _maps_of_medoids(merged: _Prototypes, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the medoids' stored maps, bytes `[G h w]` and scales `[G]`, or None without any."""
    index, columns = merged.index, merged.index.layers[layer].coarse
    if columns is None:
        return None
    # Pictures divide a result's map by the length of its stored weights: with the medoid's scaled
    # to that of the merged ones, the map that is drawn is the one the medoid has in its own index.
    old, new = index.encoding(layer), merged.encodings[layer]
    factors = []
    for start in range(0, len(merged.medoids), _ROWS):
        some = slice(start, start + _ROWS)
        fields = index.select(merged.medoids[some]).fields(layer)
        before = old.norms(old.unpack(fields))
        lengths = new.norms(new.unpack(merged.rows(some, layer)))
        factors.append(np.where(before > 0, lengths / np.where(before > 0, before, 1), 1))
    maps, scales = (index.select(merged.medoids).array(column) for column in columns)
    return maps, (scales * np.concatenate(factors)).astype(np.float32)


def _fidelity(merged: _Prototypes, sample: np.ndarray, progressed: Advance) -> dict[str, Any]:
    """Measure how near transferred weights come to an image's own, before and after.

    Returns "images", those of the sample that have weights of their own and a neighbor; "cosine"
    by number of neighbors, and "recall_at_1" over the labelled images; see `_loss`.
    """
    # Every image of the sample is left out, of the full index and of its own prototype: otherwise
    # a prototype of few images would be praised for repeating the very image that is asked for.
    compared: list[np.ndarray] = [np.empty((0, len(COUNTS), 2))]
    hits: list[tuple[bool, bool]] = []
    if len(merged.vectors) == 1:
        sample = sample[:0]  # a single image has no other to be explained by
    vectors, metric = merged.vectors, merged.index.metric
    neighbors = nearest(vectors, vectors[sample], max(COUNTS) + 1, metric)
    from_all = without_itself(neighbors, sample).positions
    for start in range(0, len(sample), _STEP):
        rows, of_index = sample[start : start + _STEP], from_all[start : start + _STEP]
        of_prototypes = _nearest_prototypes(merged, rows)
        compared.append(_cosines(merged, rows, of_index, of_prototypes))
        for row, first, second in zip(rows, of_index, of_prototypes, strict=True):
            if (label := merged.labels[row]) is not None:
                hits.append((merged.labels[first[0]] == label, merged.names[second[0]] == label))
        progressed(len(rows))
    cosines = np.concatenate(compared)
    cosines = cosines[~np.isnan(cosines).any((1, 2))]
    return {
        "images": len(cosines),
        "cosine": {str(k): _loss(cosines[:, at]) for at, k in enumerate(COUNTS)},
        "recall_at_1": _loss(np.array(hits, float).reshape(-1, 2)),
    }


def _loss(pairs: np.ndarray) -> dict[str, float] | None:
    """Return means of `[n 2]`, from all images and from prototypes, and what was lost."""
    if not len(pairs):
        return None
    index, prototypes = (round(float(mean), _DIGITS) for mean in pairs.mean(axis=0))
    return {"index": index, "prototypes": prototypes, "loss": round(index - prototypes, _DIGITS)}


def _nearest_prototypes(merged: _Prototypes, rows: np.ndarray) -> list[np.ndarray]:
    """Return the nearest prototypes of each row; its own stands without it, or not at all."""
    of_rows, queries = merged.groups.of[rows], merged.vectors[rows]
    vectors, metric = merged.embeddings, merged.index.metric
    neighbors = nearest(vectors, queries, max(COUNTS) + 1, metric)
    others = without_itself(neighbors, of_rows).positions
    own = np.where(merged.groups.sizes[of_rows] > 1, of_rows, -1)[:, None]
    candidates = np.concatenate([others, own], axis=1)
    places = np.concatenate([vectors[others], merged.embeddings_without(rows)[:, None]], axis=1)
    ranked = rank(queries, candidates, places, candidates.shape[1], metric)
    return [one[one >= 0][: max(COUNTS)] for one in ranked.positions]


def _cosines(
    merged: _Prototypes,
    rows: np.ndarray,
    from_all: np.ndarray,
    from_prototypes: Sequence[np.ndarray],
) -> np.ndarray:
    """Return cosines with the rows' own weights, means over the layers, `[b counts 2]`."""
    index, live, total = merged.index, merged.live, np.zeros((len(rows), len(COUNTS), 2))
    n_layers = len(merged.encodings)
    for layer in range(n_layers):
        direct, left_out = index.weights(live[rows], layer), merged.weights_without(rows, layer)
        for at, row in enumerate(rows):
            of_index = index.weights(live[from_all[at]], layer)
            of_prototypes = merged.weights(from_prototypes[at], layer)
            of_prototypes[from_prototypes[at] == merged.groups.of[row]] = left_out[at]
            for side, weights in enumerate((of_index, of_prototypes)):
                flat = weights.reshape(len(weights), -1)
                for place, count in enumerate(COUNTS):
                    transferred = transfer(flat[:count], np.zeros(len(flat[:count])))
                    total[at, place, side] += _cosine(transferred, direct[at].ravel())
    return total / n_layers


def _cosine(transferred: np.ndarray, own: np.ndarray) -> float:
    """Return a number in [-1, 1], 0 where nothing was transferred, NaN without own weights."""
    a, b = transferred.astype(np.float64), own.astype(np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not b.any():
        return np.nan
    return float(a @ b) / lengths if lengths else 0.0
