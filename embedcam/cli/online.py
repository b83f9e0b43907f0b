"""The command that explains queries."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .networks import named, network_options
from .report import note


def explain(options: argparse.Namespace) -> None:
    """Explain query images against an index."""
    from ..explain import Explainer
    from ..index import Index

    if options.result and options.neighbors:
        raise InputError("--result explains by one image and --neighbors by several; give one")
    many = len(options.queries) > 1
    with Index.open(options.index) as index:
        stored = (index.manifest["network"] or {}).get("loading") or {}
        network = named({**stored, **network_options(options)})
        explainer = Explainer(
            index,
            network,
            n_neighbors=options.n_neighbors,
            transfer=options.transfer,
            images=options.images,
        )
        found = []
        for query in options.queries:
            explanation = explainer.explain(
                query,
                result=options.result,
                neighbors=options.neighbors.split(",") if options.neighbors else None,
            )
            found.append((query, explanation))
            if options.output:
                where = _output(Path(options.output), query, many)
                explanation.save(where, scale=options.scale)
                note(options, f"{query}: {where}")
        if options.html:
            _page(options, found)
    _print(options, found)


def _output(output: Path, query: str, many: bool) -> Path:
    """Where a query's picture goes: the file named, or one a query in the folder named."""
    if not many and output.suffix:
        return output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{output}: not a folder ({error.strerror}); several queries need one for pictures"
        ) from error
    return output / f"{Path(query).stem}.png"


def _page(options: argparse.Namespace, found: list[tuple[str, Any]]) -> None:
    from ..render import Row, page

    rows = []
    for query, explanation in found:
        tile, results = explanation.tiles()
        rows.append(Row(tile, results, title=Path(query).name))
    try:
        Path(options.html).write_text(
            page(rows, title="Why did these come back?", scale=options.scale), encoding="utf-8"
        )
    except OSError as error:
        raise InputError(f"{options.html}: the page cannot be written ({error})") from error
    note(options, f"page: {options.html}")


def _print(options: argparse.Namespace, found: list[tuple[str, Any]]) -> None:
    if options.json:
        records = [{"query": query, **explanation.to_dict()} for query, explanation in found]
        print(json.dumps(records, ensure_ascii=False))
        return
    for query, explanation in found:
        print(query)
        rows = zip(explanation.ids, explanation.labels, explanation.distances, strict=True)
        for place, (name, label, distance) in enumerate(rows, 1):
            print(f"  {place:>2}  {distance:.4f}  {name}" + ("" if label is None else f"  {label}"))
