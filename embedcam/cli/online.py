"""The command that explains queries."""

import argparse
import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .._files import write_whole
from ..errors import ImageError, InputError, show, show_json
from ..images import MAX_PIXELS
from ..images.reading import why_missing
from .direct import check_method, options_of, redrawn, trust_of
from .networks import check_onnx, network_given
from .report import columns, counted, listing_ids, note, some_of
from .reporting import check_report, write


def explain(options: argparse.Namespace) -> None:
    """Explain query images against an index."""
    from ..explain.explainer import Explainer
    from ..explain.explanation import small_size
    from ..index import Index

    # Whatever can be refused is refused before the network is loaded.
    reported = check_report(options)
    options.resumes = reported is not None
    if reported is None:
        _check_queries(options.queries)
    pictures = plan_pictures(options.output, options.queries)
    _check_page(options.html, options.queries)
    check_images(options.images)
    method = check_method(options)
    check_onnx(options)
    with Index.open(options.index) as index:
        asked = _asked(options, index)
        _say_shared(options, index)
        network = network_given(options, index.manifest)
        explainer = Explainer(
            index,
            network,
            transfer=options.transfer,
            images=options.images,
            max_pixels=options.max_pixels or MAX_PIXELS,
            detail=options.detail,
            **trust_of(options, index, network),
        )
        if reported is not None:
            write(options, explainer, reported, asked)
            return
        records, rows = [], []
        shown, lost, changed = dict[str, None](), dict[str, None](), dict[str, None]()
        for query, picture in zip(options.queries, pictures, strict=True):
            explanation = explainer.explain(query, **asked)
            if method is not None:
                explanation = redrawn(
                    explanation, index, network, query, method, options_of(options), options.quiet
                )
            _say_trust(options, query, explanation)
            if explanation.empty:
                _say_empty(options, query, explanation)
            rivals = [] if explanation.rival is None else [explanation.rival.id]
            shown.update(dict.fromkeys(explanation.ids + explanation.explained + rivals))
            lost.update(dict.fromkeys(explanation.not_found()))
            changed.update(dict.fromkeys(explanation.changed()))
            if picture is not None:
                picture.parent.mkdir(parents=True, exist_ok=True)
                explanation.save(picture, scale=options.scale, title=Path(query).name)
            if options.html:
                rows.append(_row(query, explanation))
            if options.json:
                saved = {} if picture is None else {"picture": str(picture)}
                # A small map can be drawn large again; fifty thousand numbers fill the terminal.
                small = small_size(explanation.cam.shape)
                told = explanation.to_dict(small, features=options.features)
                records.append({"query": query, **saved, **told})
            else:
                show(*_lines(query, picture, explanation))
    if options.html:
        _write_page(options, rows)
    if options.json:
        show_json(records)
    _say_pictures(options, len(shown), len(lost), explanation.root)
    if changed:
        _say_changed(options, list(changed), explanation.prototypes)


def _say_trust(options: argparse.Namespace, query: str, explanation: Any) -> None:
    """What is not trusted, and what was done about it."""
    whose = "neighbours that came back" if explanation.asked is None else "result you named"
    if explanation.trusted is False:
        note(
            options,
            f"note: {query}: its map is not to be trusted: one in ten such maps correlates below "
            f"{explanation.trust_low:.2f} with one computed on the query; --fallback computes "
            f"that one, which answers for the {whose}, right or wrong",
        )
    if explanation.direct:
        note(
            options,
            f"note: {query}: computed on the query itself, for one in ten transferred maps "
            f"correlates below {explanation.trust_low:.2f} with that; it answers for the {whose}, "
            "right or wrong",
        )


def _say_empty(options: argparse.Namespace, query: str, explanation: Any) -> None:
    """Why the map is empty, and what may say more."""
    more = "more neighbours (-n) or an index built with --norm around may say more"
    if explanation.rival is not None:
        more = "name another image with --above, or leave it out"
    note(options, f"note: {query}: {explanation.why_empty}, so its map is empty; {more}")


def _say_shared(options: argparse.Namespace, index: Any) -> None:
    """That by a target of labels a result is hardly explained apart from its label."""
    from ..explain.snapshot import shared_of

    shared = shared_of(index.manifest) if options.method is None else None
    if options.result is None or not shared:
        return
    named = [name for name in (options.result, options.above) if name is not None]
    labels = index.select(index.positions(named)).labels
    query = options.queries[0] if len(options.queries) == 1 else "QUERY"
    if None in labels or len(set(labels)) < len(labels):
        return  # Where both are of one label, the note on the empty map says so.
    compared, what = options.result, "matches this one image"
    if options.above is not None:
        compared, what = f"{compared} --above {options.above}", "puts the one above the other"
    note(
        options,
        f"note: by this index's target the images of a label share {shared}: what speaks for "
        f"{' rather than '.join(labels)}; `embedcam compare {options.index} {query} {compared}` "
        f"says what {what}",
    )


def _say_pictures(options: argparse.Namespace, n_results: int, n_lost: int, root: Any) -> None:
    """That nothing was drawn, or that indexed pictures are missing in what was."""
    drawn = options.output is not None or options.html is not None
    if not drawn and not options.json:
        note(options, "note: no picture was written; -o why.png draws one")
    if drawn and n_lost:
        note(
            options,
            f"note: {n_lost:,} of {counted(n_results, 'indexed picture')} were not found under "
            f"{root}; --images FOLDER says where they are",
        )


