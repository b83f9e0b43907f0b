"""The groups of measures: functions from rows to rows, one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .._checks import whole
from ..errors import EmbedcamError, EmbeddingError, InputError
from ..explain.answer import negatives_for
from ..images import Batch, load_batches
from ..methods import DirectWeights
from ..metrics import correlations, rank_correlations
from ..metrics.maps import pixel_count
from ..recipe.recipe import Recipe
from .faithfulness import Faithfulness
from .gallery import generator, sample
from .maps import Question, Questions, Seen, maps_of
from .measures import KS, MEAN, TRANSFERRED, Maps, columns, retrieved, shares, told_apart
from .regions import Region
from .rivals import SHUFFLED, WRONG, ShuffledNetwork, mean_activation
from .settings import Record
from .work import Rows, Work

LEAST_AREA = 0.02
"""Share of a picture that an object needs alone to be asked about."""
MEASURED = 16
"""Images that a shuffled network's batch norms are measured on."""
COUNTS = (1, 2, 5, 10, 20)
BACK, OWN, OTHER = "as they came back", "of the query's own label", "of another label"
RESULTS = (BACK, OWN, OTHER)
"""Which results a map is transferred from."""


def explained(work: Work, positions: np.ndarray) -> tuple[Rows, list[Record]]:
    """Explain images, one forward pass each: a row an image, and a row a question about boxes."""
    rows: Rows = {}
    questions: list[Record] = []
    with work.bar(len(positions), "images") as advance:
        for batch, seen in work.seen(positions, advance):
            _check_pixels(work, seen.size)
            placed = work.placed(batch, seen.size)
            rows |= _explained(work, batch, seen, placed)
            if work.wants("objects"):
                for place, position in enumerate(batch.positions.tolist()):
                    questions += of_boxes(work, seen.row(place), placed[place], position)
    return rows, questions


def _explained(work: Work, batch: Batch, seen: Seen, placed: list[Region | None]) -> Rows:
    gallery, wanted = work.gallery, work.settings.n_neighbors
    items = [work.source.items[position] for position in batch.positions]
    own = work.own_rows.find(batch.positions.tolist(), seen.embeddings)
    with work.mapper.clock("explaining"):
        near = gallery.nearest(seen.embeddings, own, max(*KS, wanted))
    explanations = work.mapper.transferred(seen, [places[:wanted] for places in near])
    maps = {TRANSFERRED: maps_of(explanations)}
    if any(region is not None for region in placed):
        maps[MEAN] = mean_activation(work.mapper, seen)
    rows: Rows = {}
    with work.mapper.clock("metrics"):
        retrieval = work.wants("retrieval")
        labels = [item.label if gallery.labeled else None for item in items]
        precise: list[float | None] = [None] * len(items)
        if retrieval and gallery.labeled:
            precise = gallery.precision_at_r(seen.embeddings, labels, own)
        where = work.located(placed, maps)
        for place, (item, one) in enumerate(zip(items, explanations, strict=True)):
            row: Record = {
                "id": item.id,
                "label": item.label,
                "indexed": bool(own[place] >= 0),
                "result": one.ids[0],
                "result_label": one.labels[0],
                "distance": float(one.distances[0]),
                "trust": one.trust,
                "empty": one.empty,
            }
            if retrieval:
                row |= retrieved(labels[place], [gallery.label_of(other) for other in near[place]])
                row["map_at_r"] = precise[place]
            rows[int(batch.positions[place])] = row | where[place]
    return rows


def _check_pixels(work: Work, size: tuple[int, int]) -> None:
    settings, pixels = work.settings, size[0] * size[1]
    if work.wants("faithfulness") and settings.faithfulness:
        whole("steps", settings.steps, 1, pixels)
        if pixel_count(settings.removed, pixels) == pixels:
            every = f"every one of the {pixels} pixels of the input"
            raise InputError(f"removed = {settings.removed} is {every}; give a smaller share")


def of_boxes(work: Work, seen: Seen, region: Region | None, position: int) -> Iterator[Record]:
    """Ask about ordered pairs of a picture's known labels, by pixels of one of the two alone."""
    by_label = {} if region is None else region.by_label
    known = {name: one for name, one in by_label.items() if len(work.gallery.of_label(name))}
    where = {"first": position, "second": -1, "side": -1}
    for label, mine in known.items():
        others = [
            theirs
            for theirs in known.values()
            if theirs is not mine
            and min((mine * (1 - theirs)).mean(), (theirs * (1 - mine)).mean()) >= LEAST_AREA
        ]
        if others:
            yield from _asked(work, seen, label, where, mine, others)


