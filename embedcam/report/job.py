"""Many queries explained into one folder: a page for people, JSON lines for machines."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from .. import __version__
from .._checks import whole
from ..errors import InputError
from ..images import MAX_PIXELS, ImageSource
from ..images.batches import default_workers
from ..images.progress import progress_of
from ..index.matching import kinship
from ..index.neighbors import check_rival
from ..render import Look, page_foot, page_head
from .folder import FEATURES, LINES, PAGE, Folder, check_folder, open_folder
from .queries import Opened, explain_opened, finished, open_query
from .words import Fact, blocks, facts, intro

if TYPE_CHECKING:
    from ..explain.explainer import Explainer
    from ..render.tiles import Scale

SIDE: Final = 200
"""Pixels on the longest side of a picture: a page of thousands still opens."""
_QUALITY: Final = 80


@dataclass(frozen=True)
class Report:
    """What a report holds.

    Attributes:
        path: the page.
        n_queries: all queries.
        n_new: queries explained by this call; the others were finished before.
        unreadable: (query, reason) of those that could not be read or embedded.
        n_untrusted: queries whose map is not to be trusted.
        n_empty: queries with an empty map.
        n_changed: queries with a result whose picture is another file than was indexed.
    """

    path: Path
    n_queries: int
    n_new: int
    unreadable: list[tuple[str, str]]
    n_untrusted: int
    n_empty: int
    n_changed: int = 0


@dataclass(frozen=True)
class _Job:
    """What a report is made of."""

    explainer: Explainer
    source: ImageSource
    asked: Mapping[str, Any]
    neighbors: Sequence[str] | None
    options: Mapping[str, Any]
    look: Look
    index: Mapping[str, Any]
    title: str


def write_report(
    explainer: Explainer,
    source: ImageSource,
    folder: str | Path,
    *,
    n_neighbors: int | None = None,
    result: str | None = None,
    above: str | None = None,
    neighbors: Sequence[str] | None = None,
    exclude_query: bool = False,
    features: bool = False,
    scale: Scale = "joint",
    side: int = SIDE,
    title: str = "Why did these come back?",
    batch_size: int = 16,
    progress: bool | None = None,
) -> Report:
    """Explain many queries on one page; run again after an interruption, it goes on.

    Writes `index.html`, self-contained, and `explanations.jsonl`, a line a query: `query` (its id),
    `path`, and `Explanation.to_dict` with a map of at most 14 x 14, or `error`. A query that cannot
    be read or embedded is listed with the reason and stops nothing. Pictures are held for a batch
    or two at a time, however many queries there are. A kill leaves a whole page or none.

    Args:
        explainer: explains; with a network, so that pictures can be embedded.
        source: the queries, from `find_images` or `from_dataset`.
        folder: of the report alone; created where missing.
        n_neighbors, result, above, neighbors, exclude_query: as for `Explainer.explain`, for every
            query.
        features: with "features" in each line, and all of them as `features.npy`, float32 `[n K]`:
            a row for each line, NaN where the query could not be explained.
        scale: "joint" gives the results of a query one colour scale, "each" each its own.
        side: the longest side of the pictures in the page, in pixels.
        title: of the page.
        batch_size: queries a forward pass; changes nothing beyond float rounding.
        progress: a bar; None shows it on a terminal or in a notebook, else logs how far it is.

    Raises:
        InputError: a folder that holds something else, or a report of another index, of other
            queries or with other options; a disk that cannot be written; or an argument.
    """
    check_folder(folder)
    named = (result, above)
    job = _job(
        explainer,
        source,
        n_neighbors,
        named,
        neighbors,
        exclude_query,
        features,
        scale,
        side,
        title,
    )
    about = {
        "embedcam": __version__,
        "index": job.index,
        "queries": _described(source),
        "options": {**job.options, "title": title},
    }
    batch_size = _at_least_one("batch_size", batch_size)
    with open_folder(Path(folder), about) as place:
        n_new = 0
        if not place.complete:
            n_new = _explain_missing(job, place, batch_size, progress)
            known = _assemble(job, place)
        else:
            known = facts(place.lines(), kinship(explainer.index.manifest))
        place.tidy()
    return _told(place.path / PAGE, known, n_new)


def _job(
    explainer: Explainer,
    source: ImageSource,
    n_neighbors: int | None,
    named: tuple[str | None, str | None],
    neighbors: Sequence[str] | None,
    exclude_query: bool,
    features: bool,
    scale: Scale,
    side: int,
    title: str,
) -> _Job:
    """The arguments, checked before anything is written."""
    if explainer.network is None or explainer.preprocess is None:
        raise InputError(
            "a report embeds pictures, so its Explainer needs the index's network, with its "
            "preprocessing; give it one"
        )
    if len(source) == 0:
        raise InputError("there is no query; give at least one picture")
    if neighbors is not None and n_neighbors is not None:
        raise InputError("give n_neighbors to search, or neighbors to name them, not both")
    index, count = explainer.index, explainer.n_neighbors
    result, above = named
    check_rival(result, above)
    for name in (*(neighbors or ()), *(one for one in named if one is not None)):
        index.position(name)
    given = None if neighbors is None else list(neighbors)
    options = {
        "n_neighbors": whole("n_neighbors", count if n_neighbors is None else n_neighbors, 1),
        "result": result,
        "neighbors": given,
        "transfer": explainer.transfer,
        "trusted_from": explainer.trusted_from,
        "fallback": None if explainer.fallback is None else type(explainer.fallback).__name__,
        "images": _pictures_root(explainer),
        "network": type(explainer.network).__name__,
        "autocast": str(getattr(explainer.network, "autocast", None)),
        "scale": scale,
        "side": _at_least_one("side", side),
        **({"exclude_query": True} if exclude_query else {}),
        **({} if above is None else {"above": above}),
        **({"features": True} if features else {}),
    }
    if explainer.max_pixels != MAX_PIXELS:
        options["max_pixels"] = explainer.max_pixels
    look = Look(scale, side, quality=_QUALITY, long=True)
    asked = {
        "n_neighbors": n_neighbors,
        "result": result,
        "above": above,
        "exclude_query": exclude_query,
    }
    return _Job(explainer, source, asked, given, options, look, _version(explainer), title)


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} = {value!r}; give a whole number of at least 1")
    return value


def _version(explainer: Explainer) -> dict[str, Any]:
    manifest = explainer.index.manifest
    return {"generation": manifest.generation, "sha256": manifest.manifest_sha256}


def _pictures_root(explainer: Explainer) -> str:
    """Where the indexed pictures are read from."""
    index = explainer.index
    if len(index) == 0:
        raise InputError(f"{index.path}: holds no image, so nothing comes back; add some first")
    return os.path.abspath(explainer.root) + (" alone" if explainer.only_below else "")


def _described(source: ImageSource) -> dict[str, Any]:
    """The queries: how many, and a digest of their ids, paths, sizes and times of change."""
    digest = hashlib.sha256(os.path.abspath(source.root or "").encode("utf-8", "surrogateescape"))
    for position, item in enumerate(source.items):
        entry = json.dumps([item.id, item.path, source.fingerprint(position)])
        digest.update(entry.encode())
    return {"count": len(source), "sha256": digest.hexdigest()}


def _explain_missing(job: _Job, place: Folder, batch_size: int, progress: bool | None) -> int:
    """Explain what is not finished yet; how many queries that were.

    A batch is explained whole or not at all: another composition could round otherwise.
    """
    done, n_new = place.finished(), 0
    batches = [
        range(start, min(start + batch_size, len(job.source)))
        for start in range(0, len(job.source), batch_size)
    ]
    ahead = [batch for batch in batches if not done.issuperset(batch)]
    n_ahead = sum(map(len, ahead))
    n_done = len(job.source) - n_ahead
    bar = progress_of("explain", len(job.source), "queries", shown=progress, done=n_done)
    with _threads() as pool, bar as advance:
        for batch, opened in _opened(job, pool, ahead):
            names = [job.source.name(position) for position in batch]
            found = explain_opened(job.explainer, names, opened, job.asked, job.neighbors)
            if _version(job.explainer) != job.index:
                raise InputError(
                    "the explainer was given another version of its index while the report was "
                    "written; give a new folder for a report of that one"
                )
            made = [
                pool.submit(
                    finished, job.source, position, one, why, job.look, "features" in job.options
                )
                for position, one, why in zip(batch, opened, found, strict=True)
            ]
            place.keep(dict(zip(batch, (one.result() for one in made), strict=True)))
            n_new += len(batch)
            advance(len(batch))
    return n_new


def _opened(
    job: _Job, pool: ThreadPoolExecutor, batches: Sequence[range]
) -> Iterator[tuple[range, list[Opened | str]]]:
    """Each batch with its queries opened; the next one is being read meanwhile."""

    def begin(batch: range) -> list[Future[Opened | str]]:
        prepare = job.explainer.preprocess
        assert prepare is not None
        return [pool.submit(open_query, job.source, p, prepare, job.look.side) for p in batch]

    waiting = begin(batches[0]) if batches else []
    for number, batch in enumerate(batches):
        opened = [one.result() for one in waiting]
        waiting = begin(batches[number + 1]) if number + 1 < len(batches) else []
        yield batch, opened


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that decode and draw; what waits is dropped when the job is stopped."""
    pool = ThreadPoolExecutor(default_workers(), thread_name_prefix="embedcam-report")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _assemble(job: _Job, place: Folder) -> list[Fact]:
    """Put the files in place, and their digests; a row is held no longer than it takes."""
    places, cropped = range(len(job.source)), False
    sums = {name: hashlib.sha256() for name in place.files}

    def put(file: IO[bytes], name: str, content: str | bytes) -> None:
        data = content.encode("utf-8") if isinstance(content, str) else content
        sums[name].update(data)
        file.write(data)

    with place.filled(LINES) as file:
        for position in places:
            one = place.read(position)
            put(file, LINES, f"{one.line}\n")
            cropped |= one.cropped
    index = job.explainer.index
    known = facts(place.lines(), kinship(index.manifest))
    if FEATURES in place.files:
        with place.filled(FEATURES) as file:
            for piece in _features(
                place.lines(), len(job.source), index.manifest.layers[0].channels
            ):
                put(file, FEATURES, piece)
    head = page_head(
        job.title,
        intro(Path(os.path.abspath(index.path)).name, index.manifest, job.options, known),
        blocks(known),
        job.look,
        maps=any(one.error is None for one in known),
        cropped=cropped,
    )
    with place.filled(PAGE) as file:
        put(file, PAGE, head)
        for position in places:
            put(file, PAGE, place.read(position).row)
        put(file, PAGE, page_foot())
    place.seal({name: digest.hexdigest() for name, digest in sums.items()})
    return known


def _features(lines: Iterable[str], count: int, width: int) -> Iterator[bytes]:
    """A .npy file of the lines' features, float32 `[count width]`, piece by piece."""
    head = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(head, about)
    yield head.getvalue()
    for line in lines:
        row = json.loads(line).get("features", np.full(width, np.nan))
        yield np.asarray(row, "<f4").tobytes()


def _told(path: Path, known: Sequence[Fact], n_new: int) -> Report:
    explained = [one for one in known if one.error is None]
    return Report(
        path,
        len(known),
        n_new,
        [(one.name, one.error) for one in known if one.error is not None],
        sum(one.trusted is False for one in explained),
        sum(one.empty for one in explained),
        sum(one.changed for one in explained),
    )