def _say_changed(options: argparse.Namespace, changed: list[str], prototypes: bool) -> None:
    """That pictures are others than were indexed, and what to do about it."""
    then = f"`embedcam add --update {options.index} IMAGES` takes the new ones in"
    if prototypes:
        then = "update the index that they were compressed from, and compress that again"
    note(
        options,
        f"note: {counted(len(changed), 'indexed picture')} changed since the build "
        f"({some_of(changed)}): the stored maps are of the old files; {then}",
    )


def check_images(folder: str | None) -> None:
    """Refuse a folder of the indexed images that is none."""
    if folder is not None and not Path(folder).is_dir():
        raise InputError(
            f"--images {folder}: there is no such folder; give the one the indexed images lie in"
        )


def _asked(options: argparse.Namespace, index: Any) -> dict[str, Any]:
    """What `Explainer.explain` is asked for, ids checked."""
    if options.neighbors and options.n_neighbors:
        raise InputError("--neighbors names the results and -n searches for them; give one")
    asked: dict[str, Any] = {
        "n_neighbors": options.n_neighbors,
        "result": options.result,
        "above": options.above,
        "exclude_query": options.exclude_query,
    }
    _check_rival(options)
    with listing_ids(options.index):
        for name in (options.result, options.above):
            if name is not None:
                index.position(name)
        if options.neighbors:
            asked["neighbors"] = list(_ids(index, options.neighbors))
            index.positions(asked["neighbors"])
    return asked


def _check_rival(options: argparse.Namespace) -> None:
    if options.above is None:
        return
    if options.result is None:
        raise InputError(
            f"--above {options.above} is a rival, and no result was named; give --result, the "
            "image that is to be told from it"
        )
    check_above(options)
    if options.fallback:
        raise InputError(
            "--fallback computes maps of low trust, and a map with a rival has no trust; leave out "
            "--fallback, or give --method gradcam, which computes them all"
        )


def check_above(options: argparse.Namespace) -> None:
    """Refuse a rival that is the result itself."""
    if options.result == options.above:
        raise InputError(f"--above {options.above} is the result itself; name another image")


def _check_queries(queries: Sequence[str]) -> None:
    for query in queries:
        if Path(query).is_dir():
            example = _pattern_in(Path(query))
            if example is None:
                raise ImageError(f"{query}: is a folder without a picture in it; name pictures")
            raise ImageError(
                f"{query}: is a folder; name the pictures in it, as in {example}, or give "
                "--report FOLDER"
            )
        if not Path(query).exists():
            raise ImageError(f"{query}: {why_missing(query)}")


def _pattern_in(folder: Path) -> str | None:
    """What a shell would find some of the folder's pictures by: queries/*.jpg, queries/*/*.png."""
    from ..images import EXTENSIONS

    for depth in ("*", "*/*"):
        for file in sorted(islice(folder.glob(depth), 1000)):
            if file.suffix.lower() in EXTENSIONS:
                return str(folder / f"{depth}{file.suffix}")
    return None


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
    from ..explain.drawing import check_picture_name

    where = Path(output)
    folder = where.is_dir() or output.endswith("/") or not where.suffix
    if not folder and len(queries) > 1:
        raise InputError(
            f"-o {output} is one file and there are {len(queries)} queries; give a folder, or "
            "--html FILE for one page with all of them"
        )
    if folder:
        _check_makable(where, output)
        planned = [where / name for name in picture_names(queries)]
    else:
        check_picture_name(where)
        check_folder(where)
        planned = [where]
    for picture in planned:
        _refuse_query(picture, queries)
    return list(planned)


def _check_makable(folder: Path, output: str) -> None:
    """Refuse a folder that cannot be made, without making it: what fails leaves nothing behind."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    number = 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    number = number if there.is_dir() else errno.EEXIST
    if number:
        error = OSError(number, os.strerror(number))
        raise InputError(f"-o {output}: not a folder ({error.strerror})") from error


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


def _distance(value: float) -> str:
    """Of three places, so that a column can be compared; a tiny one by its first digits."""
    return f"{value:.3f}" if value == 0 or value >= 1e-3 else f"{value:.3g}"


def _lines(query: str, picture: Path | None, explanation: Any) -> list[str]:
    """The query, and below it a table of its results."""
    from ..render import CHANGED

    labels = [label or "" for label in explanation.labels]
    noted = dict.fromkeys(explanation.changed(), CHANGED)
    given = [("rival", explanation.rival), ("asked", explanation.asked)]
    named = [(word, one) for word, one in given if one is not None]
    for word, one in named:
        if one.id in explanation.ids:
            noted[one.id] = ", ".join(filter(None, (word, noted.get(one.id))))
    table = [
        [str(place), _distance(distance), name, label, noted.get(name, "")]
        for place, (name, label, distance) in enumerate(
            zip(explanation.ids, labels, explanation.distances, strict=True), 1
        )
    ]
    for word, one in named:
        if one.id not in explanation.ids:
            cells = [one.id, one.label or "", noted.get(one.id, "")]
            table.insert(0, [word, _distance(one.distance), *cells])
            labels.append(one.label or "")
    header = ["", "distance", "result", "label" if any(labels) else "", ""]
    shown = columns([header, *table], right=(0, 1))
    head = query if picture is None else f"{query} -> {picture}"
    if explanation.told_apart is not None:
        head += f" (what speaks for {' rather than '.join(explanation.told_apart)})"
    elif explanation.explained != explanation.ids:
        label = explanation.speaks_for
        what = f"matched {explanation.explained[0]}" if label is None else f"speaks for {label}"
        head += f" (what {what})"
    match = explanation.match_in_words
    # What casts doubt on all that follows is read first.
    lines = (match, *shown) if explanation.doubtful else (*shown, match)
    return [head, *(f"  {line}" for line in filter(None, (*lines, explanation.trust_in_words)))]
