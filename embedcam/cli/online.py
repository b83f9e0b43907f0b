"""The command that explains queries."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ImageError, InputError
from ..writing import write_whole
from .direct import check_method, options_of, redrawn, trust_of
from .networks import check_onnx, network_given
from .report import columns, note
from .reporting import check_report, write


def explain(options: argparse.Namespace) -> None:
    """Explain query images against an index."""
    from ..explain import Explainer
    from ..index import Index
    from ..report import small_size

    # Whatever can be refused is refused before the network is loaded.
    reported = check_report(options)
    options.resumes = reported is not None
    if reported is None:
        _check_queries(options.queries)
    pictures = plan_pictures(options.output, options.queries)
    _check_page(options.html, options.queries)
    method = check_method(options)
    check_onnx(options)
    with Index.open(options.index) as index:
        asked = _asked(options, index)
        network = network_given(options, index.manifest)
        explainer = Explainer(
            index,
            network,
            transfer=options.transfer,
            images=options.images,
            **trust_of(options, index, network),
        )
        if reported is not None:
            write(options, explainer, reported, asked)
            return
        records, rows = [], []
        for query, picture in zip(options.queries, pictures, strict=True):
            explanation = explainer.explain(query, **asked)
            if method is not None:
                explanation = redrawn(
                    explanation, index, network, query, method, options_of(options), options.quiet
                )
            if explanation.trusted is False:
                note(
                    options,
                    f"note: {query}: its map is not to be trusted (expected correlation with a "
                    f"directly computed one: {explanation.trust:.2f}); --fallback computes one",
                )
            if explanation.empty:
                note(
                    options,
                    f"note: {query}: nothing in it speaks for these results, so its map is empty; "
                    "more neighbours (-n) or an index built with --norm around may say more",
                )
            if picture is not None:
                explanation.save(picture, scale=options.scale, title=Path(query).name)
            if options.html:
                rows.append(_row(query, explanation))
            if options.json:
                saved = {} if picture is None else {"picture": str(picture)}
                # A small map can be drawn large again; fifty thousand numbers fill the terminal.
                small = small_size(explanation.cam.shape)
                records.append({"query": query, **saved, **explanation.to_dict(small)})
            else:
                print("\n".join(_lines(query, picture, explanation)))
    if options.html:
        _write_page(options, rows)
    if options.json:
        print(json.dumps(records))


def _asked(options: argparse.Namespace, index: Any) -> dict[str, Any]:
    """What `Explainer.explain` is asked for, ids checked."""
    if options.neighbors and options.n_neighbors:
        raise InputError("--neighbors names the results and -n searches for them; give one")
    asked: dict[str, Any] = {"n_neighbors": options.n_neighbors, "result": options.result}
    if options.result is not None:
        index.position(options.result)
    if options.neighbors:
        asked["neighbors"] = list(_ids(index, options.neighbors))
        index.positions(asked["neighbors"])
    return asked


def _check_queries(queries: Sequence[str]) -> None:
    for query in queries:
        if Path(query).is_dir():
            raise ImageError(
                f"{query}: is a folder; name the pictures in it, as in {query}/*.jpg, or give "
                "--report FOLDER"
            )
        if not Path(query).exists():
            raise ImageError(f"{query}: does not exist")


def _ids(index: Any, given: Sequence[str]) -> Iterator[str]:
    """Ids separated by commas; an id that holds one itself is recognised as a whole."""
    for text in given:
        if text in index.find_live([text]):
            yield text
        else:
            yield from (name for name in text.split(",") if name)


def plan_pictures(output: str | None, queries: Sequence[str]) -> list[Path | None]:
    """Where each query's picture goes: the file named, or one a query in the folder named.

    Raises:
        InputError: one file for several queries, an ending that is no picture's, a folder that
            cannot be written, or a picture that would replace a query.
    """
    if output is None:
        return [None] * len(queries)
    from ..explanation import check_picture_name

    where = Path(output)
    folder = where.is_dir() or output.endswith("/") or not where.suffix
    if not folder and len(queries) > 1:
        raise InputError(
            f"-o {output} is one file and there are {len(queries)} queries; give a folder, or "
            "--html FILE for one page with all of them"
        )
    if folder:
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"-o {output}: not a folder ({error.strerror})") from error
        planned = [where / name for name in picture_names(queries)]
    else:
        check_picture_name(where)
        check_folder(where)
        planned = [where]
    for picture in planned:
        _refuse_query(picture, queries)
    return list(planned)


def picture_names(queries: Sequence[str]) -> list[str]:
    """A file name for each query's picture, all different: 1.png; a-1.png beside b-1.png."""
    paths = [Path(query) for query in queries]
    stems = Counter(path.stem for path in paths)
    names = [
        path.stem
        if stems[path.stem] == 1
        else "-".join(filter(None, (path.parent.name, path.stem)))
        for path in paths
    ]
    taken: set[str] = set()
    unique = []
    for name in names:
        number, other = 1, name
        while other.casefold() in taken:
            number += 1
            other = f"{name}-{number}"
        taken.add(other.casefold())
        unique.append(f"{other}.png")
    return unique


def _check_page(page: str | None, queries: Sequence[str]) -> None:
    if page is None:
        return
    if Path(page).is_dir():
        raise InputError(f"--html {page} is a folder; give a file, such as {Path(page)}/why.html")
    check_folder(Path(page))
    _refuse_query(Path(page), queries)


def check_folder(file: Path) -> None:
    """Refuse a file in a folder that is not there."""
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}; make it first")


def _refuse_query(file: Path, queries: Sequence[str]) -> None:
    if file.exists() and any(file.samefile(query) for query in queries if Path(query).exists()):
        raise InputError(f"{file} is a query itself and would be replaced; write somewhere else")


def _row(query: str, explanation: Any) -> Any:
    from ..render import Row

    tile, results = explanation.tiles()
    return Row(tile, results, title=Path(query).name)


def _write_page(options: argparse.Namespace, rows: list[Any]) -> None:
    from ..render import page

    text = page(rows, title="Why did these come back?", scale=options.scale)
    write_whole(options.html, text)
    note(options, f"page: {options.html}")


def _lines(query: str, picture: Path | None, explanation: Any) -> list[str]:
    """The query, and below it a table of its results."""
    labels = [label or "" for label in explanation.labels]
    table = [
        [str(place), f"{distance:.3g}", name, label]
        for place, (name, label, distance) in enumerate(
            zip(explanation.ids, labels, explanation.distances, strict=True), 1
        )
    ]
    header = ["", "distance", "result", "label" if any(labels) else ""]
    shown = columns([header, *table], right=(0, 1))
    head = query if picture is None else f"{query} -> {picture}"
    if explanation.explained != explanation.ids:
        head += f" (what matched {explanation.explained[0]})"
    return [head, *(f"  {line}" for line in shown)]
