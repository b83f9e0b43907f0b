"""What `explain` returns: plain arrays that draw themselves."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import write_whole
from ..errors import EmbedcamError, InputError
from ..images import MAX_PIXELS, FileState, file_state, read_image
from ..ops import area_average

if TYPE_CHECKING:
    from PIL import Image

    from ..index import Manifest
    from ..preprocess import AnyPreprocess, Extent
    from ..render import Tile
    from ..render.tiles import Scale


SHARED = {"discriminant": "one answer", "distinctive": "most of their answer"}
"""What the images of a label share, by targets that hold labels against each other."""


def shared_of(manifest: Manifest) -> str | None:
    """What of their weights the images of a label share in an index; None where it is little.

    Of labels that are numbers no two images need share one.
    """
    return SHARED.get(manifest.target) if manifest.near_share is None else None


@dataclass(frozen=True, eq=False)
class Asked:
    """An image that `result` or `above` named, which need not be among the nearest.

    id, label, path, distance, similarity, cam, norm, mark: as `Explanation` has them of its
        neighbours.
    """

    id: str
    label: str | None
    path: str
    distance: float
    similarity: float
    cam: np.ndarray | None
    norm: float | None
    mark: np.ndarray | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """A query, its nearest images, and where each of them shows why.

    Attributes:
        cam: the query's map, `[H W]` float32 >= 0, at the size asked for: what is drawn.
        signed_cam: the same before its ReLU, `[H W]` float32: what speaks against is negative.
            Ranks and thresholds of it do not depend on how maps are drawn. Of several layers the
            negative part is the deepest one's; of a `method` it is the method's own map.
        weights: the transferred channel weights, `[K]` float32, or `[K h w]` of an index that keeps
            them by position; with `method` that method's own, and zeros where it has none.
        features: the activations averaged under the map, `[K]` float32, see `cam.attended`: what
            the query shows where it matched, to predict from. By the map on the layer's grid,
            before it is resized; with detail 2 the activations are those of the query shown larger,
            of several layers the deepest one's. Where the map is empty, the plain mean.
        ids, labels, paths: of the neighbours, nearest first; in the order given where they were
            named.
        distances: squared Euclidean, `[n]` float32; smaller is nearer.
        similarities: inner products, `[n]` float32; larger is nearer.
        neighbor_cams: each neighbour's own map, `[n h w]` float32 >= 0, or None where the index
            keeps none.
        explained: ids of the images whose weights were transferred.
        transfer: "mean" or "distance".
        method: title of the method that made the query's map itself, where its weights were not
            transferred but computed on the query; else empty.
        extent: the rectangle of the query picture that the map covers, (x0, y0, x1, y1) in pixels
            of the upright picture; outside it there is no evidence. None where the picture is
            unknown.
        image: the query picture, upright, or None.
        preprocess: what was shown to the network of the neighbours' pictures, or None.
        neighbor_norms: L2 norm of each neighbour's stored weights, `[n]`, or None. Pictures divide
            by it, so that results that share a colour scale are compared by weights of one length.
        layer_weights: the transferred weights of every layer by its name, several where the method
            draws with several; with `method` that method's own, or None.
        trust: the correlation to be expected, in [0, 1], of the signed map with the one that is
            computed on the query itself by the index's own target, which is what `fallback` draws;
            calibrated on images of the index that play queries, with transfer "mean" from one
            neighbour and from five. Also where `direct` it is the transfer's. None where the index
            holds no calibration.
        trust_low: the correlation that nine in ten such maps reach.
        match: the probability that the first result is of the query's kind, in [0, 1], from the
            distances and labels of the ten nearest, however many are shown; it says whether the
            result is right, and trust whether the map is. Without labels: how usual the distance of
            the first is among the indexed images. None where the index holds no calibration.
        trusted_from: `trust_low` from which the explanation counts as `trusted`.
        direct: the transfer was not trusted, and the weights were computed on the query itself.
            `trusted` is then True whatever `trust` is: the map needs no transfer. It answers for
            the results that came back, right or wrong.
        root: folder that `paths` were joined to. A path that climbs out of it ("..") is not
            followed: its picture counts as not found. None where the paths are the caller's own.
        only_below: with True absolute paths, too, are followed only below `root`: the caller named
            the folder, so that an index from elsewhere has no say in which other files are read.
        asked: the image that `result` named; pictures show it first. The arrays above are of the
            neighbours alone, as they were searched or named.
        rival: the image that `above` named; pictures show it after `asked`. The weights are then
            the result's less the rival's, each of length 1 before, and `trust` is None.
        shared: by the index's target the images of a label share all or most of their weights; see
            `SHARED`.
        prototypes: the results are prototypes merged from images, shown by the picture of the one
            in their middle.
        max_pixels: pictures of more pixels are not read, and count as not found.
        marks: of the files of the neighbours' pictures when the index was built, uint32 `[n 4]`, or
            None where they are not known. A map is not drawn over a picture that is another now.
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
    preprocess: AnyPreprocess | None = field(default=None)
    root: Path | None = None
    only_below: bool = False
    neighbor_norms: np.ndarray | None = None
    method: str = ""
    layer_weights: dict[str, np.ndarray] | None = None
    trust: float | None = None
    trust_low: float | None = None
    trusted_from: float = 0.5
    direct: bool = False
    asked: Asked | None = None
    rival: Asked | None = None
    shared: bool = False
    prototypes: bool = False
    max_pixels: int = MAX_PIXELS
    marks: np.ndarray | None = None
    match: float | None = None

    @property
    def doubtful(self) -> bool:
        """Whether the first result is rather not of the query's kind: match is below 0.5.

        Without labels half of all usual queries lie below that; there from 0.2. What a named image
        has to say is not in doubt for what came first: False with `result`.
        """
        return self.asked is None and self.match is not None and self.match < self._doubted_below

    @property
    def _doubted_below(self) -> float:
        return 0.5 if self.labels and self.labels[0] is not None else 0.2

    @property
    def match_in_words(self) -> str:
        """ "match 0.93", and whether that is doubtful; empty where nothing was calibrated."""
        if self.match is None:
            return ""
        return ("DOUBTFUL RESULT, " if self.doubtful else "") + f"match {self.match:.2f}"

    @property
    def trusted(self) -> bool | None:
        """Whether the map can be relied on; None where the index holds no calibration.

        True also where the weights were computed on the query (`direct`), however low `trust` is.
        """
        return (
            None if self.trust_low is None else self.direct or self.trust_low >= self.trusted_from
        )

    @property
    def trust_in_words(self) -> str:
        """ "trust 0.83", and whether that is enough; empty where the index holds no calibration."""
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
        if not self.shared or self.method or self.direct or len(self.explained) != 1:
            return None
        if self.rival is not None:  # `told_apart` says both.
            return None
        if self.asked is not None:
            return self.asked.label
        return dict(zip(self.ids, self.labels, strict=True)).get(self.explained[0])

    @property
    def told_apart(self) -> tuple[str, str] | None:
        """What the map speaks for and what it is told from, where a rival was named; else None.

        The labels where one image's weights are its whole label's, else the ids.
        """
        if self.asked is None or self.rival is None:
            return None
        one, other = self.asked.label, self.rival.label
        by_label = self.shared and not self.method and one != other
        if by_label and one is not None and other is not None:
            return one, other
        return self.asked.id, self.rival.id

    def __repr__(self) -> str:
        (height, width), trust = self.cam.shape, self.trust_in_words
        return (
            f"<Explanation: {height} x {width} map by {_some(self.explained)}; "
            f"{len(self.ids)} neighbours: {_some(self.ids)}{'; ' * bool(trust)}{trust}>"
        )

    def plot(self, *, scale: Scale = "joint", title: str | None = None) -> Image.Image:
        """The query and its results, each with its map, as one picture.

        Args:
            scale: "joint" draws all results on one colour scale, so that weak evidence does not
                look strong; "each" gives every result its own.
            title: heading.
        """
        from .. import render

        query, results = self.tiles()
        return render.panel(query, results, scale=scale, title=title)

    def save(self, path: str | Path, *, scale: Scale = "joint", title: str | None = None) -> Path:
        """Write the picture of `plot`; the file's ending chooses the format.

        Raises:
            InputError: an ending that names no format, or a place that cannot be written.
        """
        return save_picture(lambda: self.plot(scale=scale, title=title), path)

    def tiles(self, side: int | None = None) -> tuple[Tile, list[Tile]]:
        """The query's and the results' tiles for `render.panel` and `render.page`.

        Args:
            side: make each picture at most so many pixels wide and high as soon as it is read, for
                more tiles than memory holds pictures of full size.
        """
        from .. import render

        def small(tile: Tile) -> Tile:
            return tile if side is None else render.shrunk(tile, side)

        query = small(
            render.Tile(
                self.image,
                self.cam,
                self.extent,
                "query",
                self._transfer_note(),
                warning=self.match_in_words if self.doubtful else "",
            )
        )
        return query, [small(self._tile(result)) for result in self._results()]

    def not_found(self) -> list[str]:
        """Ids of the results whose pictures are not where the index says; none are read."""
        return [
            one.id
            for one in self._results()
            if one.path and not (self._follows(one.path) and Path(one.path).is_file())
        ]

    def changed(self) -> list[str]:
        """Ids of the results whose pictures are other files now than were indexed."""
        return [one.id for one in self._results() if self._state(one) == "changed"]

    def _results(self) -> list[Asked]:
        """All that pictures show, the one that was asked for first."""
        asked = [one for one in (self.asked, self.rival) if one is not None]
        places = [place for place, name in enumerate(self.ids) if name not in [a.id for a in asked]]
        return [*asked, *(self._neighbor(place) for place in places)]

    def _state(self, result: Asked) -> FileState | None:
        """What became of a result's file since the build; None where that cannot be told."""
        if result.mark is None or not result.path:
            return None
        return file_state(result.path, result.mark) if self._follows(result.path) else "missing"

    def _neighbor(self, place: int) -> Asked:
        own = None if self.neighbor_cams is None else self.neighbor_cams[place]
        norm = None if self.neighbor_norms is None else float(self.neighbor_norms[place])
        return Asked(
            self.ids[place],
            self.labels[place],
            self.paths[place],
            float(self.distances[place]),
            float(self.similarities[place]),
            own,
            norm,
            None if self.marks is None else self.marks[place],
        )

    def _tile(self, result: Asked) -> Tile:
        from .. import render

        picture, extent = self._picture(result.path)
        name = self._short_name(result.id)
        words = [] if result.label is None else [result.label]
        if self.prototypes and result.label is not None:
            name, words = result.label, [name]
        words.append(f"distance {result.distance:.3f}")
        if result is self.asked:
            words.append("asked for")
        if result is self.rival:
            words.append("its rival")
        changed = self._state(result) == "changed"
        if changed:
            words.append(render.CHANGED)
        # Maps are drawn with weights of length 1.
        own = result.cam if not result.norm or result.cam is None else result.cam / result.norm
        return render.Tile(picture, own, extent, name, "\n".join(words), changed=changed)

    def _short_name(self, id: str) -> str:
        name = id.rpartition("/")[2]
        return f"prototype {name.removeprefix('prototype-')}" if self.prototypes else name

    def to_dict(
        self,
        size: tuple[int, int] | None = None,
        *,
        signed: bool = False,
        features: bool = False,
    ) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; all but the weights and the pictures.

        Args:
            size: (height, width) the query's map is averaged down to; None keeps it as it is.
                A body for the network wants a small one: bilinear resizing draws it again.
            signed: with "signed_cam", of the size of "cam"; it doubles what the map takes.
            features: with "features", K numbers.

        "file" of a neighbour is what became of its picture's file since the build: "same",
        "changed", "missing", or null where the index keeps no mark of it.

        "trusted" is true, too, where the weights were computed on the query ("direct"): "trust" is
        then the low one of the transfer that was not taken. "result" is the image that was asked
        for, as one of "neighbors" is described, else null; so is "rival", which it was to be told
        from. "why_empty" is a sentence where the map is "empty", else null.
        """
        maps = {"cam": self.cam, **({"signed_cam": self.signed_cam} if signed else {})}
        return {
            **{
                name: _rounded(one if size is None else area_average(one, size))
                for name, one in maps.items()
            },
            **({"features": _rounded(self.features)} if features else {}),
            "empty": self.empty,
            "why_empty": self.why_empty,
            "extent": None if self.extent is None else list(self.extent),
            "transfer": self.transfer,
            # Of the query's map; the neighbours' are the index's own.
            "method": self.method or None,
            "match": self.match,
            "trust": self.trust,
            "trust_low": self.trust_low,
            "trusted": self.trusted,
            "direct": self.direct,
            "explained": list(self.explained),
            "result": None if self.asked is None else self._record(self.asked),
            "rival": None if self.rival is None else self._record(self.rival),
            "neighbors": [self._record(self._neighbor(place)) for place in range(len(self.ids))],
        }

    def _record(self, result: Asked) -> dict[str, Any]:
        """A result for JSON."""
        return {
            "id": result.id,
            "label": result.label,
            "path": result.path,
            "file": self._state(result),
            "distance": result.distance,
            "similarity": result.similarity,
            "cam": None if result.cam is None else _rounded(result.cam),
        }

    def _repr_html_(self) -> str:
        from ..render import in_notebook

        return in_notebook(self.plot(), f"query and its nearest images: {', '.join(self.ids)}")

    def _transfer_note(self) -> str:
        match = "" if self.doubtful or self.asked is not None else self.match_in_words
        return "\n".join(filter(None, (match, self._map_note())))

    def _map_note(self) -> str:
        if self.empty:
            return self._empty_note()
        if self.method:
            return f"{self.method}, on the query;\nresults: stored maps"
        if self.direct:
            low = f"one in ten below {self.trust_low:.2f}"
            return f"computed on the query:\ntransfer not trusted ({low})"
        if self.told_apart is not None:
            one, other = self.told_apart
            if self.asked is not None and one == self.asked.id:
                one, other = self._short_name(one), self._short_name(other)
            return f"what here speaks for\n{one}\nrather than\n{other}"
        if self.speaks_for is not None:
            return f"what here speaks for\n{self.speaks_for}"
        if len(self.explained) == 1:
            return f"what here matched\n{self._short_name(self.explained[0])}"
        words = f"weights of {len(self.explained)} neighbours, {self.transfer}"
        return "\n".join(filter(None, (words, self.trust_in_words)))

    def _empty_note(self) -> str:
        if self.rival is None:
            return "no positive evidence\nfor these results"
        if self.weights.any() or self.method:
            return "no positive evidence for\nthe result rather than the rival"
        return "no map: both images\nhave the same weights"

    def _follows(self, path: str) -> bool:
        return may_follow(path, self.root, self.only_below)

    def _picture(self, path: str) -> tuple[Image.Image | None, Extent | None]:
        """A result's picture and what the network saw of it; None for what is not to be had."""
        try:
            picture = None
            if self._follows(path):
                picture = read_image(path, max_pixels=self.max_pixels)
        except EmbedcamError:
            return None, None
        if picture is None or self.preprocess is None:
            return picture, None
        try:
            return picture, self.preprocess.extent(*picture.size)
        except EmbedcamError:
            # A map over the wrong part of a picture would be worse than one beside it.
            return None, None


