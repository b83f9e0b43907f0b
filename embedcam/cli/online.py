"""Commands that ask an index about pictures: explain, with or without a report, and compare."""

import errno
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._files import write_whole
from .._options import Values
from ..errors import ImageError, InputError, printable, show, show_json
from ..images import MAX_PIXELS, ImageSource, Item, is_collection, is_url
from ..images.reading import why_missing
from ..index.search import check_rival
from ..ops import attended
from ..recipe import Recipe
from ..recipe.registry import LayersMethod, Method, find_method
from .networks import query_network
from .output import columns, counted, images_of, note, say_run, some_of
from .stores import store_of, take_model

if TYPE_CHECKING:
    from ..explain import Explainer, Explanation
    from ..index import Index
    from ..network import EmbeddingNetwork
    from ..onnx import OnnxNetwork
    from ..stores import Store


def explain(options: Namespace) -> None:
    """Explain query images against an index."""
    from ..index import Index

    # Whatever can be refused is refused before the network is loaded.
    take_model(options)
    from .words import asks_words, explain_words

    if asks_words(options):
        return explain_words(options)
    queries = _report_queries(options)
    if queries is None:
        for query in options.queries:
            _check_query(query)
    pictures = plan_pictures(options.output, options.queries)
    if options.html is not None:
        check_file(options.html, *options.queries)
    check_folder("--images", options.images)
    method = _method(options)
    with Index.open(options.index) as index, store_of(options, index) as store:
        named = _named(options, index, store)
        asked = _asked(options, named)
        _note_shared(options, named)
        network = query_network(options, index.manifest)
        pixels = options.max_pixels or MAX_PIXELS
        explainer = explainer_of(options, index, network, index, pixels)
        explainer.store = store
        if queries is not None:
            return _write_report(options, explainer, queries, asked)
        explanations = (explainer.explain(query, **asked) for query in options.queries)
        if method is not None:
            pairs = zip(explanations, options.queries, strict=True)
            explanations = (_by_method(options, explainer, method, *pair) for pair in pairs)
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
        results.update(dict.fromkeys(one.id for one in explanation.results()))
        lost.update(dict.fromkeys(explanation.not_found()))
        changed.update(dict.fromkeys(explanation.changed()))
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            explanation.save(picture, scale=options.scale, title=Path(query).name)
        if options.html:
            rows.append(Row(*explanation.tiles(), title=Path(query).name))
        if options.json:
            # A small map can be drawn large again; fifty thousand numbers fill the terminal.
            small = small_size(explanation.cam.shape)
            saved = {} if picture is None else {"picture": str(picture)}
            record = explanation.to_dict(small, features=options.features)
            records.append({"query": query, **saved, **record})
        else:
            show(*_lines(query if picture is None else f"{query} -> {picture}", explanation))
    draws = options.output is not None or options.html is not None
    if options.html:
        text = page(rows, title="Why did these come back?", scale=options.scale)
        write_whole(options.html, text)
        note(options, f"page: {options.html}")
    if options.json:
        show_json(records)
    elif not draws:
        note(options, "note: no picture was written; -o why.png draws one")
    if draws and lost:
        found = f"{len(lost):,} of {counted(len(results), 'indexed picture')} were not found"
        advice = "--images FOLDER says where they are"
        if is_url(str(explanation.root)):
            found = f"{len(lost):,} of {counted(len(results), 'indexed picture')} were not shown"
            advice = f"addresses are read below one that you name: --images {explanation.root}"
        note(options, f"note: {found} under {explanation.root}; {advice}")
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
    named = explanation.asked is not None
    whose = f"the {'result you named' if named else 'neighbours that came back'}, right or wrong"
    low = f"correlates below {explanation.trust_low or 0:.2f} with"
    if explanation.trusted is False:
        note(
            options,
            f"note: {query}: its map is not to be trusted: one in ten such maps {low} one "
            f"computed on the query; --fallback computes that one, which answers for {whose}",
        )
    if explanation.direct:
        note(
            options,
            f"note: {query}: computed on the query itself, for one in ten transferred maps {low} "
            f"that; it answers for {whose}",
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
    compared, what = options.result, "matches this one image"
    if options.above is not None:
        compared, what = f"{compared} --above {options.above}", "puts the one above the other"
    ids = [name for name in (options.result, options.above) if name is not None]
    labels = [str(one) for one in index.select(index.positions(ids)).labels if one is not None]
    if len(set(labels)) < len(ids):
        return  # Where both are of one label, the note on the empty map says so.
    query = options.queries[0] if len(options.queries) == 1 else "QUERY"
    if options.store is not None:
        compared += f" --store {options.store}"
    note(
        options,
        f"note: by this index's target the images of a label share {shared}: what speaks for "
        f"{' rather than '.join(labels)}; `embedcam compare {options.index} {query} {compared}` "
        f"says what {what}",
    )


def _named(options: Namespace, index: "Index", store: "Store | None") -> "Index":
    """Return an index that holds the images named: of a model, their rows of its store."""
    from ..explain import Explainer

    words = [name for name in (options.result, options.above) if name is not None]
    for text in options.neighbors or ():
        words += [text, *text.split(",")]
    if store is None or not words:
        return index
    explainer = Explainer.from_model(options.index, store=store)
    return explainer.of_ids(list(dict.fromkeys(filter(None, words)))).index


def _asked(options: Namespace, index: "Index") -> Values:
    """Return what is asked of every query, ids checked."""
    check_rival(options.result, options.above)
    if options.above is not None and options.fallback:
        raise InputError(
            "--fallback computes maps of low trust, and a map with a rival has no trust; leave out "
            "--fallback, or give --method gradcam, which computes them all"
        )
    names = ("n_neighbors", "result", "above", "exclude_query")
    asked = {name: getattr(options, name) for name in names}
    index.positions([name for name in (options.result, options.above) if name is not None])
    if options.neighbors:
        asked["neighbors"] = list(_ids(index, options.neighbors))
        index.positions(asked["neighbors"])
    return asked


def _ids(index: "Index", words: Sequence[str]) -> Iterator[str]:
    """Yield ids separated by commas; an id that holds one itself is recognised as a whole."""
    for text in words:
        whole = index.find_live([text])
        yield from whole or filter(None, text.split(","))


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


def explainer_of(
    options: Namespace,
    index: "Index",
    network: "EmbeddingNetwork | OnnxNetwork",
    place: "Index | str",
    max_pixels: int,
) -> "Explainer":
    """Return what explains by the index, open or to be opened at `place`, as the options say."""
    from ..explain.explainer import TRUSTED_FROM, Explainer

    asked = options.fallback or options.trusted_from is not None
    if asked and index.manifest.trust_calibration is None:
        raise InputError(
            f"{index.path} holds no calibration of trust (built without one, from features, of "
            "fewer than 40 images, or of prototypes), so no transfer is found wanting; leave out "
            f"--fallback and --trusted-from, or run embedcam calibrate {index.path}"
        )
    fallback = None
    if options.fallback:
        from ..methods import DirectWeights

        fallback = DirectWeights(network, Recipe.of_index(index.manifest))  # type: ignore[arg-type]
    return Explainer(
        place,
        network,
        n_neighbors=options.n_neighbors or 5,
        transfer=options.transfer,
        trusted_from=TRUSTED_FROM if options.trusted_from is None else options.trusted_from,
        fallback=fallback,
        images=options.images,
        max_pixels=max_pixels,
        detail=options.detail,
    )


def _by_method(
    options: Namespace,
    explainer: "Explainer",
    method: Method,
    explanation: "Explanation",
    query: str,
) -> "Explanation":
    """Return an explanation with its query's map made by a method, from the query's own passes.

    The target is the cosine similarity to the result it is explained by (of several, to their
    mean); with a rival, how much farther that is.
    """
    from ..methods import cam_for
    from ..network import EmbeddingNetwork
    from ..targets import ClassProxy, Similarity, Target, TripletMargin

    rival = [] if explanation.rival is None else [explanation.rival.id]
    index = explainer.of_ids([*explanation.explained, *rival]).index
    network = explainer.network
    assert isinstance(network, EmbeddingNetwork)  # beside an ONNX file a method is refused
    vectors = np.asarray(index.embeddings(index.positions(explanation.explained)))
    target: Target = Similarity(vectors[0] if len(vectors) == 1 else ClassProxy(vectors).proxy)
    if rival:
        others = index.embeddings(index.positions(rival))
        target = TripletMargin(vectors, np.asarray(others))
    more = dict(options.option or ()) | ({"fill": options.fill} if options.fill else {})
    if isinstance(method, LayersMethod):
        more["layers"] = index.manifest.layer_names
        if len(more["layers"]) < 2:
            raise InputError(
                f"{method.title} draws with several layers and this index has one; call "
                "embedcam.cam_for(..., layers=[...])"
            )
    progress, limit = options.progress, explanation.max_pixels
    direct = cam_for(
        network, query, target, method.name, progress=progress, max_pixels=limit, **more
    )
    _, inputs = explainer.prepared(explanation.image or query)
    activations = network.embed(inputs[None]).activations[0][0]
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


def check_folder(option: str, folder: str | None) -> None:
    """Refuse a folder of images that is none."""
    if folder is not None and not is_url(folder) and not Path(folder).is_dir():
        raise InputError(
            f"{option} {folder}: there is no such folder; give the one the indexed images lie in"
        )


def check_file(file: str | Path, *read: str | None) -> None:
    """Refuse to write where nothing can be, or over what is `read`."""
    file = Path(file)
    if file.is_dir():
        raise InputError(f"{file} is a folder; give the name of a file in it")
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}; make it first")
    for other in filter(None, read):
        if file.exists() and Path(other).exists() and file.samefile(other):
            raise InputError(f"{file} is read, and would be replaced; write somewhere else")


