"""What `explain_text` returns: pictures that words find, and where each answers them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..images import MAX_PIXELS, Root
from ..index.records import Json
from ..preprocess import AnyPreprocess
from ..render import CHANGED, Tile, draw_on_axes, panel
from ..render.tiles import Scale, shorten
from .drawing import Drawn
from .explanation import rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class TextResult:
    """A picture and where it answers words.

    `similarity` is f . t, and `rival_similarity` that with the text it is held against, or None;
    `distance` is squared Euclidean. `signed_cam` `[h w]` float32 is what each position gives, on
    the layer's grid: None where the picture cannot be read. `id` is empty, and `image` there, for a
    picture that was given.
    """

    id: str
    label: str | None
    path: str
    distance: float
    similarity: float
    rival_similarity: float | None
    signed_cam: np.ndarray | None
    mark: np.ndarray | None = None
    image: Image.Image | None = None

    @property
    def rather_rival(self) -> bool:
        """Whether the picture answers the text that the words are held against better."""
        return self.rival_similarity is not None and self.rival_similarity > self.similarity

    @property
    def cam(self) -> np.ndarray | None:
        """The map, `[h w]` float32 >= 0: where the picture answers the words."""
        return None if self.signed_cam is None else np.maximum(self.signed_cam, 0)


@dataclass(frozen=True, eq=False, repr=False)
class TextExplanation(Drawn):
    """Words, the pictures nearest to them, and where each picture answers them.

    Attributes
    ----------
    text, above
        The words, and those that they are held against, or None: then positive places speak for
        `text` and negative ones for `above`.
    embedding, direction
        Of the text, `[D]` float32, and what maps follow: the embedding less the mean of all texts,
        or less the rival's.
    results
        The pictures, nearest first; a picture that was given stands alone.
    centred
        The mean of all texts was taken out, see `why_not_centred`.
    exact
        The head is average pooling and affine, perhaps with a norm that is held: what positions
        give adds up, and took no gradient. Behind another head attention weights, norms and slopes
        are held, see receipts, and parts that are no positions are not shown.
    preprocess, root, only_below, max_pixels
        As an `Explanation` has them.
    """

    text: str
    above: str | None
    embedding: np.ndarray
    direction: np.ndarray
    results: list[TextResult]
    centred: bool
    exact: bool
    preprocess: AnyPreprocess | None = field(default=None, repr=False)
    root: Root | None = None
    only_below: bool = False
    max_pixels: int = MAX_PIXELS

    @property
    def ids(self) -> list[str]:
        """Of the results, nearest first."""
        return [one.id for one in self.results]

    @property
    def labels(self) -> list[str | None]:
        """Of the results."""
        return [one.label for one in self.results]

    @property
    def paths(self) -> list[str]:
        """Of the results' pictures."""
        return [one.path for one in self.results]

    @property
    def similarities(self) -> np.ndarray:
        """Inner products with the text's embedding, `[n]` float32; larger is nearer."""
        return np.array([one.similarity for one in self.results], np.float32)

    @property
    def cams(self) -> list[np.ndarray | None]:
        """Each result's map, `[h w]` float32 >= 0."""
        return [one.cam for one in self.results]

    @property
    def signed_cams(self) -> list[np.ndarray | None]:
        """The same before the ReLU: what speaks against the words is negative."""
        return [one.signed_cam for one in self.results]

    @property
    def why_not_centred(self) -> str | None:
        """Why texts' mean was not taken out, a sentence without its full stop; None where it was.

        The difference of two texts needs no mean.
        """
        if self.centred:
            return None
        return (
            "this index keeps no mean embedding of texts, so maps also show what any words would; "
            "build it again (--refit) with a network that has a tower for texts"
        )

    @property
    def words(self) -> str:
        """The text in quotes, with what it is held against."""
        above = "" if self.above is None else f' above "{self.above}"'
        return f'"{self.text}"{above}'

    def __repr__(self) -> str:
        near = ", ".join(f"{one.id or 'picture'} {one.similarity:.3f}" for one in self.results[:2])
        more = ", ..." * (len(self.results) > 2)
        return f"<TextExplanation: {self.words}; {len(self.results)} pictures: {near}{more}>"

    def _draw(self, scale: Scale, title: str | None, ax: Axes | None) -> Image.Image | Axes:
        tiles, title = self.tiles(), self.words if title is None else title
        if ax is not None:
            return draw_on_axes(ax, tiles[0], title)
        ends = ("no evidence", "strongest")
        if self.above is not None:
            ends = (shorten(self.above, 40), shorten(self.text, 40))
        return panel(None, tiles, scale=scale, title=title, ends=ends)

    @property
    def _alt(self) -> str:
        return f"pictures nearest to {self.words}, with their maps"

    def tiles(self) -> list[Tile]:
        """Return the results' tiles for `render.panel`."""
        return [self._tile(one) for one in self.results]

    def _tile(self, result: TextResult) -> Tile:
        picture, extent, changed = result.image, None, False
        if picture is None:
            picture, extent, changed = self._read(result)
        elif self.preprocess is not None:
            extent = self.preprocess.extent(*picture.size)
        name, words = result.id.rpartition("/")[2], [result.label] if result.label else []
        similar = f"similarity {result.similarity:.3f}"
        if result.rival_similarity is not None:
            than = "below" if result.rather_rival else "above"
            similar += f" ({than} {result.rival_similarity:.3f})"
        words += [similar] + [CHANGED] * changed
        signed = self.above is not None
        cam = result.signed_cam if signed else result.cam
        return Tile(picture, cam, extent, name, "\n".join(words), signed=signed)

    def _shown(self) -> Sequence[TextResult]:
        return self.results

    state = Drawn._state

    def to_dict(self, *, signed: bool = True) -> Json:
        """Return plain lists and numbers, ready for JSON; `signed` with the signed maps."""
        return {
            "text": self.text,
            "above": self.above,
            "centred": self.centred,
            "why_not_centred": self.why_not_centred,
            "exact": self.exact,
            "results": [self._record(one, signed) for one in self.results],
        }

    def _record(self, result: TextResult, signed: bool) -> Json:
        maps = {"cam": result.cam} | ({"signed_cam": result.signed_cam} if signed else {})
        return {
            "id": result.id,
            "label": result.label,
            "path": result.path,
            "file": self.state(result),
            "distance": result.distance,
            "similarity": result.similarity,
            "rival_similarity": result.rival_similarity,
            **{name: None if one is None else rounded(one) for name, one in maps.items()},
        }
