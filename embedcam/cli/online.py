"""Commands that ask an index about pictures: explain, with or without a report, and compare."""

import errno
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import write_whole
from ..errors import ImageError, InputError, printable, show, show_json
from ..images import MAX_PIXELS, ImageSource, Item
from ..images.reading import why_missing
from ..ops import attended
from ..recipe import Recipe
from ..recipe.registry import LayersMethod, Method, find_method
from .networks import check_onnx, query_network
from .output import columns, counted, images_of, listing_ids, note, some_of

if TYPE_CHECKING:
    from ..explain import Explainer, Explanation
    from ..images.sources import Labels
    from ..index import Index


def explain(options: Namespace) -> None:
    """Explain query images against an index."""
    from ..explain.explainer import Explainer
    from ..index import Index

    # Whatever can be refused is refused before the network is loaded.
    queries = _report_queries(options)
    options.resumes = queries is not None
    if queries is None:
        _check_queries(options.queries)
    pictures = _plan_pictures(options.output, options.queries)
    _check_page(options.html, options.queries)
    check_images(options.images)
    method = _method(options)
    check_onnx(options)
    with Index.open(options.index) as index:
        asked = _asked(options, index)
        _note_shared(options, index)
        network = query_network(options, index.manifest)
        explainer = Explainer(
            index,
            network,
            transfer=options.transfer,
            images=options.images,
            max_pixels=options.max_pixels or MAX_PIXELS,
            detail=options.detail,
            **trust_options(options, index, network),
        )
        if queries is not None:
            return _write_report(options, explainer, queries, asked)
        explanations = (explainer.explain(query, **asked) for query in options.queries)
        if method is not None:
            pairs = zip(explanations, options.queries, strict=True)
            explanations = (_by_method(options, index, network, method, *pair) for pair in pairs)
        _tell(options, explanations, pictures)


def _tell(
    options: Namespace, explanations: "Iterator[Explanation]", pictures: Sequence[Path | None]
) -> None:
    """Print and draw explanations as each is made, and what holds for all of them in the end."""
    from ..explain.explanation import small_size
    from ..render import Row, page

    records, rows = [], []
    # Sets that keep the order.
    results, lost, changed = dict[str, None](), dict[str, None](), dict[str, None]()
    for query, picture, explanation in zip(options.queries, pictures, explanations, strict=True):
        _note_doubts(options, query, explanation)
        rivals = [] if explanation.rival is None else [explanation.rival.id]
        results.update(dict.fromkeys(explanation.ids + explanation.explained + rivals))
        lost.update(dict.fromkeys(explanation.not_found()))
        changed.update(dict.fromkeys(explanation.changed()))
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            explanation.save(picture, scale=options.scale, title=Path(query).name)
        if options.html:
            tile, tiles = explanation.tiles()
            rows.append(Row(tile, tiles, title=Path(query).name))
        if options.json:
            saved = {} if picture is None else {"picture": str(picture)}
            # A small map can be drawn large again; fifty thousand numbers fill the terminal.
            small = small_size(explanation.cam.shape)
            record = explanation.to_dict(small, features=options.features)
            records.append({"query": query, **saved, **record})
        else:
            show(*_lines(query, picture, explanation))
    if options.html:
        text = page(rows, title="Why did these come back?", scale=options.scale)
        write_whole(options.html, text)
        note(options, f"page: {options.html}")
    if options.json:
        show_json(records)
    draws = options.output is not None or options.html is not None
    if not draws and not options.json:
        note(options, "note: no picture was written; -o why.png draws one")
    if draws and lost:
        note(
            options,
            f"note: {len(lost):,} of {counted(len(results), 'indexed picture')} were not found "
            f"under {explanation.root}; --images FOLDER says where they are",
        )
    if changed:
        advice = f"`embedcam add --update {options.index} IMAGES` takes the new ones in"
        if explanation.prototypes:
            advice = "update the index that they were compressed from, and compress that again"
        note(
            options,
            f"note: {counted(len(changed), 'indexed picture')} changed since the build "
            f"({some_of(list(changed))}): the stored maps are of the old files; {advice}",
        )


def _note_doubts(options: Namespace, query: str, explanation: "Explanation") -> None:
    """Say what is not trusted, what was done about it, and why a map is empty."""
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
    if explanation.empty:
        more = "more neighbours (-n) or an index built with --norm around may say more"
        if explanation.rival is not None:
            more = "name another image with --above, or leave it out"
        note(options, f"note: {query}: {explanation.why_empty}, so its map is empty; {more}")


