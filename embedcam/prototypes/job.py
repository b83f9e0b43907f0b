"""The job: from an index to a small index of prototypes."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import IndexFormatError, InputError
from ..images.progress import Advance, progress_of
from ..index import (
    Index,
    PartData,
    check_fitted,
    check_parts,
    check_target,
    check_tombstones,
    create,
)
from ..index.arrays import wrong_embeddings
from .fidelity import Compressed, fidelity, sample_rows
from .grouping import Groups, group
from .merging import centres_of, maps_of_medoids, merge


@dataclass(frozen=True)
class CompressReport:
    """What a compression did.

    Attributes:
        path: the new index.
        n_images: live images of the index it was made of.
        n_prototypes: rows of the new one.
        compressed: what its manifest says of itself, `fidelity` included; see index/README.md.
        bytes: of the new index; those of the old one are `compressed["from_bytes"]`.
        seconds: wall time.
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

    Args:
        index: an open index or its folder; it is only read.
        path: folder of the new index: missing, empty, or holding an unfinished one.
        prototypes: how many, 1 to the number of live images; with `per_class` for each label.
            Images that are alike and labels of fewer images make fewer, and the batches in which
            a large index is divided can leave a few empty.
        per_class: divide each label by itself, so that every prototype has its label; images
            without one are divided by themselves.
        seed: of k-means and of the sample that the loss is measured on, 0 to 2^32 - 1.
        replace: swap a finished index of prototypes at `path` for the new one, once that is whole;
            who reads the old one goes on with it. An index of images is never replaced.
        progress: bars; None shows them on a terminal or in a notebook, else logs how far it is.

    Raises:
        InputError: a number out of range, no labels with `per_class`, a folder that holds something
            else, or an index that holds prototypes already.
        IndexFormatError: no index, or a file that does not match its checksum.
    """
    began, path = time.perf_counter(), Path(path)
    with ExitStack() as stack:
        if not isinstance(index, Index):
            index = stack.enter_context(Index.open(index, with_faiss=False))
        _check(index, path, prototypes, seed, replace)
        live = index.live_positions()
        # Of numbers a group shares none.
        numbers = index.manifest.near_share is not None
        labels = [None] * len(live) if numbers else index.labels[live]
        if per_class and numbers:
            raise InputError(
                f"{index.path}: the labels are numbers, so prototypes cannot be made for each; "
                "leave out --per-class (per_class=False)"
            )
        if per_class and all(label is None for label in labels):
            raise InputError(
                f"{index.path}: no image has a label, so prototypes cannot be made for each; leave "
                "out --per-class (per_class=False)"
            )
        check_tombstones(index)
        check_parts(index)
        check_fitted(index)
        bars = partial(progress_of, shown=progress)
        vectors = index.embeddings(live)
        if (what := wrong_embeddings(vectors, index.normalized)) is not None:
            raise IndexFormatError(
                f"{index.path}: of the embeddings, {what}; `embedcam verify` says which file is "
                "damaged"
            )
        with bars("group", len(live)) as tick:
            groups = group(vectors, labels if per_class else None, prototypes, seed, tick)
        made, sample = _merged(index, live, vectors, labels, groups, seed, bars)
        with bars("measure", len(sample)) as tick:
            lost = fidelity(made, sample, tick)
        about = {
            "from_rows": len(live),
            "from_bytes": index.manifest.named_bytes,
            "prototypes": prototypes,
            "rows": len(groups),
            "per_class": per_class,
            "seed": seed,
            "fidelity": lost,
        }
        _write(made, path, about, replace)
    with Index.open(path, with_faiss=False) as small:
        size = small.manifest.named_bytes
    seconds = time.perf_counter() - began
    return CompressReport(path, len(live), len(groups), about, size, seconds)


def _check(index: Index, path: Path, prototypes: int, seed: int, replace: bool) -> None:
    index.refuse_prototypes("compress the index it was made of, with another number")
    if not len(index):
        raise InputError(f"{index.path}: every image was removed; there is nothing to compress")
    for name, value, least, most, which in (
        ("prototypes", prototypes, 1, len(index), "the number of images"),
        ("seed", seed, 0, 2**32 - 1, "the largest seed"),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(
                f"{name} = {value!r}; give a whole number from {least} to {most:,}, {which}"
            )
    if (path / "manifest.json").exists():
        with Index.open(path, with_faiss=False) as there:
            merged = there.manifest.is_compressed
        if not merged:
            raise InputError(
                f"{path}: holds an index of images, which prototypes do not replace; choose "
                "another folder"
            )
        if not replace:
            raise InputError(
                f"{path}: holds a finished index of prototypes; --replace (replace=True) swaps it "
                "for the new one, or choose another folder"
            )
    check_target(path, replace)


def _merged(
    index: Index,
    live: np.ndarray,
    vectors: np.ndarray,
    labels: Sequence[str | None],
    groups: Groups,
    seed: int,
    bars: Callable[[str, int], AbstractContextManager[Advance]],
) -> tuple[Compressed, np.ndarray]:
    """The prototypes, and the rows that their loss is measured on."""
    sample = sample_rows(len(live), seed)
    kept = np.unique(groups.of[sample])
    centres = centres_of(vectors, groups, index.normalized, kept)
    with bars("merge", len(index.layers) * len(live)) as tick:
        layers = [
            merge(index, live, groups, number, kept, tick) for number in range(len(index.layers))
        ]
    names = names_of(labels, groups)
    return Compressed(index, live, vectors, labels, groups, centres, layers, kept, names), sample


def names_of(labels: Sequence[str | None], groups: Groups) -> list[str | None]:
    """The label that all members of a group share, else None, `[G]`."""
    names = [labels[row] for row in groups.firsts]
    for label, number in zip(labels, groups.of, strict=True):
        if names[number] != label:
            names[number] = None
    return names


def ids_of(names: Sequence[str | None], per_class: bool) -> list[str]:
    """ "prototype-0001" ..., or in each label "LABEL/0001" ...: all different for any labels."""
    if not per_class:
        return [f"prototype-{number:04d}" for number in range(1, len(names) + 1)]
    ids, last = [], dict[str | None, int]()
    for name in names:
        last[name] = last.get(name, 0) + 1
        # Without a slash, so that no label can make the same.
        ids.append(("prototype-" if name is None else f"{name}/") + f"{last[name]:04d}")
    return ids


def _write(made: Compressed, path: Path, about: dict[str, Any], replace: bool) -> None:
    index, groups, centres = made.index, made.groups, made.centres
    medoids = made.live[centres.medoids]
    used = np.bincount(groups.of, weights=index.triplets_used(made.live))
    coarse = [
        maps_of_medoids(index, made.live, centres, merged, number)
        for number, merged in enumerate(made.layers)
    ]
    part = PartData(
        ids=ids_of(made.names, about["per_class"]),
        labels=made.names,
        paths=index.paths[medoids],
        embeddings=centres.embeddings,
        triplets_used=np.minimum(used, np.iinfo(np.uint32).max).astype(np.uint32),
        fields=[merged.fields for merged in made.layers],
        coarse=coarse,
        marks=index.select(medoids).marks if index.marked else None,
    )
    fitted = [merged.encoding.fitted for merged in made.layers]
    # Flat whatever the index had: lists and graphs are for many rows.
    create(
        path, _header(made, about), fitted, index.shared(), part, factory="Flat", replace=replace
    )


def _header(made: Compressed, about: dict[str, Any]) -> dict[str, Any]:
    """What the source's manifest says of how its rows were made, and what became of them."""
    manifest = made.index.manifest.to_dict()
    same = ("recipe", "network", "embedding", "metric", "method", "target", "norm", "triplets")
    images = manifest.get("images")
    return {
        **{key: manifest.get(key) for key in same},
        # The digest is of the files of all images, which are no longer the rows.
        "images": None if images is None else {**images, "files_sha256": None},
        "libraries": manifest["libraries"],
        "layers": [
            {**layer, "encoding": merged.encoding.spec()}
            for layer, merged in zip(manifest["layers"], made.layers, strict=True)
        ],
        "fitted_on": manifest["fit"]["images"],
        "compressed": about,
    }
