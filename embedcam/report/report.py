"""Many queries explained into one folder: a page for people, JSON lines for machines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from .. import __version__
from .._checks import whole
from ..errors import (
    EmbedcamError,
    EmbeddingError,
    ImageError,
    InputError,
    NetworkError,
    printable,
    ran_out,
)
from ..explain.explanation import Explanation, small_size
from ..explain.sides import Shown
from ..images import MAX_PIXELS, ImageSource, Root, is_url
from ..images.batches import default_workers
from ..images.progress import progress_of
from ..index.calibration import kinship
from ..index.search import check_rival
from ..pairs import Comparison, PairExplainer, Receipt
from ..render import Row, Tile, shrunk
from ..render.page import PAGE_FOOT, Look, page_head, page_row
from .folder import FEATURES, LINES, PAGE, About, Finished, Folder, check_folder, open_folder
from .words import Fact, anchor, blocks, facts, in_sentences, intro, note_of

if TYPE_CHECKING:
    from ..explain.explainer import Explainer
    from ..preprocess import AnyPreprocess, Extent
    from ..render.tiles import Scale

SIDE: Final = 200
"""Pixels on the longest side of a picture: a page of thousands still opens."""
MOST_RECEIPTS: Final = 100
"""Queries that have receipts where nothing is said: each takes two more embeddings and 200 kB."""
_CUT_FROM: Final = 560
"""Pixels on the longest side of a query that places are cut out of."""


@dataclass(frozen=True)
class WrittenReport:
    """A report that was written.

    Attributes
    ----------
    path : the page
    n_queries : all queries
    n_new : queries explained by this call; the others were finished before
    unreadable : (query, reason) of those that could not be read or embedded
    n_untrusted : queries whose map is not to be trusted
    n_empty : queries with an empty map
    n_changed : queries with a result whose picture is another file than was indexed
    """

    path: Path
    n_queries: int
    n_new: int
    unreadable: list[tuple[str, str]]
    n_untrusted: int
    n_empty: int
    n_changed: int = 0


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
    receipts: bool | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> WrittenReport:
    """Explain many queries on one page; run again after an interruption, it goes on.

    Writes `index.html`, self-contained, and `explanations.jsonl`, a line a query: `query` (its id),
    `path`, and `Explanation.to_dict` with a map of at most 14 x 14, or `error`. A query that cannot
    be read or embedded is listed with the reason and stops nothing. Pictures are held for a batch
    or two at a time, however many queries there are. A kill leaves a whole page or none.

    Parameters
    ----------
    explainer : with a network, so that pictures can be embedded
    source : the queries, from `find_images` or `from_dataset`
    folder : of the report alone; created where missing
    n_neighbors, result, above, neighbors, exclude_query : as for `Explainer.explain`, for every
        query
    features : with "features" in each line, and all of them as `features.npy`, float32 `[n K]`: a
        row for each line, NaN where the query could not be explained
    scale : "joint" gives the results of a query one color scale, "each" each its own
    side : the longest side of the pictures in the page, in pixels
    title : of the page
    receipts : below each query that of it and its first result (or why that came above its rival):
        places that match first, then what adds up, see `pairs.Receipt`; none where a picture
        cannot be read any more. None: up to 100 queries, where the network has them
    batch_size : queries a forward pass, None for what suits the network; changes nothing beyond
        float rounding
    progress : a bar; None shows it on a terminal or in a notebook, else logs how far it is

    Raises
    ------
    InputError
        A folder that holds something else, or a report of another index, of other queries or with
        other options; a disk that cannot be written; or an argument.
    """
    check_folder(folder)
    if explainer.network is None or explainer.preprocess is None:
        raise InputError(
            "a report embeds pictures, so its Explainer needs the index's network, with its "
            "preprocessing; give it one"
        )
    if len(source) == 0:
        raise InputError("there is no query; give at least one picture")
    if neighbors is not None and n_neighbors is not None:
        raise InputError("give n_neighbors to search, or neighbors to name them, not both")
    index = explainer.index
    check_rival(result, above)
    for name in (*(neighbors or ()), *filter(None, (result, above))):
        index.position(name)
    if len(index) == 0:
        raise InputError(f"{index.path}: holds no image, so nothing comes back; add some first")
    count = explainer.n_neighbors if n_neighbors is None else n_neighbors
    options: About = {
        "n_neighbors": whole("n_neighbors", count, 1),
        "result": result,
        "neighbors": None if neighbors is None else list(neighbors),
        "transfer": explainer.transfer,
        "trusted_from": explainer.trusted_from,
        "fallback": None if explainer.fallback is None else type(explainer.fallback).__name__,
        "images": _absolute(explainer.root) + (" alone" if explainer.only_below else ""),
        "network": type(explainer.network).__name__,
        "autocast": str(explainer.network.autocast),
        "scale": scale,
        "side": whole("side", side, 1),
        "title": title,
    }
    # Left out where they say nothing, so that an older report is gone on with.
    pixels = None if explainer.max_pixels == MAX_PIXELS else explainer.max_pixels
    pairs = _pairs(explainer, len(source), receipts)
    rare = dict(exclude_query=exclude_query, above=above, features=features, max_pixels=pixels)
    rare["receipts"] = pairs is not None
    options |= {name: value for name, value in rare.items() if value}
    usual = explainer.network.usual_run.batch_size
    batch_size = whole("batch_size", usual if batch_size is None else batch_size, 1)
    look = Look(scale, side, quality=80, long=True)
    explain = partial(
        explainer.explain_batch,
        n_neighbors=n_neighbors,
        result=result,
        above=above,
        exclude_query=exclude_query,
    )
    version, queries = _version(explainer), _described(source)
    about = dict(embedcam=__version__, index=version, queries=queries, options=options)
    with open_folder(Path(folder), about) as place:
        n_new = 0
        if place.complete:
            known = facts(place.lines(), kinship(index.manifest))
        else:
            batches = [
                range(start, min(start + batch_size, len(source)))
                for start in range(0, len(source), batch_size)
            ]
            done = place.finished()
            # A batch is explained whole or not at all: another composition could round otherwise.
            ahead = [batch for batch in batches if not done.issuperset(batch)]
            n_new = sum(map(len, ahead))
            bar = progress_of(
                "explain", len(source), "queries", shown=progress, done=len(source) - n_new
            )
            with ExitStack() as stack, bar as advance:
                pool = ThreadPoolExecutor(default_workers(), thread_name_prefix="embedcam-report")
                # What waits is dropped when the job is stopped.
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
                large = side if pairs is None else max(side, _CUT_FROM)
                read = partial(open_query, source, explainer.preprocess, large)
                row = partial(finished, source, look, features)
                coming = pool.map(read, ahead[0]) if ahead else iter(())
                for batch, following in zip_longest(ahead, ahead[1:], fillvalue=range(0)):
                    # The next one is being read meanwhile.
                    opened, coming = list(coming), pool.map(read, following)
                    found = explain_opened(explain, opened, neighbors)
                    if _version(explainer) != version:
                        raise InputError(
                            "the explainer was given another version of its index while the report "
                            "was written; give a new folder for a report of that one"
                        )
                    why = map(partial(receipt_of, pairs), opened, found)
                    rows = pool.map(row, batch, opened, found, why)
                    place.keep(dict(zip(batch, rows, strict=True)))
                    advance(len(batch))
            known = _assemble(explainer, place, len(source), options, look)
        place.tidy()
    explained = [one for one in known if one.error is None]
    return WrittenReport(
        place.path / PAGE,
        len(known),
        n_new,
        [(one.name, one.error) for one in known if one.error is not None],
        sum(one.trusted is False for one in explained),
        sum(one.empty for one in explained),
        sum(one.changed for one in explained),
    )


def _version(explainer: Explainer) -> About:
    manifest = explainer.index.manifest
    return {"generation": manifest.generation, "sha256": manifest.manifest_sha256}


def _absolute(place: Root) -> str:
    return place if isinstance(place, str) and is_url(place) else os.path.abspath(place)


def _described(source: ImageSource) -> About:
    """Return how many queries, and a digest of their ids, paths, sizes and times of change."""
    digest = hashlib.sha256(_absolute(source.root or "").encode("utf-8", "surrogateescape"))
    for item, stamp in zip(source.items, source.fingerprints(), strict=True):
        entry = json.dumps([item.id, item.path, stamp])
        digest.update(entry.encode())
    return {"count": len(source), "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Opened:
    """A query that could be read; of its picture only a small one is kept: many must fit."""

    name: str
    inputs: np.ndarray  # [3 H W]
    small: Tile
    extent: Extent  # in the full picture
    file: str | None = None


def open_query(
    source: ImageSource, preprocess: AnyPreprocess, side: int, position: int
) -> Opened | str:
    """Return a query's input and small picture, or why there is none; raise what all would meet."""
    name = source.name(position)
    try:
        picture = source.open(position)
        inputs, extent = preprocess(picture), preprocess.extent(*picture.size)
    except ImageError as error:
        return _named(name, error)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    file = name if source.items[position].path else None
    return Opened(name, inputs, shrunk(Tile(picture, extent=extent), side), extent, file)