def _note_shared(options: Namespace, index: "Index") -> None:
    """Say that by a target of labels a result is hardly explained apart from its label."""
    from ..explain.snapshot import shared_of

    shared = shared_of(index.manifest) if options.method is None else None
    if options.result is None or not shared:
        return
    ids = [name for name in (options.result, options.above) if name is not None]
    labels = index.select(index.positions(ids)).labels
    query = options.queries[0] if len(options.queries) == 1 else "QUERY"
    if None in labels or len(set(labels)) < len(labels):
        return  # Where both are of one label, the note on the empty map says so.
    speaks_for = " rather than ".join(map(str, labels))
    compared, what = options.result, "matches this one image"
    if options.above is not None:
        compared, what = f"{compared} --above {options.above}", "puts the one above the other"
    note(
        options,
        f"note: by this index's target the images of a label share {shared}: what speaks for "
        f"{speaks_for}; `embedcam compare {options.index} {query} {compared}` "
        f"says what {what}",
    )


def _asked(options: Namespace, index: "Index") -> dict[str, Any]:
    """Return what `Explainer.explain` is asked for, ids checked."""
    if options.neighbors and options.n_neighbors:
        raise InputError("--neighbors names the results and -n searches for them; give one")
    if options.above is not None and options.result is None:
        raise InputError(
            f"--above {options.above} is a rival, and no result was named; give --result, the "
            "image that is to be told from it"
        )
    _check_above(options)
    if options.above is not None and options.fallback:
        raise InputError(
            "--fallback computes maps of low trust, and a map with a rival has no trust; leave out "
            "--fallback, or give --method gradcam, which computes them all"
        )
    names = ("n_neighbors", "result", "above", "exclude_query")
    asked = {name: getattr(options, name) for name in names}
    with listing_ids(options.index):
        index.positions([name for name in (options.result, options.above) if name is not None])
        if options.neighbors:
            asked["neighbors"] = list(_ids(index, options.neighbors))
            index.positions(asked["neighbors"])
    return asked


def _ids(index: "Index", words: Sequence[str]) -> Iterator[str]:
    """Yield ids separated by commas; an id that holds one itself is recognised as a whole."""
    for text in words:
        if text in index.find_live([text]):
            yield text
        else:
            yield from (name for name in text.split(",") if name)


def _check_above(options: Namespace) -> None:
    if options.above is not None and options.result == options.above:
        raise InputError(f"--above {options.above} is the result itself; name another image")


def _method(options: Namespace) -> Method | None:
    """Return the method that was asked for, refused before a network is loaded."""
    if options.method is None:
        if options.fill is not None or options.option:
            raise InputError("--fill and --option are a method's; name it with --method")
        return None
    method = find_method(options.method)
    if options.fill is not None and not method.filled:
        raise InputError(f"{method.title} fills nothing in; leave out --fill")
    if method.trained:
        raise InputError(
            f"{method.title} draws with a branch that is trained with the network; call "
            "embedcam.cam_for with a network that has one (embedcam.methods.learned)"
        )
    return method


def trust_options(options: Namespace, index: "Index", network: Any) -> dict[str, Any]:
    """Return what `Explainer` is told of trust; an index without a calibration has none."""
    asked = options.fallback or options.trusted_from is not None
    if asked and index.manifest.trust_calibration is None:
        raise InputError(
            f"{index.path} holds no calibration of trust (built without one, from features, of "
            "fewer than 40 images, or of prototypes), so no transfer is found wanting; leave out "
            f"--fallback and --trusted-from, or run embedcam calibrate {index.path}"
        )
    threshold = options.trusted_from
    trust: dict[str, Any] = {} if threshold is None else {"trusted_from": threshold}
    if options.fallback:
        from ..methods import DirectWeights

        trust["fallback"] = DirectWeights(network, Recipe.of_index(index.manifest))
    return trust


def _by_method(
    options: Namespace,
    index: "Index",
    network: Any,
    method: Method,
    explanation: "Explanation",
    query: str,
) -> "Explanation":
    """Return an explanation with its query's map made by a method, from the query's own passes.

    The target is the cosine similarity to the result it is explained by (of several, to their
    mean); with a rival, how much farther that is.
    """
    from ..methods import cam_for
    from ..targets import ClassProxy, Similarity, Target, TripletMargin

    vectors = np.asarray(index.embeddings(index.positions(explanation.explained)))
    target: Target = Similarity(vectors[0] if len(vectors) == 1 else ClassProxy(vectors).proxy)
    if explanation.rival is not None:
        rival = index.embeddings(index.positions([explanation.rival.id]))
        target = TripletMargin(vectors, np.asarray(rival))
    more = dict(options.option or ()) | ({"fill": options.fill} if options.fill else {})
    if isinstance(method, LayersMethod):
        more["layers"] = index.manifest.layer_names
        if len(more["layers"]) < 2:
            raise InputError(
                f"{method.title} draws with several layers and this index has one; call "
                "embedcam.cam_for(..., layers=[...])"
            )
    direct = cam_for(
        network,
        query,
        target,
        method.name,
        progress=False if options.quiet else None,
        max_pixels=explanation.max_pixels,
        **more,
    )
    inputs = network.preprocess(explanation.image)[None]
    activations = network.forward(inputs).activations[0].cpu().numpy()
    return replace(
        explanation,
        cam=np.maximum(direct.cam, 0),
        signed_cam=direct.cam,
        weights=np.zeros_like(explanation.weights) if direct.weights is None else direct.weights,
        features=attended(activations, np.maximum(direct.grid_cam, 0)),
        layer_weights=direct.layer_weights,
        method=method.title,
        trust=None,
        trust_low=None,
        direct=False,
    )