def _check_query(query: str, many: bool = False) -> None:
    """Refuse a query that is not there, and a folder: one of many queries, or of pictures."""
    if Path(query).is_dir() and many:
        raise InputError(f"{query}: is a folder; give one folder, one CSV or pictures")
    if Path(query).is_dir():
        example = Path(query) / "*.jpg"
        raise ImageError(
            f"{query}: is a folder; name the pictures in it, as in {example}, or give "
            "--report FOLDER"
        )
    if not Path(query).exists():
        raise ImageError(f"{query}: {why_missing(query)}")


def plan_pictures(output: str | None, queries: Sequence[str]) -> Sequence[Path | None]:
    """Return where each query's picture goes: the file named, or one a query in a folder."""
    if output is None:
        return [None] * len(queries)
    from ..explain.drawing import check_picture_name

    where = Path(output)
    if not where.is_dir() and not output.endswith("/") and where.suffix:
        if len(queries) > 1:
            raise InputError(
                f"-o {output} is one file and there are {len(queries)} queries; give a folder, or "
                "--html FILE for one page with all of them"
            )
        check_picture_name(where)
        check_file(where, *queries)
        return [where]
    # Not made before there are pictures: what fails leaves nothing behind.
    there = next(one for one in (where, *where.absolute().parents) if one.exists())
    number = errno.EACCES if there.is_dir() else errno.EEXIST
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        error = OSError(number, os.strerror(number))
        raise InputError(f"-o {output}: not a folder ({error.strerror})") from error
    planned = [where / name for name in picture_names(queries)]
    for picture in planned if where.is_dir() else ():
        check_file(picture, *queries)
    return planned


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


