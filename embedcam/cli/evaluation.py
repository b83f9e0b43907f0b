"""The command that measures how good an index's maps are."""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._options import chosen
from ..errors import InputError, show, show_json
from .networks import torch_network
from .online import check_folder
from .output import columns, images_of, naming_skip, note


def evaluate(options: Namespace) -> None:
    """Measure the maps of an index on query images."""
    from ..evaluate import Settings, evaluate_index
    from ..evaluate.regions import of_boxes, of_masks
    from ..evaluate.report import intro, tables
    from ..evaluate.rivals import named_methods, named_recipes
    from ..index import Index

    # Whatever can be refused is refused before the network is loaded.
    _check_files(options)
    settings = Settings(**chosen(options, Settings))
    methods, recipes = options.methods or (), options.recipes or ()
    named_methods(methods)
    named_recipes(recipes)
    if options.indexed is not None and not Path(options.indexed).is_dir():
        raise InputError(f"--indexed {options.indexed}: there is no such folder")
    source = images_of(options, options.images, options.labels or "auto")
    if options.boxes and options.masks:
        raise InputError("give --boxes or --masks, not both")
    if options.boxes:
        of_boxes(options.boxes, source)
    if options.masks:
        of_masks(options.masks, source)
    with Index.open(options.index) as index:
        network = torch_network(options, index.manifest)
        with naming_skip(options):
            evaluation = evaluate_index(
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
        ("page", options.html, evaluation.save_html),
        ("numbers of each image", options.csv, evaluation.save_csv),
    ):
        if file is not None:
            save(file)
            note(options, f"{what}: {file}")
    summary = evaluation.summary
    if options.json:
        show_json(evaluation.to_dict(), indent=2)
    else:
        show(*_lines(summary, intro(summary), tables(summary)))


def _check_files(options: Namespace) -> None:
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


def _lines(summary: dict[str, Any], intro: str, tables: Sequence[Any]) -> list[str]:
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
    doubts = [one["says"] for one in summary["checks"] if one["raised"]]
    lines += summary["beats"] + doubts
    lines += [f"does not beat its controls: {x}" for x in summary["flags"] if x not in doubts]
    if summary["flags"] and any(ON_ONE_OBJECT in table.notes for table in tables):
        lines.append(ON_ONE_OBJECT)
    lines += [f"note: {text}" for text in summary["notes"]]
    seconds = summary["seconds"]
    lines.append(
        f"{seconds['total']:.0f} s: {seconds['forward']:.0f} in forward passes, "
        f"{seconds['metrics']:.0f} in metrics"
    )
    return lines