def check_images(folder: str | None) -> None:
    """Refuse a folder of the indexed images that is none."""
    if folder is not None and not Path(folder).is_dir():
        raise InputError(
            f"--images {folder}: there is no such folder; give the one the indexed images lie in"
        )


def check_folder(file: Path) -> None:
    """Refuse a file in a folder that is not there."""
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}; make it first")


def _check_there(query: str) -> None:
    if not Path(query).exists():
        raise ImageError(f"{query}: {why_missing(query)}")


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
        _check_there(query)


def _pattern_in(folder: Path) -> str | None:
    """Return what a shell would find some of a folder's pictures by: queries/*.jpg."""
    from ..images import EXTENSIONS

    for depth in ("*", "*/*"):
        for file in sorted(islice(folder.glob(depth), 1000)):
            if file.suffix.lower() in EXTENSIONS:
                return str(folder / f"{depth}{file.suffix}")
    return None


def _plan_pictures(output: str | None, queries: Sequence[str]) -> list[Path | None]:
    """Return where each query's picture goes: the file named, or one a query in a folder."""
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
        # Not made before there are pictures: what fails leaves nothing behind.
        there = next(one for one in (where, *where.absolute().parents) if one.exists())
        number = 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
        if number := number if there.is_dir() else errno.EEXIST:
            error = OSError(number, os.strerror(number))
            raise InputError(f"-o {output}: not a folder ({error.strerror})") from error
    else:
        check_picture_name(where)
        check_folder(where)
    planned = [where / name for name in picture_names(queries)] if folder else [where]
    for picture in planned:
        _refuse_query(picture, queries)
    return list(planned)


def picture_names(queries: Sequence[str]) -> list[str]:
    """Return a file name for each query's picture, all different: 1.png; a-1.png beside b-1.png."""
    stems = Counter(Path(query).stem for query in queries)
    unique: dict[str, str] = {}
    for path in map(Path, queries):
        alone = stems[path.stem] == 1 or not path.parent.name
        name = stem = path.stem if alone else f"{path.parent.name}-{path.stem}"
        number = 1
        while name.casefold() in unique:
            number += 1
            name = f"{stem}-{number}"
        unique[name.casefold()] = f"{name}.png"
    return list(unique.values())


def _check_page(page: str | None, queries: Sequence[str]) -> None:
    if page is None:
        return
    if Path(page).is_dir():
        raise InputError(f"--html {page} is a folder; give a file, such as {Path(page)}/why.html")
    check_folder(Path(page))
    _refuse_query(Path(page), queries)


def _refuse_query(file: Path, queries: Sequence[str]) -> None:
    if file.exists() and any(file.samefile(query) for query in queries if Path(query).exists()):
        raise InputError(f"{file} is a query itself and would be replaced; write somewhere else")


def _lines(query: str, picture: Path | None, explanation: "Explanation") -> list[str]:
    """Return the query, and below it a table of its results."""
    from ..render import CHANGED

    labels = [label or "" for label in explanation.labels]
    remarks = dict.fromkeys(explanation.changed(), CHANGED)
    named = [("rival", explanation.rival), ("asked", explanation.asked)]
    extra = list[tuple[object, float, str, str]]()
    for word, one in named:
        if one is not None and one.id in explanation.ids:
            remarks[one.id] = ", ".join(filter(None, (word, remarks.get(one.id))))
        elif one is not None:
            extra.insert(0, (word, one.distance, one.id, one.label or ""))
    places = zip(count(1), explanation.distances, explanation.ids, labels, strict=False)
    # Three places, so that a column can be compared; a tiny distance by its first digits.
    table = [
        [str(word), f"{away:.3f}" if away == 0 or away >= 1e-3 else f"{away:.3g}", name, label,
         remarks.get(name, "")]
        for word, away, name, label in [*extra, *places]
    ]  # fmt: skip
    header = ["", "distance", "result", "label" if any(row[3] for row in table) else "", ""]
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