def _lines(head: str, explanation: "Explanation") -> list[str]:
    """Return the query, and below it a table of its results."""
    from ..render import CHANGED

    changed, ids = explanation.changed(), explanation.ids
    named = {one.id: "rival" for one in [explanation.rival] if one is not None}
    named |= {one.id: "asked" for one in [explanation.asked] if one is not None}
    far = [(named.pop(one.id), one) for one in explanation.results() if one.id not in ids]
    near = [(str(place), one) for place, one in enumerate(explanation.neighbors(), 1)]
    table = [["", "distance", "result", "label" if any(explanation.labels) else "", ""]]
    for place, one in [*far, *near]:
        # Three places, so that a column can be compared; a tiny distance by its first digits.
        away = f"{one.distance:{'.3f' if one.distance == 0 or one.distance >= 1e-3 else '.3g'}}"
        remarks = ", ".join(filter(None, (named.get(one.id), CHANGED * (one.id in changed))))
        table.append([place, away, one.id, one.label or "", remarks])
    if explanation.told_apart is not None:
        head += f" (what speaks for {' rather than '.join(explanation.told_apart)})"
    elif explanation.explained != ids:
        label = explanation.speaks_for
        what = f"matched {explanation.explained[0]}" if label is None else f"speaks for {label}"
        head += f" (what {what})"
    lines = [*columns(table, right=(0, 1)), explanation.match_in_words]
    # What casts doubt on all that follows is read first.
    lines = [*lines[-1:], *lines[:-1]] if explanation.doubtful else lines
    return [head, *(f"  {line}" for line in filter(None, (*lines, explanation.trust_in_words)))]


