"""Words as queries: their embeddings, the pictures near to them, and where each answers.

With t the embedding of a text, f a picture's, m and m' the means of pictures and of texts, a
picture's positions are asked what they give to

    (f - m) . (t - m')

where m' takes out what any text would find in any picture, and m what any picture would answer.
Two texts are told apart by t - t', of which no mean is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .._checks import as_array, check_vectors, is_usable
from ..errors import ImageError, InputError, NetworkError, short
from ..index import Index, Neighbors
from ..index.in_memory import Rows, listed
from ..index.search import find_neighbors
from .answer import picture_paths
from .queries import prepare
from .side_maker import SideMaker, SlopeSide
from .sides import Side
from .text_explanation import TextExplanation, TextResult

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from .explainer import Explainer
    from .queries import Inputs, QueryLike
    from .snapshot import Snapshot

MOST_LETTERS = 10_000
Texts = Callable[[Sequence[str]], "np.ndarray | Tensor"] | ArrayLike
"""Texts -> their embeddings `[n D]`, or these themselves."""
Answers = Callable[[np.ndarray], np.ndarray]
"""A direction `[D]` -> what each position of a picture gives to f . direction, `[H W]`."""


class Words(NamedTuple):
    """A text with its embedding `[D]`, and those of the text it is held against."""

    text: str
    embedding: np.ndarray
    above: str | None = None
    rival: np.ndarray | None = None


class Direction(NamedTuple):
    """What maps follow: a direction `[D]`, what the average picture has of it, and its kind."""

    vector: np.ndarray
    average: float
    centred: bool


def explain_texts(
    explainer: Explainer,
    snapshot: Snapshot,
    texts: Sequence[str],
    tower: Texts | None,
    n_neighbors: int,
    above: str | None,
    image: QueryLike | None,
) -> list[TextExplanation]:
    """Search for texts, or take the picture given, and explain each: see `explain_text`."""
    asked = words_of(snapshot, texts, above, tower)
    if snapshot.network is None:
        raise InputError(
            "where pictures answer words is told from their activations, and this Explainer has no "
            "network; give it one: Explainer(index, network)"
        )
    maker = SideMaker(snapshot.network)
    if image is not None:
        picture, inputs = prepare(image, snapshot.preprocess, explainer.max_pixels)
        return explained_on(explainer, snapshot, maker, asked, inputs, picture)
    if explainer.store is not None and not snapshot.index.in_memory:
        held = [explainer.with_rows(nearest_rows(explainer, one, n_neighbors)) for one in asked]
        return [
            one.explain_text(words.text, texts=_given(words), above=above, n_neighbors=n_neighbors)
            for one, words in zip(held, asked, strict=True)
        ]
    embeddings = np.array([words.embedding for words in asked])
    found = find_neighbors(snapshot.index, embeddings, n_neighbors, None)
    rows = np.unique(np.concatenate([near.positions for near in found]))
    answers = answers_of(explainer, snapshot, maker, snapshot.index.ids[rows])
    exact = maker.head(snapshot.index) is not None
    return [
        explained(snapshot, words, near, answers, exact, explainer.max_pixels)
        for words, near in zip(asked, found, strict=True)
    ]


# Words


def embedded_words(explainer: Explainer, asked: Sequence[tuple[str, str | None]]) -> list[Words]:
    """Return several texts, each with what it is held against, embedded together."""
    every = dict.fromkeys(check_text(text) for pair in asked for text in pair if text is not None)
    embeddings = dict(zip(every, embed_words(explainer.snapshot, list(every), None), strict=True))
    return [
        Words(text, embeddings[text], above, None if above is None else embeddings[above])
        for text, above in asked
    ]


def words_of(
    snapshot: Snapshot, texts: Sequence[str], above: str | None, tower: Texts | None
) -> list[Words]:
    """Return texts with their embeddings, each held against `above` where there is one."""
    every = [check_text(one) for one in (*texts, *([] if above is None else [above]))]
    if above is not None and above in texts:
        raise InputError(f"above = {short(above)} is the text itself; hold it against another")
    embeddings = embed_words(snapshot, every, tower)
    rival = None if above is None else embeddings[-1]
    return [Words(*one, above, rival) for one in zip(texts, embeddings, strict=False)]


def check_text(text: str) -> str:
    """Return a text that can be embedded, or raise InputError."""
    if not isinstance(text, str):
        raise InputError(f"text = {short(text)}; give words, as in explain_text('a red car')")
    if not text.strip():
        raise InputError("the text is empty; give words, such as 'a red car'")
    if len(text) > MOST_LETTERS:
        raise InputError(f"the text has {len(text):,} letters; give {MOST_LETTERS:,} at most")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        said = "the text holds half a character (a lone surrogate); write it again"
        raise InputError(said) from None
    return text


def embed_words(snapshot: Snapshot, texts: Sequence[str], tower: Texts | None) -> np.ndarray:
    """Return embeddings `[n D]` float32 of texts, of length 1 where the index's are."""
    index = snapshot.index
    if tower is None:
        if snapshot.network is None:
            raise InputError(
                "words are embedded by a network's tower for texts, and this Explainer has no "
                "network; give texts=, a function of a list of texts, or their embeddings"
            )
        found = snapshot.network.embed_texts(texts)
    else:
        found = as_array(tower(list(texts))) if callable(tower) else np.asarray(tower)
    found = found[None] if found.ndim == 1 and len(texts) == 1 else found
    if found.shape != (len(texts), index.width) or found.dtype.kind not in "fiu":
        several = f"s of {len(texts)} texts are" if len(texts) > 1 else " of the text is"
        raise InputError(
            f"the embedding{several} {found.dtype} of shape {list(found.shape)}; this index holds "
            f"{index.width} numbers an image, so give [{len(texts)} {index.width}]"
            + " (above is the last)"
            * (len(texts) > 1)
        )
    if tower is not None:
        check_vectors(found, False)
    if index.normalized:
        lengths = np.linalg.norm(found.astype(np.float64), axis=1, keepdims=True)
        if not lengths.all():
            raise InputError("the embedding of a text is zero, which has no direction")
        found = found / lengths
    return found.astype(np.float32)


