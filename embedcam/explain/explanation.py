"""What `explain` returns: plain arrays that draw themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..images import MAX_PIXELS, Root
from ..index.records import Json
from ..ops import area_average
from ..preprocess import AnyPreprocess, Extent
from ..render import CHANGED, Tile, draw_on_axes, panel, shrunk
from ..render.tiles import Scale
from .drawing import Drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Result:
    """An image that came back or was named; its fields as `Explanation` has them of all."""

    id: str
    label: str | None
    path: str
    distance: float
    similarity: float
    cam: np.ndarray | None
    norm: float | None
    mark: np.ndarray | None = None

    @classmethod
    def of(
        cls, ids: Sequence[str], *columns: Sequence[str | None] | np.ndarray | None
    ) -> list[Result]:
        """Return a record each of the fields' columns `[n]`; None of columns that are unknown."""
        filled = [
            [None] * len(ids)
            if column is None
            else column.tolist()
            if isinstance(column, np.ndarray) and column.ndim == 1
            else column
            for column in columns
        ]
        return [cls(*fields) for fields in zip(ids, *filled, strict=True)]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Drawn):
    """A query, its nearest images, and where each of them shows why.

    Attributes
    ----------
    cam
        The query's map, `[H W]` float32 >= 0, at the size asked for: what is drawn.
    signed_cam
        The same before its ReLU: what speaks against is negative, of several layers by the deepest
        one. Ranks and thresholds of it do not depend on how maps are drawn.
    weights
        The transferred channel weights, `[K]` float32, or `[K h w]` by position; with `method`
        that method's own, and zeros where it has none.
    features
        The activations averaged under the map, `[K]` float32, see `ops.attended`: what the query
        shows where it matched, to predict from; under an empty map their mean.
    ids, labels, paths
        Of the neighbors, nearest first; in the order given where they were named.
    distances, similarities
        Squared Euclidean, smaller is nearer, and inner products, larger is nearer; `[n]` float32.
    neighbor_cams
        Each neighbor's stored map, `[n h w]` float32 >= 0, or None where the index keeps none.
    explained
        Ids of the images whose weights were transferred.
    transfer
        "mean" or "distance".
    extent
        The rectangle of the query picture that the map covers, (x0, y0, x1, y1) in pixels of the
        upright picture; None where the picture is unknown.
    image, preprocess
        The query picture, upright, and what was shown to the network of the neighbors', or None.
    root, only_below
        Folder that `paths` were joined to, None where they are the caller's own. A path that climbs
        out of it is not followed, and with `only_below` no absolute one that lies elsewhere.
    neighbor_norms
        L2 norm of each neighbor's stored weights, `[n]`, or None. Pictures divide by it, so that
        results on one color scale are compared by weights of one length.
    method
        Title of the method that made the query's map itself; empty where weights were transferred.
    layer_weights
        The weights of every layer by its name, or None.
    trust, trust_low
        The correlation to be expected, in [0, 1], of the signed map with the one computed on the
        query itself, and what nine in ten such maps reach; also where `direct` those of the
        transfer. None where the index holds no calibration.
    trusted_from
        `trust_low` from which the explanation counts as `trusted`.
    direct
        The transfer was not trusted, and the weights were computed on the query itself, for the
        results that came back, right or wrong.
    asked, rival
        The images that `result` and `above` named; pictures show them first. With a rival the
        weights are the result's less the rival's, each of length 1 before, and `trust` is None.
    shared
        By the index's target the images of a label share all or most of their weights.
    prototypes
        The results are prototypes merged from images, shown by the picture in their middle.
    max_pixels
        Pictures of more pixels are not read, and count as not found.
    marks
        Of the files of the neighbors' pictures when the index was built, uint32 `[n 4]`, or None.
    match
        The probability, in [0, 1], that the first result is of the query's kind, from the distances
        and labels of the ten nearest; without labels, how usual its distance is among the indexed
        images. None where the index holds no calibration.
    """

    cam: np.ndarray
    signed_cam: np.ndarray
    weights: np.ndarray
    features: np.ndarray
    ids: list[str]
    labels: list[str | None]
    paths: list[str]
    distances: np.ndarray
    similarities: np.ndarray
    neighbor_cams: np.ndarray | None
    explained: list[str]
    transfer: str
    extent: Extent | None = None
    image: Image.Image | None = None
    preprocess: AnyPreprocess | None = None
    root: Root | None = None
    only_below: bool = False
    neighbor_norms: np.ndarray | None = None
    method: str = ""
    layer_weights: dict[str, np.ndarray] | None = None
    trust: float | None = None
    trust_low: float | None = None
    trusted_from: float = 0.5
    direct: bool = False
    asked: Result | None = None
    rival: Result | None = None
    shared: bool = False
    prototypes: bool = False
    max_pixels: int = MAX_PIXELS
    marks: np.ndarray | None = None
    match: float | None = None

    @property
    def doubtful(self) -> bool:
        """Whether match is below 0.5, without labels below 0.2; False with `result`."""
        least = 0.5 if self.labels and self.labels[0] is not None else 0.2
        return self.asked is None and self.match is not None and self.match < least

    @property
    def match_in_words(self) -> str:
        """Words as "match 0.93", and whether that is doubtful; empty without a calibration."""
        if self.match is None:
            return ""
        return ("DOUBTFUL RESULT, " if self.doubtful else "") + f"match {self.match:.2f}"

    @property
    def trusted(self) -> bool | None:
        """Whether the map can be relied on, as always where `direct`; None without calibration."""
        if self.trust_low is None:
            return None
        return self.direct or self.trust_low >= self.trusted_from

    @property
    def trust_in_words(self) -> str:
        """Words as "trust 0.83", and whether that is enough; empty where nothing was calibrated."""
        if self.trust is None:
            return ""
        if self.direct:
            return f"trust {self.trust:.2f}: computed on the query"
        if self.trusted:
            return f"trust {self.trust:.2f}"
        return f"trust {self.trust:.2f}, but one in ten below {self.trust_low:.2f}: not trusted"

    @property
    def empty(self) -> bool:
        """Whether the query's map is zero everywhere: nothing in it speaks for these results."""
        return not bool(self.cam.any())

    @property
    def why_empty(self) -> str | None:
        """Why the map is empty, a sentence without its full stop; None where it is not."""
        if not self.empty:
            return None
        if self.asked is None or self.rival is None or self.told_apart is None:
            return "nothing in it speaks for these results"
        if self.weights.any() or self.method:
            one, other = self.told_apart
            return f"nothing in it speaks for {one} rather than {other}"
        one, other, label = self.asked.id, self.rival.id, self.asked.label
        of = "" if label is None or label != self.rival.label else f", both {label},"
        return (
            f"{one} and {other}{of} have the same weights in this index, so nothing tells one from "
            "the other"
        )

    @property
    def speaks_for(self) -> str | None:
        """The label that the map speaks for, where one image's weights are mostly its label's."""
        alone = self.shared and not self.method and not self.direct and len(self.explained) == 1
        if not alone or self.rival is not None:  # `told_apart` says both.
            return None
        if self.asked is not None:
            return self.asked.label
        return dict(zip(self.ids, self.labels, strict=True)).get(self.explained[0])

    @property
    def told_apart(self) -> tuple[str, str] | None:
        """The ids of the image named and its rival, or their labels where these are `shared`."""
        if self.asked is None or self.rival is None:
            return None
        one, other = self.asked.label, self.rival.label
        if self.shared and not self.method and one and other and one != other:
            return one, other
        return self.asked.id, self.rival.id

    def __repr__(self) -> str:
        (height, width), trust = self.cam.shape, self.trust_in_words
        return (
            f"<Explanation: {height} x {width} map by {_some(self.explained)}; "
            f"{len(self.ids)} neighbours: {_some(self.ids)}{'; ' * bool(trust)}{trust}>"
        )

    def _draw(self, scale: Scale, title: str | None, ax: Axes | None) -> Image.Image | Axes:
        if ax is not None:
            return draw_on_axes(ax, Tile(self.image, self.cam, self.extent), title)
        query, results = self.tiles()
        return panel(query, results, scale=scale, title=title)

    def tiles(self, side: int | None = None) -> tuple[Tile, list[Tile]]:
        """Return the query's and the results' tiles for `render.panel` and `render.page`.

        Parameters
        ----------
        side
            Make each picture at most so many pixels wide and high as soon as it is read, for more
            tiles than memory holds pictures of full size.
        """
        match, doubtful, results = self.match_in_words, self.doubtful, []
        said = [] if doubtful or self.asked is not None else [match]
        note = "\n".join(filter(None, [*said, self._map_note()]))
        warning = match if doubtful else ""
        query = Tile(self.image, self.cam, self.extent, "query", note, warning=warning)
        for one in self.results():
            tile = self._tile(one)
            results.append(tile if side is None else shrunk(tile, side))
        return (query if side is None else shrunk(query, side)), results

    def _tile(self, result: Result) -> Tile:
        picture, extent, changed = self._read(result)
        name, words = self._short_name(result.id), []
        if result.label is not None:
            pair = (result.label, name) if self.prototypes else (name, result.label)
            name, words = pair[0], [pair[1]]
        words.append(f"distance {result.distance:.3f}")
        words += ["asked for"] * (result is self.asked) + ["its rival"] * (result is self.rival)
        words += [CHANGED] * changed
        # Maps are drawn with weights of length 1.
        cam = result.cam if not result.norm or result.cam is None else result.cam / result.norm
        return Tile(picture, cam, extent, name, "\n".join(words), changed=changed)

    def _short_name(self, id: str) -> str:
        name = id.rpartition("/")[2]
        return f"prototype {name.removeprefix('prototype-')}" if self.prototypes else name

    def _map_note(self) -> str:
        if self.empty:
            if self.rival is None:
                return "no positive evidence\nfor these results"
            if self.weights.any() or self.method:
                return "no positive evidence for\nthe result rather than the rival"
            return "no map: both images\nhave the same weights"
        if self.method:
            return f"{self.method}, on the query;\nresults: stored maps"
        if self.direct:
            low = f"one in ten below {self.trust_low:.2f}"
            return f"computed on the query:\ntransfer not trusted ({low})"
        if self.told_apart is not None and self.asked is not None:
            one, other = self.told_apart
            if one == self.asked.id:
                one, other = self._short_name(one), self._short_name(other)
            return f"what here speaks for\n{one}\nrather than\n{other}"
        if self.speaks_for is not None:
            return f"what here speaks for\n{self.speaks_for}"
        if len(self.explained) == 1:
            return f"what here matched\n{self._short_name(self.explained[0])}"
        words = f"weights of {len(self.explained)} neighbours, {self.transfer}"
        return "\n".join(filter(None, (words, self.trust_in_words)))

    @property
    def _alt(self) -> str:
        return f"query and its nearest images: {', '.join(self.ids)}"

    def changed(self) -> list[str]:
        """Return ids of the results whose pictures are other files now than were indexed."""
        return [one.id for one in self.results() if self._state(one) == "changed"]

    def neighbors(self) -> list[Result]:
        """Return the neighbors, nearest first, each as one record."""
        apart, marks = (self.distances, self.similarities), self.marks
        maps, norms = self.neighbor_cams, self.neighbor_norms
        return Result.of(self.ids, self.labels, self.paths, *apart, maps, norms, marks)

    def results(self) -> list[Result]:
        """Return all that pictures show, the images that were named first."""
        named = {one.id: one for one in (self.asked, self.rival) if one is not None}
        return [*named.values()] + [one for one in self.neighbors() if one.id not in named]

    def _shown(self) -> Sequence[Result]:
        return self.results()

    def to_dict(
        self,
        size: tuple[int, int] | None = None,
        *,
        signed: bool = False,
        features: bool = False,
    ) -> Json:
        """Return plain lists and numbers, ready for JSON; all but the weights and the pictures.

        "file" of a neighbor is what became of its picture's file since the build: "same",
        "changed", "missing", or null where unknown. "trusted" is true, too, where "direct".
        "result" and "rival" are the images that were named, else null.

        Parameters
        ----------
        size
            (height, width) the query's map is averaged down to; None keeps it as it is. A body for
            the network wants a small one: bilinear resizing draws it again.
        signed
            With "signed_cam", of the size of "cam"; it doubles what the map takes.
        features
            With "features", K numbers.
        """
        names = ["cam", "signed_cam"] if signed else ["cam"]
        maps = {name: getattr(self, name) for name in names}
        if size is not None:
            maps = {name: area_average(one, size) for name, one in maps.items()}
        if features:
            maps["features"] = self.features
        return {
            **{name: rounded(one) for name, one in maps.items()},
            "empty": self.empty,
            "why_empty": self.why_empty,
            "extent": None if self.extent is None else list(self.extent),
            "transfer": self.transfer,
            "method": self.method or None,
            **{name: getattr(self, name) for name in ("match", "trust", "trust_low", "trusted")},
            "direct": self.direct,
            "explained": list(self.explained),
            "result": self._record(self.asked),
            "rival": self._record(self.rival),
            "neighbors": [self._record(one) for one in self.neighbors()],
        }

    def _record(self, result: Result | None) -> Json | None:
        if result is None:
            return None
        return {
            "id": result.id,
            "label": result.label,
            "path": result.path,
            "file": self._state(result),
            "distance": result.distance,
            "similarity": result.similarity,
            "cam": None if result.cam is None else rounded(result.cam),
        }


def small_size(shape: Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a map `[H W]` in JSON: at most 14 positions a side."""
    height, width = shape
    return min(14, height), min(14, width)


def rounded(cam: np.ndarray) -> list[float] | list[list[float]]:
    """Return lists of numbers with the digits a float32 holds, not a double's."""
    shortest: list[list[float]] = np.asarray(cam, np.float32).astype("U").astype(float).tolist()
    return shortest


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:2]))
    return f"{shown}, ..." if len(names) > 2 else shown
