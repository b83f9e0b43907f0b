"""ONLINE: why did these images come back? From one forward pass, without back-propagation.

This file reaches neither torch nor the floors that differentiate: a network is handed in as an
object, and a service that already has embeddings and activations needs none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from .._checks import check_features, check_outputs, check_sides, stacked, whole
from .._files import ProcessLock
from ..errors import EmbeddingError, ImageError, InputError
from ..images import MAX_PIXELS, FileState, file_state, read_image
from ..index import Index
from ..index.calibration import TEN
from ..index.search import check_rival, check_wanted, find_neighbors
from ..ops import coefficients
from ..preprocess import AnyPreprocess, Network
from .answer import Choices, Fallback, Query, answer, without_file
from .explanation import Explanation, may_follow
from .finer import Finer, check_detail, check_larger, larger_input, refuse_by_position
from .opened import Given, Opened, from_onnx, prepared, query_name

if TYPE_CHECKING:
    from PIL import Image

    from ..onnx import OnnxNetwork

    Vector = np.ndarray[tuple[int], np.dtype[Any]]
    Vectors = np.ndarray[tuple[int, int], np.dtype[Any]]

__all__ = ["Explainer", "Explanation", "Fallback"]

TRUSTED_FROM = 0.5
"""Correlation with the directly computed map that nine in ten such transfers must reach."""
_LOG = logging.getLogger("embedcam")


class Explainer:
    """Explains queries against an index.

    Any number of threads may share one; the answers are those of one thread. In a forked child it
    opens its files again and leaves torch and FAISS one thread there, for their others stay in the
    parent; start worker processes with "spawn" where you can, each with an `Explainer` of its own:
    one is not pickled. It logs to the logger "embedcam".

    Args:
        index: its folder; or an open index, which stays the caller's to close.
        network: the network the index was built with; None for `explain_features` only. Another
            network, layer or preprocessing is refused.
        onnx: the same as a file that `embedcam export` wrote, or an `OnnxNetwork`, in place of
            `network`: runs without torch.
        n_neighbors: images returned for a query, all of them in a smaller index.
        transfer: "mean" or "distance", see `transfer.coefficients`.
        trusted_from: correlation that nine in ten such maps must reach for one to count as
            trusted, 0 to 1.
        fallback: computes the weights of a query whose transfer is not trusted, see
            `fallback.DirectWeights`; None leaves them as they were transferred.
        images: folder the indexed images lie in now; None takes the one they were built from.
        max_pixels: pictures of more pixels are not read, neither queries' nor indexed images'.
        detail: 2 shows every query to the network once more at twice the side and joins both maps:
            finer, and surer of two objects, for about four more embeddings and four times the
            activations' memory. Search and trust stay those of the first pass.

    Raises:
        NetworkMismatch: the network is not the index's.
        IndexFormatError: no index, or a broken one.
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        index: Index | str | Path,
        network: Network | None = None,
        *,
        onnx: str | Path | OnnxNetwork | None = None,
        n_neighbors: int = 5,
        transfer: str = "mean",
        trusted_from: float = TRUSTED_FROM,
        fallback: Fallback | None = None,
        images: str | Path | None = None,
        max_pixels: int = MAX_PIXELS,
        detail: int = 1,
    ) -> None:
        self.n_neighbors, self.detail = whole("n_neighbors", n_neighbors, 1), check_detail(detail)
        self.max_pixels = max_pixels
        coefficients(np.ones(1), np.ones(1), transfer)
        self.transfer = transfer
        if isinstance(trusted_from, bool) or not 0 <= trusted_from <= 1:
            raise InputError(f"trusted_from = {trusted_from!r}; give a number from 0 to 1")
        self.trusted_from, self.fallback = float(trusted_from), fallback
        if onnx is not None:
            if network is not None:
                raise InputError("give the network, or onnx, the same as a file; not both")
            network = from_onnx(onnx)
        self._given = Given(network, None if images is None else Path(images))
        self._lock, self._finer = ProcessLock(), Finer()
        self._opened = Opened.first(index, self._given)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise InputError(
            "an Explainer is not pickled, for its index is mapped into this process; give a worker "
            "the index's path and make one there: Explainer(path, ...)"
        )

    @property
    def index(self) -> Index:
        """The open index; another one after `reload`, and in a forked child."""
        return self._now().index

    @property
    def network(self) -> Network | None:
        """What embeds pictures, held against the index; None where features are given."""
        return self._now().network

    @property
    def preprocess(self) -> AnyPreprocess | None:
        """How pictures become inputs: the network's own, or as the index describes it."""
        return self._now().preprocess

    def reload(self, *, verify: bool = False) -> bool:
        """Serve the version of the index that lies at its path now.

        In one step: a request in flight ends with the version it began with, whose files are let go
        with the last of them. The network is held against the new version. `fallback` stays; its
        recipe should be that of the new one. An open index that the explainer was handed is left
        alone, and the new version is the explainer's own.

        Args:
            verify: check every file of the new version first; reads all of it.

        Returns:
            Whether another version is served now.

        Raises:
            IndexFormatError, NetworkMismatch, InputError: the new version cannot be served; the
                old one is served on.
        """
        with self._lock:
            before = self._now()
            after = before.next(self._given, verify=verify)
            if after is None:
                return False
            self._opened = after
        told = (after.place, after.describe(), before.describe())
        _LOG.info("%s: serving %s, after %s", *told)
        return True

    def close(self) -> None:
        """Let go of the index, unless it was handed in; nothing can be asked any more."""
        with self._lock:
            self._opened.close()

    def explain(
        self,
        image: Any,
        *,
        n_neighbors: int | None = None,
        result: str | None = None,
        above: str | None = None,
        neighbors: Sequence[str] | None = None,
        exclude_query: bool = False,
        detail: int | None = None,
    ) -> Explanation:
        """Explain one query.

        Args:
            image: a path, bytes, a PIL image or a `uint8` array `[H W 3]`: a picture, preprocessed
                as the index says; or a float array or tensor `[3 H W]`: the network's input.
            n_neighbors: images returned; None takes the explainer's.
            result: id of one image of the index: *what in my query matched this one*. Its weights
                alone are transferred, and pictures show it first. By the default target they are
                mostly its label's: what speaks for the label.
            above: id of a rival of `result`: *what in my query speaks for the result rather than
                the rival*. The map is drawn with the difference of both stored weights, each
                brought to length 1; it is empty where these are equal, as those of one label may
                be. Its trust is None, for none is calibrated, and `fallback` is not called.
            neighbors: ids that another search engine found, instead of searching.
            exclude_query: where the index holds the file that `image` names, leave it out of the
                results. The same file alone, by whatever path: copies of it still come back, and
                where the index does not hold it nothing is left out.
            detail: 1 or 2, see `Explainer`; None takes the explainer's.

        Raises:
            ImageError: a picture that cannot be read.
            InputError: an unknown or removed id, a rival without a result or that is the result
                itself, or an argument that cannot be used.
            NetworkError: the network makes numbers of it that cannot be computed with.
        """
        given = None if neighbors is None else [neighbors]
        found = self.explain_batch(
            [image],
            n_neighbors=n_neighbors,
            result=result,
            above=above,
            neighbors=given,
            exclude_query=exclude_query,
            detail=detail,
        )
        return found[0]

    def explain_batch(
        self,
        images: Sequence[Any],
        *,
        n_neighbors: int | None = None,
        result: str | None = None,
        above: str | None = None,
        neighbors: Sequence[Sequence[str]] | None = None,
        exclude_query: bool = False,
        files: Sequence[str | Path | None] | None = None,
        detail: int | None = None,
        larger: Sequence[Any] | None = None,
    ) -> list[Explanation]:
        """Explain several queries with one forward pass.

        Args:
            images: the queries.
            n_neighbors, result, above, neighbors, exclude_query, detail: as for `explain`.
            larger: with detail 2, the network's inputs at twice the side, `[3 2H 2W]` each, where
                the queries are the network's inputs; None makes them of the pictures, and resizes
                inputs that came without one.
            files: where the queries' pictures lie, for `exclude_query` where they are not given as
                paths; None for those that lie nowhere.
        """
        opened = self._now()
        network = opened.network
        if network is None:
            raise InputError(
                "this Explainer has no network, so it cannot embed a picture; give it one, or call "
                "explain_features with the embedding and the activations"
            )
        if isinstance(images, str | bytes):
            raise InputError("expected a list of queries, got one; use explain()")
        wanted = check_wanted(n_neighbors, neighbors, len(images), self.n_neighbors)
        check_rival(result, above)
        if len(images) == 0:
            return []
        pictures, inputs = zip(
            *(prepared(image, opened.preprocess, self.max_pixels) for image in images), strict=True
        )
        detail = self.detail if detail is None else check_detail(detail)
        if detail > 1:
            refuse_by_position(opened)
        batch = stacked(inputs)
        if larger is not None:
            check_larger(larger, batch.shape, detail)
        try:
            embedded = network.embed(batch, opened.layers)
            embeddings, *activations = map(_single, (embedded.embedding, *embedded.activations))
            finer = None
            if detail > 1:
                if larger is None:
                    pairs = zip(pictures, inputs, strict=True)
                    larger = [larger_input(*pair, opened.preprocess) for pair in pairs]
                finer = self._finer.activations(network, opened.layers, stacked(larger))
        except EmbeddingError as error:
            raise error.named([query_name(one, row) for row, one in enumerate(images)]) from None
        height, width = inputs[0].shape[-2:]
        size = int(height), int(width)
        check_outputs(embeddings, *activations, *(finer or ()))
        looked = max(wanted, TEN) if opened.matches else wanted
        near = find_neighbors(opened.index, embeddings, looked + exclude_query, neighbors)
        choices = self._choices()
        if exclude_query:
            most = looked if neighbors is None else len(opened.index)
            named = [_file_of(image) for image in images] if files is None else files
            near = [
                without_file(opened, choices, one, file, most)
                for one, file in zip(near, named, strict=True)
            ]
        found = []
        for row, (picture, one) in enumerate(zip(pictures, inputs, strict=True)):
            own = [maps[row] for maps in activations]
            fine = None if finer is None else [maps[row] for maps in finer]
            query = Query(embeddings[row], own, size, picture, one, fine)
            shown = wanted if neighbors is None else None
            found.append(answer(opened, choices, query, near[row], result, above, shown))
        return found

    @overload
    def explain_features(
        self,
        embedding: Vector | Sequence[float],
        activations: np.ndarray | Sequence[np.ndarray],
        *,
        size: tuple[int, int] | None = None,
        neighbors: Sequence[str] | None = None,
        grid: tuple[int, int] | None = None,
        n_neighbors: int | None = None,
        result: str | None = None,
        above: str | None = None,
        detail_activations: np.ndarray | Sequence[np.ndarray] | None = None,
    ) -> Explanation: ...

    @overload
    def explain_features(
        self,
        embedding: Vectors | Sequence[Vector] | Sequence[Sequence[float]],
        activations: np.ndarray | Sequence[np.ndarray],
        *,
        size: tuple[int, int] | None = None,
        neighbors: Sequence[Sequence[str]] | None = None,
        grid: tuple[int, int] | None = None,
        n_neighbors: int | None = None,
        result: str | None = None,
        above: str | None = None,
        detail_activations: np.ndarray | Sequence[np.ndarray] | None = None,
    ) -> list[Explanation]: ...

    def explain_features(
        self,
        embedding: Any,
        activations: np.ndarray | Sequence[np.ndarray],
        *,
        size: tuple[int, int] | None = None,
        neighbors: Sequence[str] | Sequence[Sequence[str]] | None = None,
        grid: tuple[int, int] | None = None,
        n_neighbors: int | None = None,
        result: str | None = None,
        above: str | None = None,
        detail_activations: np.ndarray | Sequence[np.ndarray] | None = None,
    ) -> Explanation | list[Explanation]:
        """Explain queries whose features a service already has: NumPy in, NumPy out, no torch.

        Args:
            embedding: `[D]` or `[B D]`; of unit length where the index is normalised.
            activations: `[K H W]` or `[B K H W]`; tokens `[T K]` or `[B T K]` with `grid`. For an
                index of several layers a list of them, in the manifest's order.
            size: (height, width) of the maps; None leaves them on the layer's grid.
            neighbors: ids another search engine found (a list of lists for a batch).
            grid: (H, W) of token activations, class and register tokens already dropped.
            n_neighbors: images returned; None takes the explainer's.
            result: id of the one image whose weights are to be transferred.
            detail_activations: of the same queries shown larger, on a finer grid, as `activations`
                but never tokens: both maps are joined, see `cam.joined`.
            above: id of its rival, whose weights are subtracted, as for `explain`.

        Returns:
            An `Explanation`, or a list of them for a batch. Type checkers know which by the array's
            number of axes, and take it for `Any` where they do not know that.

        Raises:
            InputError: a wrong shape, a NaN, a number beyond `queries.LARGEST`, or a vector that is
                not of unit length.
        """
        opened = self._now()
        index = opened.index
        vectors, maps, single = _checked(opened, embedding, activations, grid)
        finer = None
        if detail_activations is not None:
            refuse_by_position(opened)
            _, finer, _ = _checked(opened, embedding, detail_activations, None)
            if any(min(np.subtract(fine.shape[2:], own.shape[2:])) < 0
                   for fine, own in zip(finer, maps, strict=True)):  # fmt: skip
                raise InputError(
                    f"detail_activations lie on a grid of {list(finer[0].shape[2:])}, coarser than "
                    f"the activations' {list(maps[0].shape[2:])}; give those of the query shown "
                    "larger"
                )
        size = None if size is None else check_sides("size", size)
        if size is not None and size[0] * size[1] > self.max_pixels:
            raise InputError(
                f"size = {size}: maps of more than {self.max_pixels} pixels are not drawn; give a "
                "smaller one, or Explainer(..., max_pixels=)"
            )
        named: Any = [neighbors] if single and neighbors is not None else neighbors
        wanted = check_wanted(n_neighbors, named, len(vectors), self.n_neighbors)
        check_rival(result, above)
        looked = max(wanted, TEN) if opened.matches else wanted
        near = find_neighbors(index, vectors, looked, named)
        choices, found = self._choices(), []
        for row, vector in enumerate(vectors):
            fine = None if finer is None else [one[row] for one in finer]
            query = Query(vector, [one[row] for one in maps], size, finer=fine)
            shown = wanted if named is None else None
            found.append(answer(opened, choices, query, near[row], result, above, shown))
        return found[0] if single else found

    # Pictures

    def prepared(self, image: Any) -> tuple[Image.Image | None, Any]:
        """A query as the network takes it.

        Args:
            image: as `explain` takes it.

        Returns:
            The picture, upright (None where the network's own input was given), and the network's
            input `[3 H W]`.

        Raises:
            ImageError, InputError: it cannot be read, or is neither.
        """
        return prepared(image, self._now().preprocess, self.max_pixels)

    def picture_file(self, id: str) -> Path | None:
        """Where an indexed image's picture lies; None where the index's path is not to be followed.

        See `explanation.may_follow`: a path that climbs out of the images' folder is not.

        Raises:
            InputError: an unknown or removed id.
        """
        opened = self._now()
        (path,) = opened.index.select([opened.index.position(id)]).paths
        joined = str(opened.root / path) if path and opened.root is not None else path
        followed = may_follow(joined, opened.root or Path(), self._given.images is not None)
        return Path(joined) if followed else None

    def file_state(self, id: str) -> FileState | None:
        """What became of an indexed image's file since the build.

        Returns:
            "same", "changed" or "missing"; None where the index keeps no mark of it, or its path is
            not to be followed (`picture_file`).

        Raises:
            InputError: an unknown or removed id.
        """
        path, index = self.picture_file(id), self._now().index
        return (
            None if path is None else file_state(path, index.select([index.position(id)]).marks[0])
        )

    def picture(self, id: str) -> Image.Image:
        """The picture of an indexed image, upright.

        Raises:
            InputError: an unknown or removed id.
            ImageError: it has no picture, or one that cannot be read or lies outside the folder of
                the images.
        """
        path = self.picture_file(id)
        if path is None:
            raise ImageError(
                f"{id}: the index names no picture of it below the folder of its images; give "
                "images=, the folder they lie in now"
            )
        if not path.exists():
            raise ImageError(
                f"{path}: does not exist; give images= (--images), the folder the indexed images "
                "lie in now"
            )
        return read_image(path, max_pixels=self.max_pixels)

    # Inside

    def _now(self) -> Opened:
        """What is served now, to be asked once a request; a forked child opens it anew."""
        opened = self._opened
        if opened.process == os.getpid():
            return opened
        with self._lock:
            if self._opened.process != os.getpid():
                self._opened = self._opened.in_child(self._given)
            return self._opened

    def _choices(self) -> Choices:
        only_below = self._given.images is not None
        return Choices(self.transfer, self.trusted_from, self.fallback, only_below, self.max_pixels)


def _checked(
    opened: Opened, embedding: Any, activations: Any, grid: tuple[int, int] | None
) -> tuple[np.ndarray, list[np.ndarray], bool]:
    """Embeddings `[B D]`, activations `[B K H W]` by layer, and whether it was one query."""
    index, layers = opened.index, opened.layers
    given = [activations] if len(layers) == 1 else activations
    if not isinstance(given, list | tuple) or len(given) != len(layers):
        raise InputError(
            f"this index draws with the layers {', '.join(layers)}; give their "
            "activations as a list, in this order"
        )
    maps = []
    for one, channels in zip(given, opened.channels, strict=True):
        vectors, checked, single = check_features(
            embedding, one, index.width, channels, index.normalized, grid
        )
        maps.append(checked)
    return vectors, maps, single


def _file_of(image: Any) -> str | Path | None:
    return image if isinstance(image, str | Path) else None


def _single(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False)
