"""Telling objects apart: where in a picture of two objects is what a given result shows?

A picture of one object hardly tells an explanation from a saliency map. In one of two a map that
ignores the question scores exactly one half, as both objects are asked about in turn.
"""

from collections.abc import Iterator

import numpy as np

from ..errors import EmbeddingError, InputError
from ..images import load_batches
from .maps import Maps, Questions, Seen
from .measures import columns, shares, told_apart
from .queries import generator
from .regions import Region
from .settings import METHOD
from .work import Row, Rows, Work

LEAST = 0.02
"""Share of a picture that an object needs alone to be asked about."""


def of_boxes(work: Work, seen: Seen, region: Region | None, position: int) -> Iterator[Row]:
    """Ask about every ordered pair of labels that the boxes of one picture name.

    Labels are those that the index knows. Pixels that belong to one of the two alone are compared,
    where each has at least `LEAST` of the picture.
    """
    by_label = {} if region is None else region.by_label
    known = [label for label in by_label if len(work.gallery.of_label(label))]
    left_out = work.own.held([position]).tolist()
    for label in known:
        mine = by_label[label]
        others = [
            theirs
            for theirs in (by_label[other] for other in known if other != label)
            if min((mine * (1 - theirs)).mean(), (theirs * (1 - mine)).mean()) >= LEAST
        ]
        name = work.reader.source.items[position].id
        asked = ask(work, seen, label, left_out, name) if others else None
        if asked is None:
            continue
        row, maps = asked
        row = {"first": position, "second": -1, "side": -1, **row}
        for theirs in others:
            yield _record(work, row, maps, mine, theirs)


def pasted(work: Work, rows: Rows) -> list[Row]:
    """Ask about pairs of pictures of different labels side by side, one question a side.

    Args:
        work: with a number of scenes.
        rows: of the images among which pairs are drawn.
    """
    questions: list[Row] = []
    if not work.wants("objects") or not work.settings.scenes:
        return questions
    with work.reader.bar(work.settings.scenes, "scenes") as advance:
        try:
            for pair in _pairs(work, np.array(sorted(rows))):
                questions += _of_pair(work, pair)
                advance(1)
        except _NoScenesError as error:
            work.note(f"no scenes of two pictures: {error}")
    if work.mapper.squeezed:
        work.note(
            f"scenes show both pictures at half their width: {work.mapper.squeezed}, so two stand "
            "side by side in the size of one"
        )
    return questions


def ask(
    work: Work, seen: Seen, label: str, left_out: list[int], name: str
) -> tuple[Row, dict[str, Maps]] | None:
    """The map of one picture for a label: by its nearest image of that label in the index.

    Args:
        work: with the index.
        seen: one picture, as a batch.
        label: asked about.
        left_out: rows of the index that the picture itself shows.
        name: of the picture, for what is random.

    Returns:
        The label and the result's id, and the map `[1 H W]` by each way, the mean activation always
        among them; None where no image has the label.
    """
    gallery = work.gallery
    rows = gallery.of_label(label)
    rows = rows[~np.isin(rows, left_out)]
    if not len(rows):
        return None
    result = gallery.nearest_of(seen.embeddings[0], rows, 1)
    asked = Questions(seen, [result], [left_out], [label], [f"{name} {label}"])
    return {"label": label, "result": gallery.index.ids[int(result[0])]}, work.drawn(asked)


def _record(
    work: Work, asked: Row, maps: dict[str, Maps], own: np.ndarray, other: np.ndarray
) -> Row:
    """One question's numbers, those of controls under their names."""
    with work.mapper.clock("metrics"):
        row = dict(asked)
        for way, found in maps.items():
            row |= columns(way, told_apart(found, own, other))
        row["share_chance"] = shares(np.zeros_like(own), own, other)[2]
        row["right_chance"] = 0.5
        row["empty"] = not maps[METHOD].drawn.any()
    return row


def _of_pair(work: Work, pair: tuple[int, int]) -> Iterator[Row]:
    """The questions about two pictures; none where they cannot be used."""
    reader, source = work.reader, work.reader.source
    preprocess, on_error = reader.preprocess, reader.on_unreadable
    (batch,) = load_batches(source, pair, preprocess, 2, workers=0, on_error=on_error)
    if len(batch) < 2:
        return
    name = " | ".join(source.items[place].id for place in pair)
    try:
        seen = work.mapper.see_pair(batch.images)
    except EmbeddingError as error:
        if on_error == "fail":
            raise error.of_one(name) from None
        return
    unsure = work.own.unsure(pair)
    singles = work.mapper.see(batch.images).embeddings if unsure else None
    left_out = work.own.of(pair, singles).tolist()
    left = np.zeros(seen.size)
    left[:, : seen.size[1] // 2] = 1
    for side, half in enumerate((left, 1 - left)):
        asked = ask(work, seen, source.items[pair[side]].label or "", left_out, name)
        if asked is not None:
            row, maps = asked
            row = {"first": pair[0], "second": pair[1], "side": side, **row}
            yield _record(work, row, maps, half, 1 - half)


class _NoScenesError(InputError):
    """Two pictures cannot be put side by side, and why."""


def _pairs(work: Work, positions: np.ndarray) -> list[tuple[int, int]]:
    """Seeded pairs of different labels that the index knows."""
    labels = [work.reader.source.items[place].label for place in positions.tolist()]
    codes = np.array([work.gallery.code(label) for label in labels])
    usable, codes = positions[codes >= 0], codes[codes >= 0]
    if len(np.unique(codes)) < 2:
        raise _NoScenesError(
            "pairs of pictures need two labels that the index knows, too"
            if any(label is not None for label in labels)
            else "pairs of pictures need labels, and the images have none"
        )
    drawn = generator(work.settings.seed, "scenes")
    pairs = []
    for _ in range(work.settings.scenes):
        a = int(drawn.integers(len(usable)))
        b = int(drawn.choice(np.flatnonzero(codes != codes[a])))
        pairs.append((int(usable[a]), int(usable[b])))
    return pairs