def direction_of(index: Index, words: Words) -> Direction:
    """Return what maps of the words follow."""
    kept, text = index.shared(), words.embedding.astype(np.float64)
    mean = np.zeros(index.width) if words.rival is None else words.rival.astype(np.float64)
    if words.rival is None and "text_mean" in kept:
        mean = kept["text_mean"].astype(np.float64)
    vector = text - mean
    average = float(vector @ kept["embedding_mean"]) if "embedding_mean" in kept else 0.0
    return Direction(vector, average, words.rival is not None or "text_mean" in kept)


def nearest_rows(explainer: Explainer, words: Words, n_neighbors: int) -> Rows:
    """Return the rows that an explainer's store finds near to words."""
    assert explainer.store is not None
    if not (rows := listed(explainer.store.search(words.embedding, n_neighbors))):
        raise InputError("the store returned no image; check that it holds this model's rows")
    return rows


def _given(words: Words) -> np.ndarray:
    return np.array([words.embedding] if words.rival is None else [words.embedding, words.rival])


# Pictures


def answers_of(
    explainer: Explainer, snapshot: Snapshot, maker: SideMaker, ids: Sequence[str]
) -> dict[str, Answers]:
    """Return of indexed images what their positions answer; those that cannot be read are not in.

    Of one head pass each, or of a forward pass of many together.
    """
    assert snapshot.network is not None
    inputs = {}
    for name in ids:
        try:
            inputs[name] = prepare(
                explainer.picture(name), snapshot.preprocess, explainer.max_pixels
            )[1]
        except ImageError:
            continue
    names, answers = list(inputs), dict[str, Answers]()
    step = snapshot.network.usual_run.batch_size
    for start in range(0, len(names), step):
        some = names[start : start + step]
        sides = maker.map_sides(snapshot.index, [inputs[name] for name in some])
        answers |= {name: partial(cells_of, one) for name, one in zip(some, sides, strict=True)}
    return answers


def cells_of(side: Side | SlopeSide, direction: np.ndarray) -> np.ndarray:
    """Return what each position of a picture gives to f . direction, `[H W]`."""
    return side.products(direction)[1]


def explained(
    snapshot: Snapshot,
    words: Words,
    near: Neighbors,
    answers: Mapping[str, Answers],
    exact: bool,
    max_pixels: int,
) -> TextExplanation:
    """Explain words by the images near to them, of which `answers` knows those that were read."""
    index, direction = snapshot.index, direction_of(snapshot.index, words)
    rows = index.select(near.positions)
    paths, marks = picture_paths(snapshot, rows.paths), rows.marks if snapshot.marked else None
    rivals: list[float | None] = [None] * len(paths)
    if words.rival is not None and index.has_embeddings:
        rivals = (rows.embeddings @ words.rival).tolist()
    results = [
        TextResult(
            name,
            label,
            path,
            float(near.distances[place]),
            float(near.similarities[place]),
            rivals[place],
            _cam(answers[name], direction) if name in answers else None,
            None if marks is None else marks[place],
        )
        for place, (name, label, path) in enumerate(zip(rows.ids, rows.labels, paths, strict=True))
    ]
    return _explanation(snapshot, words, direction, results, exact, max_pixels)


def explained_on(
    explainer: Explainer,
    snapshot: Snapshot,
    maker: SideMaker,
    asked: Sequence[Words],
    inputs: Inputs,
    picture: Image | None,
) -> list[TextExplanation]:
    """Explain words by one picture, the network's input `[3 H W]`, which need not be indexed."""
    (side,) = maker.map_sides(snapshot.index, [inputs])
    exact, cells = maker.head(snapshot.index) is not None, partial(cells_of, side)
    told = []
    for words in asked:
        direction, apart = direction_of(snapshot.index, words), side.embedding - words.embedding
        rival = None if words.rival is None else float(side.embedding @ words.rival)
        result = TextResult(
            id="",
            label=None,
            path="",
            distance=float(apart @ apart),
            similarity=float(side.embedding @ words.embedding),
            rival_similarity=rival,
            signed_cam=_cam(cells, direction),
            image=picture,
        )
        of = words, direction, [result], exact, explainer.max_pixels
        told.append(_explanation(snapshot, *of))
    return told


def _cam(answers: Answers, direction: Direction) -> np.ndarray:
    """Return a signed map, float32 `[H W]`: 0 is what the average picture's positions give."""
    with np.errstate(over="ignore", invalid="ignore"):
        cells = answers(direction.vector)
        cells = (cells - direction.average / cells.size).astype(np.float32)
    if not is_usable(cells):
        raise NetworkError(
            "a map of words overflows: the activations, with what the head makes of them, go "
            "beyond float32; check the network's weights"
        )
    return cells


def _explanation(
    snapshot: Snapshot,
    words: Words,
    direction: Direction,
    results: list[TextResult],
    exact: bool,
    max_pixels: int,
) -> TextExplanation:
    return TextExplanation(
        text=words.text,
        above=words.above,
        embedding=words.embedding,
        direction=direction.vector.astype(np.float32),
        results=results,
        centred=direction.centred,
        exact=exact,
        preprocess=snapshot.preprocess,
        root=snapshot.root,
        only_below=snapshot.only_below,
        max_pixels=max_pixels,
    )
