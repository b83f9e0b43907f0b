"""`embedcam explain --text`: pictures that words find, and where each answers them."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, show, show_json
from ..explain.texts import check_text, embed_words
from ..images import MAX_PIXELS
from ..images.reading import why_missing
from ..index.arrays import read_array
from .networks import query_network
from .online import check_folder, explainer_of, plan_pictures
from .output import columns, counted, note
from .stores import store_of

if TYPE_CHECKING:
    from ..explain import Explainer
    from ..explain.text_explanation import TextExplanation
    from ..pairs import PairExplainer, TextReceipt

_OF_PICTURES = (
    "html", "report", "features", "receipts", "batch_size", "result", "above", "neighbors",
    "exclude_query", "fallback", "trusted_from", "detail", "method", "fill", "option", "labels",
    "exclude",
)  # fmt: skip
"""Options that mean nothing where words ask."""


def asks_words(options: Namespace) -> bool:
    """Return whether words are the query; refuse options that go with words where they are not."""
    if options.text is not None or options.text_embedding:
        return True
    if options.above_text is not None:
        raise InputError("--above-text goes with --text; give both, or neither")
    return False


def explain_words(options: Namespace) -> None:
    """Explain words against an index, on the pictures that they find or on the one named."""
    from ..index import Index

    # Whatever can be refused is refused before the network is loaded.
    image = _refuse_others(options)
    check_folder("--images", options.images)
    texts, given = _texts(options), None
    if options.text_embedding is not None:
        given = read_array(options.text_embedding)
    pictures = plan_pictures(options.output, [_slug(text) for text in texts])
    with Index.open(options.index) as index, store_of(options, index) as store:
        network = query_network(options, index.manifest)
        pixels = options.max_pixels or MAX_PIXELS
        explainer = explainer_of(options, index, network, index, pixels)
        explainer.store = store
        given = _checked(options, explainer, texts, given)
        asked = {"texts": given, "above": options.above_text, "image": image}
        told = explainer.explain_text(texts, n_neighbors=options.n_neighbors, **asked)
        _tell(options, told, pictures)


def words_compared(options: Namespace) -> "Callable[[PairExplainer], TextReceipt]":
    """Return what compares a result with words; options of two pictures are refused."""
    for name in ("result", "above", "box", "not_centred"):
        if getattr(options, name):
            flag = "IMAGE" if name == "result" else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is of a picture as the query; leave it out, or --text")
    options.result, options.query = options.query, None
    text, *others = _texts(options)
    if others:
        raise InputError("a receipt is of one text; give --text once, and --above-text for another")
    given = None if options.text_embedding is None else read_array(options.text_embedding)

    def compare(pairs: "PairExplainer") -> "TextReceipt":
        tower, above = _checked(options, pairs.explainer, [text], given), options.above_text
        return pairs.text_receipt(text, options.result, texts=tower, above=above)

    return compare


def _refuse_others(options: Namespace) -> str | None:
    """Return the picture that words are asked of, if any; refuse options of pictures' queries."""
    for name in _OF_PICTURES:
        if getattr(options, name, None) and (name, options.detail) != ("detail", 1):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is of a picture as the query; leave it out, or --text")
    if len(options.queries) > 1:
        raise InputError("words are asked of one picture, or of those they find; name one at most")
    for image in options.queries:
        if options.n_neighbors is not None:
            raise InputError(
                f"-n is of a search, and {image} is asked alone; leave one of them out"
            )
        if not Path(image).is_file():
            raise InputError(f"{image}: {why_missing(image)}")
        return str(image)
    return None


def _texts(options: Namespace) -> list[str]:
    """Return the words; an embedding without any is called as its file."""
    if options.text is not None:
        for text in (*options.text, *filter(None, [options.above_text])):
            check_text(text)
        if len(set(options.text)) < len(options.text):
            raise InputError("--text says the same twice; give each once")
        return list(options.text)
    return [Path(options.text_embedding).stem]


def _checked(
    options: Namespace, explainer: "Explainer", texts: Sequence[str], given: np.ndarray | None
) -> np.ndarray | None:
    """Return the embeddings of the file that was given; what is wrong names the file."""
    if given is None:
        return None
    every = [*texts, *filter(None, [options.above_text])]
    try:
        return embed_words(explainer.snapshot, every, given)
    except InputError as error:
        raise InputError(f"{options.text_embedding}: {error}") from error


def _slug(text: str) -> str:
    """Return a name for a file, of the letters that a text begins with."""
    return re.sub(r"\W+", "-", text)[:60].strip("-") or "text"


def _tell(
    options: Namespace, told: "Sequence[TextExplanation]", pictures: Sequence[Path | None]
) -> None:
    """Print and draw explanations, and what holds for all of them in the end."""
    records, lost = [], dict[str, None]()
    for one, picture in zip(told, pictures, strict=True):
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            one.save(picture, scale=options.scale)
            lost.update(dict.fromkeys(one.not_found()))
        if options.json:
            records.append({**one.to_dict(), **({"picture": str(picture)} if picture else {})})
        else:
            show(*_lines(one.words if picture is None else f"{one.words} -> {picture}", one))
    if options.json:
        show_json(records)
    elif options.output is None:
        note(options, "note: no picture was written; -o where.png draws one")
    if why := told[0].why_not_centred:
        note(options, f"note: {why}")
    if lost:
        found = f"{counted(len(lost), 'picture')} of the results could not be read"
        note(options, f"note: {found}; --images FOLDER says where they are")


def _lines(head: str, told: "TextExplanation") -> list[str]:
    """Return the words, and below them a table of the pictures."""
    above = "" if told.above is None else "above"
    rows = [["", "similarity", above, "result", "label" if any(told.labels) else "", ""]]
    for place, one in enumerate(told.results, 1):
        rival = "" if one.rival_similarity is None else f"{one.rival_similarity:.3f}"
        remark = "" if np.any(one.cam) else "no map" if one.cam is None else "nothing answers"
        remark = f'answers "{told.above}" better' if one.rather_rival else remark
        name = one.id or "the picture"
        rows.append([str(place), f"{one.similarity:.3f}", rival, name, one.label or "", remark])
    return [head, *(f"  {line}" for line in columns(rows, right=(0, 1, 2)))]
