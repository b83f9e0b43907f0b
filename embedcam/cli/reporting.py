"""`explain --report`: a folder of queries on one page."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import ImageError, InputError, printable, show
from ..images import MAX_PIXELS, ImageSource, Item
from ..images.reading import why_missing
from .report import found_images, note

_INSTEAD = "--report writes index.html and explanations.jsonl into its folder; leave out {}"


def check_report(options: argparse.Namespace) -> ImageSource | None:
    """The queries of a report; None where none was asked for.

    Raises:
        InputError: what makes no sense with a report, or without one; or a folder that holds
            something else.
    """
    if options.report is None:
        if options.batch_size is not None:
            raise InputError("--batch-size is of a report; give --report FOLDER, or leave it out")
        for name in ("exclude", "labels"):
            if getattr(options, name):
                raise InputError(f"--{name} is of a report's folder; give --report FOLDER too")
        if options.features and not options.json:
            raise InputError("--features goes with --json or --report FOLDER; give one of them")
        return None
    from ..report import check_folder

    for name, given in (("-o", options.output), ("--html", options.html), ("--json", options.json)):
        if given:
            raise InputError(_INSTEAD.format(name))
    if options.method is not None:
        raise InputError(
            f"a report's maps are the index's; leave out --method {options.method}, or explain the "
            "queries with --html"
        )
    check_folder(options.report)
    return _queries(options)


def _queries(options: argparse.Namespace) -> ImageSource:
    """One folder, recursively, one CSV, or pictures."""
    given = options.queries
    first = Path(given[0])
    if len(given) == 1 and (first.is_dir() or first.suffix.lower() == ".csv"):
        # The folders of queries are rarely their labels; a column named so is.
        usual = "none" if first.is_dir() else "auto"
        return found_images(options, first, options.labels or usual)
    for name in ("exclude", "labels"):
        if getattr(options, name):
            raise InputError(f"--{name} goes with one folder or CSV; leave it out, or the pictures")
    for query in given:
        if Path(query).is_dir():
            raise InputError(f"{query}: is a folder; give one folder, one CSV or pictures")
        if not Path(query).exists():
            raise ImageError(f"{query}: {why_missing(query)}")
    items = [Item(query, query) for query in given]
    return ImageSource(items, max_pixels=options.max_pixels or MAX_PIXELS)


def write(
    options: argparse.Namespace, explainer: Any, queries: ImageSource, asked: dict[str, Any]
) -> None:
    """Write the report, and say where it is."""
    from ..report import write_report

    sized = {} if options.batch_size is None else {"batch_size": options.batch_size}
    found = write_report(
        explainer,
        queries,
        options.report,
        scale=options.scale,
        features=options.features,
        progress=False if options.quiet else None,
        **sized,
        **asked,
    )
    for name, reason in found.unreadable:
        note(options, f"note: {reason if printable(name) in reason else f'{name}: {reason}'}")
    for number, what in (
        (found.n_untrusted, "with a map that is not to be trusted (--fallback computes one)"),
        (found.n_empty, "with an empty map"),
        (found.n_changed, "with a result whose picture changed since the build"),
    ):
        if number:
            note(options, f"note: {_queries_of(number)} {what}")
    if found.n_new == 0:
        show(f"{found.path}: all {_queries_of(found.n_queries)} explained before; nothing to do")
        return
    before = found.n_queries - found.n_new
    resumed = f", {before:,} of them before" if before else ""
    show(f"{found.path}: {_queries_of(found.n_queries)}{resumed}")


def _queries_of(number: int) -> str:
    return f"{number:,} quer{'y' if number == 1 else 'ies'}"
