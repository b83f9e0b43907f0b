"""The command that measures how good an index's maps are."""

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._options import chosen
from ..errors import InputError, show, show_json
from .networks import run_by, runtime_of, torch_network
from .online import check_file, check_folder
from .output import columns, images_of, note, say_run

if TYPE_CHECKING:
    from ..evaluate.settings import Record
    from ..render import Table


def evaluate(options: Namespace) -> None:
    """Measure the maps of an index on query images."""
    from ..evaluate import Settings, evaluate_index
    from ..evaluate.regions import of_boxes, of_masks
    from ..evaluate.report import intro, tables
    from ..evaluate.rivals import named_methods, named_recipes
    from ..index import Index

    # Whatever can be refused is refused before the network is loaded.
    for file in filter(None, (options.html, options.csv)):
        check_file(file, options.images, options.boxes)
    if (
        options.html
        and options.csv
        and os.path.realpath(options.html) == os.path.realpath(options.csv)
    ):
        raise InputError(f"--html and --csv both name {options.csv}; give each its own file")
    check_folder("--indexed", options.indexed)
    settings = Settings(**chosen(options, Settings))
    named_methods(options.methods)
    named_recipes(options.recipes)
    source = images_of(options, options.images)
    if options.boxes:
        of_boxes(options.boxes, source)
    if options.masks:
        of_masks(options.masks, source)
    runtime_of(options)
    with (
        Index.open(options.index) as index,
        run_by(options, torch_network(options, index.manifest), threads=None) as network,
    ):
        evaluation = evaluate_index(
            index,
            source,
            network,
            boxes=options.boxes,
            masks=options.masks,
            indexed=options.indexed,
            methods=options.methods,
            recipes=options.recipes,
            settings=settings,
            on_unreadable=options.on_unreadable or "fail",
            workers=options.workers,
            progress=options.progress,
        )
        say_run(options, network, settings.batch_size)
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


def _lines(summary: "Record", intro: str, tables: "Sequence[Table]") -> list[str]:
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