def _report_queries(options: Namespace) -> ImageSource | None:
    """Return the queries of a report, what makes no sense refused; None where none is asked for."""
    of_source = {"--exclude": options.exclude, "--labels": options.labels}
    if options.report is None:
        given_here = {"--batch-size": options.batch_size, "--receipts": options.receipts}
        for name, given in {**given_here, **of_source}.items():
            if given:
                raise InputError(f"{name} is of a report; give --report FOLDER, or leave it out")
        if options.features and not options.json:
            raise InputError("--features goes with --json or --report FOLDER; give one of them")
        return None
    from ..report import check_folder as check_report_folder

    apart = {"-o": options.output, "--html": options.html, "--json": options.json}
    for name, given in {**apart, f"--method {options.method}": options.method}.items():
        if given:
            raise InputError(
                "--report writes index.html and explanations.jsonl into its folder, with the "
                f"index's own maps; leave out {name}"
            )
    if options.store is not None:
        raise InputError(
            "--report tells of a whole index; give its folder in place of the model and --store"
        )
    check_report_folder(options.report)
    first = options.queries[0]
    if len(options.queries) == 1 and (is_collection(first) or first.lower().endswith(".csv")):
        # The folders of queries are rarely their labels; a column named so is.
        folders = os.path.isdir(first) or (is_url(first) and not first.lower().endswith(".csv"))
        return images_of(options, first, labels="none" if folders else "auto")
    for name, given in of_source.items():
        if given:
            raise InputError(f"{name} goes with one folder or CSV; leave it out, or the pictures")
    for query in options.queries:
        _check_query(query, many=True)
    items = [Item(query, query) for query in options.queries]
    return ImageSource(items, max_pixels=options.max_pixels or MAX_PIXELS)


def _write_report(
    options: Namespace, explainer: "Explainer", queries: ImageSource, asked: Values
) -> None:
    from ..report import write_report

    say_run(options, explainer.network, options.batch_size)
    report = write_report(
        explainer,
        queries,
        options.report,
        scale=options.scale,
        features=options.features,
        receipts=options.receipts,
        batch_size=options.batch_size,
        progress=options.progress,
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
            note(options, f"note: {counted(number, 'query')} {what}")
    told, before = counted(report.n_queries, "query"), report.n_queries - report.n_new
    if not report.n_new:
        told = f"all {told} explained before; nothing to do"
    elif before:
        told += f", {before:,} of them before"
    show(f"{report.path}: {told}")


def _note_pictures(
    options: Namespace, index: "Index", explainer: "Explainer", ids: Sequence[str]
) -> None:
    """Say of which pictures a receipt is, where that could be mistaken."""
    if index.manifest.is_compressed:
        what = "the mean of several images; what is compared is the picture in its middle"
        note(options, f"note: a prototype is {what}")
    if changed := [name for name in ids if explainer.file_state(name) == "changed"]:
        note(
            options,
            f"note: changed since the build: {', '.join(changed)}; what is compared is the "
            "picture as it is now, which embeds as the old one did",
        )


def compare(options: Namespace) -> None:
    """Tell why a query and a result match, or why the result came above a rival."""
    from ..explain.explainer import Explainer
    from ..index import Index
    from ..pairs import PairExplainer
    from ..pairs.receipt import Total
    from .words import asks_words, words_compared

    # Whatever can be refused is refused before the network is loaded.
    words = words_compared(options) if asks_words(options) else None
    (picture,) = plan_pictures(options.output, [options.query or "receipt"])
    check_folder("--images", options.images)
    if options.result is None:
        raise InputError("no result was named; give the id of an image of the index, too")
    if words is None:
        _check_query(options.query)
    check_rival(options.result, options.above)
    if options.box is not None and options.above is not None:
        raise InputError("--box asks what a part matches in one result; leave out it or --above")
    ids = [name for name in (options.result, options.above) if name is not None]
    options.model = None
    take_model(options)
    with Index.open(options.index) as index, store_of(options, index) as store:
        if store is None:
            index.positions(ids)
        network = query_network(options, index.manifest)
        pixels = options.max_pixels or MAX_PIXELS
        explainer = Explainer(index, network, images=options.images, max_pixels=pixels)
        explainer.store = store
        pairs = PairExplainer(explainer, concept_names=options.concept_names)
        explainer = explainer.of_ids(ids)
        centred = not options.not_centred
        head = f"{options.query} and {options.result}"
        pair: Total
        if words is not None:
            pair = receipt = words(pairs)
            head = f"{receipt.words} and {options.result}"
        elif options.above is None:
            pair = pairs.receipt(options.query, options.result, centred=centred, box=options.box)
        else:
            pair = pairs.above(options.query, options.result, options.above, centred=centred)
            head += f", above {options.above}"
        _note_pictures(options, index, explainer, ids)
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            pair.save(picture, lines=options.lines)
    if options.json:
        saved = {} if picture is None else {"picture": str(picture)}
        show_json({"query": options.query, **saved, "pair": pair.to_dict(options.lines)})
        return
    amounts, said = [*pair.amounts(options.lines), pair.total], pair.in_words()
    rows = [[name, f"{number:+.3f}"] for name, number in amounts]
    lines = [*said, *[""] * bool(said), *columns(rows, right=(1,))]
    show(head, *(f"  {line}".rstrip() for line in lines))
    if picture is not None:
        note(options, f"picture: {picture}")