def explain_opened(
    explain: Callable[..., list[Explanation]],
    opened: Sequence[Opened | str],
    neighbors: Sequence[str] | None = None,
) -> list[Explanation | str]:
    """Return an explanation for each query, by one forward pass, or why there is none."""
    readable = [one for one in opened if isinstance(one, Opened)]
    try:
        answers = explain(
            [one.inputs for one in readable],
            neighbors=None if neighbors is None else [neighbors] * len(readable),
            files=[one.file for one in readable],
        )
    except NetworkError as error:
        if ran_out(error):
            raise
        if len(opened) > 1:
            # Of one picture, usually: an embedding of zeros. The others are explained without it.
            return [explain_opened(explain, [one], neighbors)[0] for one in opened]
        name = readable[0].name
        return [_named(name, error.named([name]) if isinstance(error, EmbeddingError) else error)]
    found = iter(answers)
    return [one if isinstance(one, str) else next(found) for one in opened]


def _pairs(explainer: Explainer, count: int, wanted: bool | None) -> PairExplainer | None:
    """Return what makes receipts, if they are wanted; raise InputError where they are not had."""
    if wanted is False or (wanted is None and count > MOST_RECEIPTS):
        return None
    try:
        return PairExplainer(explainer)
    except InputError:
        if wanted:
            raise
        return None


