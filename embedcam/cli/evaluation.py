"""The command that measures how good an index's maps are."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..errors import InputError, show, show_json
from .networks import named, network_of_index, network_options
from .online import check_folder
from .report import columns, found_images, naming_skip, note


def evaluate(options: argparse.Namespace) -> None:
    """Measure the maps of an index on query images."""
    from ..evaluate import Settings, evaluate_index
    from ..evaluate.report import intro, tables
    from ..evaluate.rivals import named_methods, named_recipes
    from ..index import Index

    # Whatever can be refused is refused before the network is loaded.
    _check_files(options)
    settings = _settings(options, Settings)
    methods, recipes = options.methods or (), options.recipes or ()
    named_methods(methods)
    named_recipes(recipes)
    if options.indexed is not None and not Path(options.indexed).is_dir():
        raise InputError(f"--indexed {options.indexed}: there is no such folder")
    source = found_images(options, options.images, options.labels or "auto")
    _check_regions(options, source)
    with Index.open(options.index) as index:
        network = named(network_of_index(index.manifest, network_options(options)))
        with naming_skip(options):
            found = evaluate_index(
                index,
                source,
                network,
                boxes=options.boxes,
                masks=options.masks,
                indexed=options.indexed,
                methods=methods,
                recipes=recipes,
                settings=settings,
                on_unreadable=options.on_unreadable or "fail",
                workers=options.workers,
                progress=False if options.quiet else None,
            )
    # Files first: a reader that goes away (`| head`) ends the command.
    for what, file, save in (
        ("page", options.html, found.save_html),
        ("numbers of each image", options.csv, found.save_csv),
    ):
        if file is not None:
            save(file)
            note(options, f"{what}: {file}")
    summary = found.summary
    if options.json:
        show_json(found.to_dict(), indent=2)
    else:
        show(*_lines(summary, intro(summary), tables(summary)))


def _settings(options: argparse.Namespace, kind: Any) -> Any:
    """The settings that were given; the others are the default's."""
    names = (
        "n_neighbors", "transfer", "limit", "faithfulness", "scenes", "fidelity", "steps",
        "removed", "threshold", "fill", "measures", "seed", "batch_size", "examples",
    )  # fmt: skip
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return kind(**given, controls=not options.no_controls)


def _check_regions(options: argparse.Namespace, source: Any) -> None:
    from ..evaluate.regions import of_boxes, of_masks

    if options.boxes and options.masks:
        raise InputError("give --boxes or --masks, not both")
    if options.boxes:
        of_boxes(options.boxes, source)
    if options.masks:
        of_masks(options.masks, source)


def _check_files(options: argparse.Namespace) -> None:
    """Refuse to write where nothing can be, or over what is read or written besides."""
    written = [file for file in (options.html, options.csv) if file is not None]
    for file in written:
        if Path(file).is_dir():
            raise InputError(f"{file} is a folder; give the name of a file in it")
        check_folder(Path(file))
        for other in (options.images, options.boxes):
            there = other is not None and Path(file).exists() and Path(other).exists()
            if there and Path(file).samefile(other):
                raise InputError(f"{file} is read, and would be replaced; write somewhere else")
    if len({os.path.realpath(file) for file in written}) < len(written):
        raise InputError(f"--html and --csv both name {options.csv}; give each its own file")


def _lines(summary: dict[str, Any], intro: str, tables: list[Any]) -> list[str]:
    from ..evaluate.report import ON_ONE_OBJECT

    lines = [intro]
    for table in tables:
        # The page has room for what each measure says; the terminal has not.
        kept = [place for place, name in enumerate(table.header) if name or place == 0]
        cells = [[str(row[place]) for place in kept] for row in [table.header, *table.rows]]
        lines += ["", table.caption, *(f"  {line}" for line in columns(cells, range(1, len(kept))))]
    lines.append("")
    if any("*" in str(cell) for table in tables for row in table.rows for cell in row):
        lines.append(
            "* transferred maps are not better than this (95% interval of the paired difference)"
        )
    lines += summary["beats"]
    said = [one["says"] for one in summary["checks"] if one["raised"]]
    lines += said
    lines += [f"does not beat its controls: {x}" for x in summary["flags"] if x not in said]
    if summary["flags"] and any(ON_ONE_OBJECT in table.notes for table in tables):
        lines.append(ON_ONE_OBJECT)
    lines += [f"note: {text}" for text in summary["notes"]]
    seconds = summary["seconds"]
    lines.append(
        f"{seconds['total']:.0f} s: {seconds['forward']:.0f} in forward passes, "
        f"{seconds['metrics']:.0f} in metrics"
    )
    return lines
