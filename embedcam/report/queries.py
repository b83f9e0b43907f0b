"""One query of a report: opened, explained, and made into a row of the page and a line of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EmbeddingError, ImageError, InputError, NetworkError, printable, ran_out
from ..explain.explanation import Explanation, small_size
from ..images import ImageSource
from ..render import Look, Row, Tile, page_row, shrunk
from .folder import Finished

if TYPE_CHECKING:
    from ..explain.explainer import Explainer
    from ..preprocess import AnyPreprocess, Extent


@dataclass(frozen=True)
class Opened:
    """A query that could be read.

    Attributes:
        inputs: for the network, `[3 H W]`.
        small: its picture at the size of the page; of full size there is none, so that many fit
            into memory.
        extent: what the network sees of it, in pixels of the full picture.
        file: where it lies, or None.
    """

    inputs: np.ndarray
    small: Tile
    extent: Extent
    file: str | None = None


def open_query(
    source: ImageSource, position: int, preprocess: AnyPreprocess, side: int
) -> Opened | str:
    """A query's input and small picture, or why there is none.

    Raises:
        InputError: a transform that is at fault itself.
    """
    name = source.name(position)
    try:
        picture = source.open(position)
        inputs = preprocess(picture)
        extent = preprocess.extent(*picture.size)
    except ImageError as error:
        return _named(name, str(error))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    file = name if source.items[position].path else None
    return Opened(inputs, shrunk(Tile(picture, None, extent), side), extent, file)


def explain_opened(
    explainer: Explainer,
    names: Sequence[str],
    opened: Sequence[Opened | str],
    asked: Mapping[str, Any],
    neighbors: Sequence[str] | None = None,
) -> list[Explanation | str]:
    """An explanation for each query, by one forward pass, or why there is none.

    Args:
        explainer: explains.
        names: what messages call the queries.
        opened: the queries.
        asked: what `explain_batch` is asked for.
        neighbors: ids named in place of a search, for every query.
    """

    def explained(queries: list[Opened]) -> list[Explanation]:
        named = None if neighbors is None else [neighbors] * len(queries)
        files = [one.file for one in queries]
        inputs = [one.inputs for one in queries]
        return explainer.explain_batch(inputs, neighbors=named, files=files, **asked)

    readable = [one for one in opened if isinstance(one, Opened)]
    found: Iterator[Explanation | None]
    try:
        found = iter(explained(readable))
    except NetworkError as error:
        if ran_out(error):
            raise
        # Of one picture, usually: an embedding of zeros. The others are explained without it.
        found = iter([None] * len(readable))
    made: list[Explanation | str] = []
    for name, one in zip(names, opened, strict=True):
        if isinstance(one, str):
            made.append(one)
            continue
        try:
            made.append(next(found) or explained([one])[0])
        except EmbeddingError as error:
            made.append(str(error.named([name])))
        except NetworkError as error:
            if ran_out(error):
                raise
            made.append(_named(name, str(error)))
    return made


def _named(name: str, message: str) -> str:
    return message if message.startswith(printable(name)) else f"{name}: {message}"


def finished(
    source: ImageSource,
    position: int,
    opened: Opened | str,
    found: Explanation | str,
    look: Look,
    features: bool = False,
) -> Finished:
    """What is kept of a query: its row of the page and its line of JSON, with its features."""
    item = source.items[position]
    where = os.path.join(source.root or "", item.path) if item.path else ""
    told = {
        "query": item.id,
        "label": item.label,
        "path": os.path.abspath(where) if where else None,
    }
    if isinstance(found, str) or isinstance(opened, str):
        return Finished(json.dumps({**told, "error": found}))
    found = replace(found, extent=opened.extent)
    record = found.to_dict(small_size(found.cam.shape), features=features)
    shown = replace(found, image=opened.small.image, extent=opened.small.extent)
    query, results = shown.tiles(look.side)
    row = Row(query, results, _notes(found), item.id, anchor=anchor(position))
    cropped = any(tile.cropped for tile in (query, *results))
    return Finished(json.dumps({**told, **record}, allow_nan=False), page_row(row, look), cropped)


def anchor(position: int) -> str:
    """What a link to a query's row names."""
    return f"q{position + 1}"


def _notes(found: Explanation) -> str:
    """What must be known before the map of a query is looked at."""
    doubt = _doubt(found)
    return f"{doubt} {_map_note(found)}".strip()


def _doubt(found: Explanation) -> str:
    if not found.doubtful:
        return ""
    return f"Its first result is doubtful: match {found.match:.2f}."


def _map_note(found: Explanation) -> str:
    if found.empty:
        return f"Its map is empty: {found.why_empty}."
    if found.trusted is False:
        return (
            "Its map is not to be trusted: one in ten such maps correlates below "
            f"{found.trust_low:.2f} with a map computed on the query itself."
        )
    return ""