def _report_queries(options: Namespace) -> ImageSource | None:
    """Return the queries of a report, what makes no sense refused; None where none is asked for."""
    if options.report is None:
        if options.batch_size is not None:
            raise InputError("--batch-size is of a report; give --report FOLDER, or leave it out")
        for name in ("exclude", "labels"):
            if getattr(options, name):
                raise InputError(f"--{name} is of a report's folder; give --report FOLDER too")
        if options.features and not options.json:
            raise InputError("--features goes with --json or --report FOLDER; give one of them")
        return None
    from ..report import check_folder as check_report_folder

    for name, value in (("-o", options.output), ("--html", options.html), ("--json", options.json)):
        if value:
            raise InputError(
                "--report writes index.html and explanations.jsonl into its folder; leave out "
                f"{name}"
            )
    if options.method is not None:
        raise InputError(
            f"a report's maps are the index's; leave out --method {options.method}, or explain the "
            "queries with --html"
        )
    check_report_folder(options.report)
    first = Path(options.queries[0])
    if len(options.queries) == 1 and (first.is_dir() or first.suffix.lower() == ".csv"):
        # The folders of queries are rarely their labels; a column named so is.
        usual: Labels = "none" if first.is_dir() else "auto"
        return images_of(options, first, options.labels or usual)
    for name in ("exclude", "labels"):
        if getattr(options, name):
            raise InputError(f"--{name} goes with one folder or CSV; leave it out, or the pictures")
    for query in options.queries:
        if Path(query).is_dir():
            raise InputError(f"{query}: is a folder; give one folder, one CSV or pictures")
        _check_there(query)
    items = [Item(query, query) for query in options.queries]
    return ImageSource(items, max_pixels=options.max_pixels or MAX_PIXELS)


def _write_report(
    options: Namespace, explainer: "Explainer", queries: ImageSource, asked: dict[str, Any]
) -> None:
    from ..report import write_report

    if options.batch_size is not None:
        asked["batch_size"] = options.batch_size
    report = write_report(
        explainer,
        queries,
        options.report,
        scale=options.scale,
        features=options.features,
        progress=False if options.quiet else None,
        **asked,
    )
    for name, reason in report.unreadable:
        note(options, f"note: {reason if printable(name) in reason else f'{name}: {reason}'}")
    for number, what in (
        (report.n_untrusted, "with a map that is not to be trusted (--fallback computes one)"),
        (report.n_empty, "with an empty map"),
        (report.n_changed, "with a result whose picture changed since the build"),
    ):
        if number:
            note(options, f"note: {_queries_of(number)} {what}")
    if report.n_new == 0:
        show(f"{report.path}: all {_queries_of(report.n_queries)} explained before; nothing to do")
        return
    before = report.n_queries - report.n_new
    resumed = f", {before:,} of them before" if before else ""
    show(f"{report.path}: {_queries_of(report.n_queries)}{resumed}")


def _queries_of(number: int) -> str:
    return f"{number:,} quer{'y' if number == 1 else 'ies'}"


def compare(options: Namespace) -> None:
    """Tell why a query and a result match, or why the result came above a rival."""
    from ..explain.explainer import Explainer
    from ..index import Index
    from ..pairs import Comparison, PairExplainer, Receipt

    # Whatever can be refused is refused before the network is loaded.
    check_onnx(options)
    (picture,) = _plan_pictures(options.output, [options.query])
    check_images(options.images)
    _check_there(options.query)
    ids = [name for name in (options.result, options.above) if name is not None]
    with Index.open(options.index) as index:
        with listing_ids(options.index):
            index.positions(ids)
        _check_above(options)
        network = query_network(options, index.manifest)
        pixels = options.max_pixels or MAX_PIXELS
        explainer = Explainer(index, network, images=options.images, max_pixels=pixels)
        pairs, centred = PairExplainer(explainer), not options.not_centred
        head = f"{options.query} and {options.result}"
        pair: Receipt | Comparison
        if options.above is None:
            pair = pairs.receipt(options.query, options.result, centred=centred)
            total = ["similarity", f"{pair.similarity:+.3f}"]
        else:
            pair = pairs.above(options.query, options.result, options.above, centred=centred)
            head += f", above {options.above}"
            total = ["more similar by", f"{pair.score:+.3f}"]
        if index.manifest.is_compressed:
            note(
                options,
                "note: a prototype is the mean of several images; what is compared is the picture "
                "in its middle",
            )
        if changed := [name for name in ids if explainer.file_state(name) == "changed"]:
            note(
                options,
                f"note: changed since the build: {', '.join(changed)}; what is compared is the "
                "picture as it is now, which embeds as the old one did",
            )
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            pair.save(picture, lines=options.lines)
    if options.json:
        saved = {} if picture is None else {"picture": str(picture)}
        show_json({"query": options.query, **saved, "pair": pair.to_dict(options.lines)})
        return
    rows = [[words, f"{number:+.3f}"] for words, number in pair.amounts(options.lines)]
    show(head, *(f"  {line}" for line in columns([*rows, total], right=(1,))))
    if picture is not None:
        note(options, f"picture: {picture}")
