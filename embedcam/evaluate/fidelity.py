"""How far a transferred map is from the query's own: the one that is computed on the query itself.

The own map is what a fallback draws: weights by the index's recipe with the query as anchor, its
neighbours as positives and others as negatives. Stored weights are never held against each other:
images of one label may share them, and would agree by construction.
"""

from collections.abc import Iterator

import numpy as np

from ..explain.answer import negatives_for
from ..images import Batch
from ..methods import DirectWeights
from ..metrics import correlations
from ..recipe.recipe import Recipe
from .maps import Seen
from .queries import chosen
from .work import Row, Rows, Work

COUNTS = (1, 2, 5, 10, 20)
BACK, OWN, OTHER = "as they came back", "of the query's own label", "of another label"
RESULTS = (BACK, OWN, OTHER)
"""Which results a map is transferred from."""


def fidelity(work: Work, rows: Rows) -> list[Row]:
    """Correlate a sample's own maps with transferred ones, both before the ReLU.

    Returns:
        A row for each image, kind of `results` and number `n_neighbors` of them, with the
        `correlation` over positions of the layer. Without a label that the index knows there is
        the first kind alone.
    """
    settings, gallery = work.settings, work.gallery
    if not work.wants("fidelity") or not settings.fidelity:
        return []
    if len(gallery) < settings.n_neighbors + 2:
        work.note("no transfer fidelity: the index holds too few images to tell a query from")
        return []
    index = work.mapper.index
    direct = DirectWeights(work.mapper.network, Recipe.of_index(index.manifest))
    read = np.array(sorted(rows))
    sample = read[chosen(len(read), settings.fidelity, settings.seed)]
    found: list[Row] = []
    with work.reader.bar(len(sample), "fidelity") as advance:
        for batch, seen in work.reader.seen(sample, advance):
            found += _correlated(work, direct, batch, seen.small())
    return found


def counts_of(work: Work) -> list[int]:
    """The numbers of neighbours that are tried."""
    counts = {*COUNTS, work.settings.n_neighbors}
    return sorted(n for n in counts if n < len(work.gallery))


def _correlated(work: Work, direct: DirectWeights, batch: Batch, seen: Seen) -> Iterator[Row]:
    gallery, mapper, index = work.gallery, work.mapper, work.mapper.index
    wanted, counts = work.settings.n_neighbors, counts_of(work)
    own = work.own.held(batch.positions.tolist())
    back = gallery.nearest(seen.embeddings, own, max(counts))
    for place, position in enumerate(batch.positions.tolist()):
        near = back[place][:wanted]
        negatives = negatives_for(index, [*near, own[place]], index.select(near).labels)
        with mapper.clock("forward"):
            weights = direct.weights(batch.images[place], index.embeddings(near), negatives)
        one = seen.row(place)
        computed = mapper.drawn(one, [layer[None] for layer in weights]).signed
        given = {BACK: back[place]}
        code = gallery.code(work.reader.source.items[position].label)
        if code >= 0:
            others = gallery.positions != own[place]
            for kind, alike in ((OWN, gallery.codes == code), (OTHER, gallery.codes != code)):
                rows = gallery.positions[others & alike]
                given[kind] = gallery.nearest_of(seen.embeddings[place], rows, max(counts))
        for kind, rows in given.items():
            for count in (n for n in counts if n <= len(rows)):
                (transferred,) = mapper.transferred(one, [rows[:count]])
                with mapper.clock("metrics"):
                    agree = correlations(computed, transferred.signed_cam[None])[0]
                yield {"position": position, "results": kind, "n_neighbors": count,
                       "correlation": float(agree)}  # fmt: skip
