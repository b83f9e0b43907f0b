"""Rows of an index as new parts: with added rows behind them, or with removed ones left out."""

from collections.abc import Callable

import numpy as np

from .files import ArrayLike, broken, sha256_of
from .layout import Layer
from .parts import Coarse, Gathered, PartData, check_shapes
from .reader import Index

JOIN_FACTOR = 4
"""A new part takes in the parts before it that are not more than this many times larger."""


def parts_to_keep(index: Index, new_rows: int) -> int:
    """How many leading parts stay; the others are rewritten together with the new rows.

    Sizes then fall by more than JOIN_FACTOR from part to part, so that their number, and the files
    and maps a reader holds, grow with the logarithm of the images.
    """
    kept, size = len(index.parts), new_rows
    while kept > 1 and index.parts[kept - 1].count <= JOIN_FACTOR * size:
        kept -= 1
        size += index.parts[kept].count
    return kept


def check_parts(index: Index, first: int = 0) -> None:
    """Compare the files of the parts from `first` on with their checksums.

    What rewrites rows asks for this: the new files get checksums of their own, which would vouch
    for flipped bits that were copied along.

    Raises:
        IndexFormatError: naming the first file that is not what was written.
    """
    entries = index.manifest.raw["parts"]
    for part, entry in zip(index.parts[first:], entries[first:], strict=True):
        for name, line in entry["files"].items():
            if sha256_of(part.arrays[name]) != line["sha256"]:
                raise broken(index.path, f"{part.directory}/{name}", "does not match its checksum")


def check_tombstones(index: Index) -> None:
    """Compare the tombstones with their checksum, before they are merged or rows are dropped.

    Raises:
        IndexFormatError: they are not what was written.
    """
    entry = index.manifest.raw["tombstones"]
    if entry is not None and sha256_of(index.tombstones) != entry["sha256"]:
        raise broken(index.path, entry["file"], "does not match its checksum")


def check_fitted(index: Index) -> None:
    """Compare what was fitted once with its checksums, before it is copied into another index.

    Raises:
        IndexFormatError: naming the first file that is not what was written.
    """
    entry = index.manifest.raw["fitted"]
    for name, line in entry["files"].items():
        if sha256_of(index.fitted_files[name]) != line["sha256"]:
            raise broken(index.path, f"{entry['directory']}/{name}", "does not match its checksum")


def join_rows(index: Index, positions: np.ndarray, new: PartData | None) -> PartData:
    """Rows of an index, and behind them new ones, as one part that streams."""
    count = len(positions)

    def chain(old: Callable[[np.ndarray], np.ndarray], extra: ArrayLike | None) -> ArrayLike:
        sources: list[tuple[int, Callable[[slice], np.ndarray]]] = [
            (count, lambda rows: old(positions[rows]))
        ]
        if extra is not None:
            sources.append((extra.shape[0], lambda rows: np.asarray(extra[rows])))
        return Gathered(sources, old(positions[:0]) if extra is None else extra)

    def raw(file: str, like: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda rows: index.select(rows).array(file, like)

    def fields_of(layer: Layer) -> dict[str, ArrayLike]:
        return {
            name: chain(
                raw(layer.file(name), np.empty((0, *field.shape), field.dtype)),
                None if new is None else new.fields[layer.number][name],
            )
            for name, field in layer.encoding.fields.items()
        }

    def coarse_of(layer: Layer) -> Coarse | None:
        given = None if new is None else new.coarse[layer.number]
        if layer.coarse_grid is None or (new is not None and given is None):
            return given
        maps, scales = layer.coarse_files
        return (
            chain(raw(maps, np.empty((0, *layer.coarse_grid), np.uint8)), given and given[0]),
            chain(raw(scales, np.empty(0, np.float32)), given and given[1]),
        )

    if new is not None:
        check_shapes(new, index.width, index.layers)

    def marks_of() -> ArrayLike | None:
        given = None if new is None else new.marks
        if given is None and not index.marked:
            return None
        if given is None and new is not None:
            given = np.zeros((len(new), 4), np.uint32)
        return chain(lambda rows: index.select(rows).marks, given)

    ids = index.ids[positions]
    paths = index.paths[positions]
    labels = index.labels[positions]
    return PartData(
        ids=[*ids, *(new.ids if new else ())],
        labels=[*labels, *(new.labels if new else ())],
        paths=[*paths, *(new.paths if new else ())],
        embeddings=chain(index.embeddings, None if new is None else new.embeddings),
        triplets_used=np.concatenate(
            [index.triplets_used(positions), *([np.asarray(new.triplets_used)] if new else [])]
        ),
        fields=[fields_of(layer) for layer in index.layers],
        coarse=[coarse_of(layer) for layer in index.layers],
        marks=marks_of(),
    )