def _asked(
    work: Work,
    seen: Seen,
    label: str,
    where: Record,
    own: np.ndarray,
    others: Sequence[np.ndarray],
) -> list[Record]:
    """Explain a picture by its nearest image of a label, if any; a row for each other region."""
    name, left_out = work.of_pictures(where)
    rows = work.gallery.of_label(label)
    rows = rows[~np.isin(rows, left_out)]
    if not len(rows):
        return []
    near = work.gallery.nearest_of(seen.embeddings[0], rows, 1)
    question = Question(near, left_out, label, f"{name} {label}")
    maps = work.draw(Questions(seen, [question]))
    asked = where | {"label": label, "result": work.gallery.index.ids[int(near[0])]}
    questions = []
    with work.mapper.clock("metrics"):
        for other in others:
            row = dict(asked)
            for method, some in maps.items():
                row |= columns(method, told_apart(some, own, other))
            row["share_chance"] = shares(maps[TRANSFERRED].drawn[0], own, other)[1]
            row["right_chance"] = 0.5
            row["empty"] = not maps[TRANSFERRED].drawn.any()
            questions.append(row)
    return questions


def pasted(work: Work, rows: Rows) -> list[Record]:
    """Ask about pairs of the images, of different labels and side by side, a question a side."""
    questions: list[Record] = []
    if not work.wants("objects") or not work.settings.scenes:
        return questions
    pairs = _pairs(work, np.array(sorted(rows)))
    with work.bar(work.settings.scenes, "scenes") as advance:
        for pair in pairs:
            questions += _of_pair(work, pair)
            advance(1)
    if work.mapper.squeezed:
        work.note(
            f"scenes show both pictures at half their width: {work.mapper.squeezed}, so two stand "
            "side by side in the size of one"
        )
    return questions