def _rounded(cam: np.ndarray) -> list[Any]:
    """A map as lists of numbers with the digits a float32 holds, not a double's."""
    shortest: list[Any] = np.asarray(cam, np.float32).astype("U").astype(float).tolist()
    return shortest


def may_follow(path: str, root: Path | None, only_below: bool) -> bool:
    """Whether a neighbour's picture is read: its path is what an index says, whoever wrote it.

    Args:
        path: as in `Explanation.paths`: joined to the root, or absolute.
        root: see `Explanation.root`.
        only_below: see `Explanation.only_below`.

    The test is one of names: links that lie below the root are the reader's own, and followed.
    """
    if not path:
        return False
    if root is None:
        return True
    found = Path(path)
    below = found.is_relative_to(root)
    # Any "..", for behind a link it leads elsewhere than the names say; the root's own are fine.
    if ".." in (found.relative_to(root) if below else found).parts:
        return False
    if below:
        return True
    return found.is_absolute() and (not only_below or found.is_relative_to(os.path.abspath(root)))


def small_size(shape: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a map `[H W]` in JSON: at most 14 cells a side, twice the usual grid."""
    height, width = shape
    return min(14, height), min(14, width)


def save_picture(draw: Callable[[], Image.Image], path: str | Path) -> Path:
    """Write a picture, drawn once its file's name is known to be good.

    Raises:
        InputError: an ending that names no format, or a place that cannot be written.
    """
    from PIL import Image

    path = Path(path)
    check_picture_name(path)
    picture, held = draw(), io.BytesIO()
    try:
        picture.save(held, Image.registered_extensions()[path.suffix.lower()])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: the picture cannot be written ({reason})") from error
    return write_whole(path, held.getvalue())


def check_picture_name(path: Path) -> None:
    """Refuse a file name whose ending is no picture format, before any work is done for it."""
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        ending = path.suffix or "no ending"
        raise InputError(f"{path}: {ending} is no picture format; name it .png or .jpg")


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:2]))
    return f"{shown}, ..." if len(names) > 2 else shown