def receipt_of(
    pairs: PairExplainer | None, opened: Opened | str, found: Explanation | str
) -> Receipt | Comparison | None:
    """Return why a query's first result matches, or came above its rival; None where not told."""
    if pairs is None or isinstance(opened, str) or isinstance(found, str):
        return None
    first = found.asked or found.neighbors()[0]
    shown = Shown(opened.small.image, opened.small.extent)
    try:
        if found.rival is not None:
            above = pairs.above(opened.inputs, first.id, found.rival.id)
            return replace(above, query=replace(above.query, shown=shown))
        receipt = pairs.receipt(opened.inputs, first.id)
    except EmbedcamError:  # of a picture that is gone or another now, which the row says
        return None
    return replace(receipt, query=replace(receipt.query, shown=shown))


def _named(name: str, error: Exception) -> str:
    message = str(error)
    return message if message.startswith(printable(name)) else f"{name}: {message}"


def finished(
    source: ImageSource,
    look: Look,
    features: bool,
    position: int,
    opened: Opened | str,
    found: Explanation | str,
    why: Receipt | Comparison | None = None,
) -> Finished:
    """Return what is kept of a query: its row of the page and its line of JSON."""
    item = source.items[position]
    path = _absolute(source.place(position)) if item.path else None
    line = {"query": item.id, "label": item.label, "path": path}
    if isinstance(found, str) or isinstance(opened, str):
        return Finished(json.dumps({**line, "error": found}))
    found = replace(found, extent=opened.extent)
    line |= found.to_dict(small_size(found.cam.shape), features=features)
    shown = replace(found, image=opened.small.image, extent=opened.small.extent)
    query, results = shown.tiles(look.side)
    drawn = None if why is None else (why.plot(), in_sentences(why))
    row = Row(query, results, note_of(found), item.id, anchor=anchor(position), beneath=drawn)
    cropped = any(tile.cropped for tile in (query, *results))
    return Finished(json.dumps(line, allow_nan=False), page_row(row, look), cropped)


def _assemble(
    explainer: Explainer, place: Folder, count: int, options: About, look: Look
) -> list[Fact]:
    """Put the files in place; a row is held no longer than it takes."""
    manifest, cropped = explainer.index.manifest, False
    with place.filled(LINES) as file:
        for position in range(count):
            one = place.read(position)
            file.write(f"{one.line}\n".encode())
            cropped |= one.cropped
    known = facts(place.lines(), kinship(manifest))
    if FEATURES in place.files:
        width = manifest.layers[0].channels
        about = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        with place.filled(FEATURES) as file:
            np.lib.format.write_array_header_1_0(file, about)
            for line in place.lines():
                row = json.loads(line).get("features", np.full(width, np.nan))
                file.write(np.asarray(row, "<f4").tobytes())
    head = page_head(
        options["title"],
        intro(Path(os.path.abspath(explainer.index.path)).name, manifest, options, known),
        blocks(known),
        look,
        maps=any(one.error is None for one in known),
        cropped=cropped,
    )
    with place.filled(PAGE) as file:
        file.write(head.encode())
        for position in range(count):
            file.write(place.read(position).row.encode())
        file.write(PAGE_FOOT.encode())
    place.mark(complete=True)
    return known