def _of_pair(work: Work, pair: tuple[int, int]) -> Iterator[Record]:
    (batch,) = load_batches(
        work.source, pair, work.preprocess, 2, workers=0, on_error=work.on_unreadable
    )
    if len(batch) < 2:
        return
    try:
        seen = work.mapper.see_pair(batch.images)
    except EmbeddingError as error:
        if work.on_unreadable == "fail":
            name, _ = work.of_pictures({"first": pair[0], "second": pair[1]})
            raise error.of_one(name) from None
        return
    left = np.zeros(seen.size)
    left[:, : seen.size[1] // 2] = 1
    for side, half in enumerate((left, 1 - left)):
        where = {"first": pair[0], "second": pair[1], "side": side}
        label = work.source.items[pair[side]].label or ""
        yield from _asked(work, seen, label, where, half, [1 - half])


def _pairs(work: Work, positions: np.ndarray) -> Iterator[tuple[int, int]]:
    labels = [work.source.items[place].label for place in positions.tolist()]
    codes = np.array([work.gallery.code(label) for label in labels])
    usable, codes = positions[codes >= 0], codes[codes >= 0]
    if len(np.unique(codes)) < 2:
        why = "need two labels that the index knows, too"
        if not any(label is not None for label in labels):
            why = "need labels, and the images have none"
        work.note(f"no scenes of two pictures: pairs of pictures {why}")
        return
    numbers = generator(work.settings.seed, "scenes")
    for _ in range(work.settings.scenes):
        a = int(numbers.integers(len(usable)))
        b = int(numbers.choice(np.flatnonzero(codes != codes[a])))
        yield int(usable[a]), int(usable[b])


@dataclass
class Compared:
    """What the sample showed beside its columns.

    stages: each image's rank correlation and whether the second map is empty, by modules shuffled.
    """

    images: int = 0
    passes: int = 0
    curves: dict[str, list[np.ndarray]] = field(default_factory=dict)
    stages: dict[int, list[tuple[float, bool]]] = field(default_factory=dict)
    modules: int = 0


def compared(work: Work, rows: Rows) -> tuple[Rows, Compared]:
    """Hold a sample of the images against baselines and remove their pixels: more columns."""
    places, beside, rows = _sample(work, rows), Compared(), dict(rows)
    if not len(places):
        return rows, beside
    controls, faithful = work.settings.controls, work.wants("faithfulness")
    shuffled = _shuffled(work, places) if controls else None
    remove = Faithfulness(work, beside.curves)
    with work.bar(len(places), "controls" if controls else "faithfulness") as advance:
        for batch, seen in work.seen(places):
            asked = work.questions(batch, seen)
            maps = work.draw(asked)
            if not controls:
                del maps[MEAN]
            elif WRONG not in maps:
                work.note("the index holds too few images for a control with wrong images' weights")
            if shuffled is not None:
                last = _cascade(work, shuffled, batch, asked, beside)
                maps |= {} if last is None else {SHUFFLED: last}
            others = {method: some for method, some in maps.items() if method != TRANSFERRED}
            with work.mapper.clock("metrics"):
                where = work.located(work.placed(batch, seen.size), others)
            for place, position in enumerate(batch.positions.tolist()):
                row = rows[position] | where[place]
                row |= {
                    f"{name}: empty": not one.drawn[place].any() for name, one in others.items()
                }
                if faithful:
                    drawn = {method: some.drawn[place] for method, some in maps.items()}
                    for method, values in remove(seen, place, asked.each[place], drawn).items():
                        row |= columns(method, values)
                rows[position] = row
                advance(1)
    beside.images, beside.passes = len(places), remove.passes
    if shuffled is not None:
        shuffled.shuffle(0)
        beside.modules = shuffled.count
    return rows, beside


def _sample(work: Work, rows: Rows) -> np.ndarray:
    settings, faithful = work.settings, work.wants("faithfulness")
    compare = settings.controls or bool(work.rivals)
    localize = compare and work.wants("localisation") and len(work.regions)
    sane = settings.controls and work.wants("sanity")
    places = np.array(sorted(rows))
    if not settings.faithfulness or not (faithful or localize or sane):
        return places[:0]
    if localize and not faithful:
        # Drawn among those that say something: of many images few may have a box.
        where = places[["area" in rows[position] for position in places.tolist()]]
        places = where if len(where) or not sane else places
    return np.asarray(places[sample(len(places), settings.faithfulness, settings.seed)])


def _shuffled(work: Work, places: np.ndarray) -> ShuffledNetwork | None:
    first = next(work.seen(places[:MEASURED], None, MEASURED), None)
    if first is None:
        work.note("no controls: the images could be read before, and no longer can")
        return None
    try:
        return ShuffledNetwork(work.mapper.network, work.settings.seed, first[0].images)
    except EmbedcamError as error:
        work.note(f"no network of shuffled parameters as a control: {error}")
        return None


def _cascade(
    work: Work, shuffled: ShuffledNetwork, batch: Batch, asked: Questions, beside: Compared
) -> Maps | None:
    """Shuffle module after module; return the maps of the network with all of them shuffled."""
    here = work.mapper.maps(asked.seen.small(), asked.near).drawn
    own, stages = np.array([one.left_out[0] for one in asked.each]), shuffled.stages
    for stage in stages if work.wants("sanity") else stages[-1:]:
        shuffled.shuffle(stage)
        if (other := shuffled.see(work.mapper, batch.images)) is None:
            work.note("the network computes nothing finite once its parameters are shuffled")
            return None
        with work.mapper.clock("explaining"):
            rows = work.gallery.nearest(other.embeddings, own, work.settings.n_neighbors)
        there = work.mapper.maps(other.small(), rows).drawn
        with work.mapper.clock("metrics"):
            alike = rank_correlations(here, there).tolist()
        empty = (not drawn.any() for drawn in there)
        beside.stages.setdefault(stage, []).extend(zip(alike, empty, strict=True))
        last = other, rows
    return work.mapper.maps(*last)


def fidelity(work: Work, rows: Rows) -> list[Record]:
    """Correlate a sample's own signed maps with transferred ones: a row an image, kind, count."""
    settings = work.settings
    if not work.wants("fidelity") or not settings.fidelity:
        return []
    if len(work.gallery) < settings.n_neighbors + 2:
        work.note("no transfer fidelity: the index holds too few images to tell a query from")
        return []
    # Stored weights are never held against each other: images of one label may share them.
    direct = DirectWeights(work.mapper.network, Recipe.of_index(work.mapper.index.manifest))
    places = np.array(sorted(rows))[sample(len(rows), settings.fidelity, settings.seed)]
    with work.bar(len(places), "fidelity") as advance:
        return [
            row
            for batch, seen in work.seen(places, advance)
            for row in _correlated(work, direct, batch, seen.small())
        ]


def _correlated(work: Work, direct: DirectWeights, batch: Batch, seen: Seen) -> Iterator[Record]:
    gallery, mapper, index = work.gallery, work.mapper, work.mapper.index
    wanted = work.settings.n_neighbors
    counts = sorted(n for n in {*COUNTS, wanted} if n < len(gallery))
    own = work.own_rows.known(batch.positions.tolist())
    back = gallery.nearest(seen.embeddings, own, max(counts))
    for place, position in enumerate(batch.positions.tolist()):
        near = back[place][:wanted]
        negatives = negatives_for(index, [*near, own[place]], index.select(near).labels)
        with mapper.clock("forward"):
            weights = direct.weights(batch.images[place], index.embeddings(near), negatives)
        one = seen.row(place)
        computed = mapper.draw(one, [layer[None] for layer in weights]).signed
        results = {BACK: back[place]}
        code = gallery.code(work.source.items[position].label)
        if code >= 0:
            others = gallery.positions != own[place]
            for kind, alike in ((OWN, gallery.codes == code), (OTHER, gallery.codes != code)):
                rows = gallery.positions[others & alike]
                results[kind] = gallery.nearest_of(seen.embeddings[place], rows, max(counts))
        for kind, rows in results.items():
            for count in (n for n in counts if n <= len(rows)):
                signed = mapper.maps(one, [rows[:count]]).signed
                with mapper.clock("metrics"):
                    agree = float(correlations(computed, signed)[0])
                yield {"position": position, "results": kind, "n_neighbors": count,
                       "correlation": agree}  # fmt: skip
