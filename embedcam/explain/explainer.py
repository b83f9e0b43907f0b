"""ONLINE: why did these images come back? From one forward pass, without back-propagation."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypedDict, Unpack, overload

import numpy as np

from .._checks import number, whole
from .._files import ProcessLock
from ..errors import ImageError, IndexFormatError, InputError, short
from ..images import MAX_PIXELS, PLACE, FileState, Root, is_there, open_place, place_state
from ..index import Index
from ..index.in_memory import Rows, listed
from ..index.search import check_rival, check_wanted
from ..ops import coefficients
from ..preprocess import AnyPreprocess, Network
from .answer import Fallback, RowSource, answers, count_searched, picture_paths
from .explanation import Explanation
from .queries import Query, embed, of_features, prepare
from .snapshot import Snapshot
from .texts import Texts, explain_texts

if TYPE_CHECKING:
    from PIL import Image

    from ..onnx import OnnxNetwork
    from .queries import Features, Inputs, QueryLike
    from .text_explanation import TextExplanation

    Vector = np.ndarray[tuple[int], np.dtype[np.generic]]
    Vectors = np.ndarray[tuple[int, int], np.dtype[np.generic]]

    class _Options(TypedDict, total=False):
        size: tuple[int, int] | None
        grid: tuple[int, int] | None
        n_neighbors: int | None
        result: str | None
        above: str | None
        detail_activations: Features | None

    class _TextOptions(TypedDict, total=False):
        texts: Texts | None
        n_neighbors: int | None
        above: str | None
        image: QueryLike | None


__all__ = ["Explainer", "Explanation", "Fallback", "RowSource"]

TRUSTED_FROM = 0.5
"""Correlation with the directly computed map that nine in ten such transfers must reach."""
_LOG = logging.getLogger("embedcam")


class Explainer:
    """Explains queries against an index.

    Any number of threads may share one. In a forked child it opens its files again and leaves torch
    and FAISS one thread; it is not pickled. It logs to the logger "embedcam".

    Parameters
    ----------
    index
        Its folder; or an open index, which stays the caller's to close.
    network
        The network the index was built with; None for `explain_features` only. Another network,
        layer or preprocessing is refused.
    onnx
        The same as a file that `embedcam export` wrote, or an `OnnxNetwork`, in place of
        `network`: runs without torch.
    n_neighbors
        Images returned for a query, all of them in a smaller index.
    transfer
        "mean" or "distance", see `ops.coefficients`.
    trusted_from
        Correlation, 0 to 1, that nine in ten such maps must reach for one to count as trusted.
    fallback
        Computes the weights of a query whose transfer is not trusted, see `DirectWeights`; None
        leaves them as they were transferred.
    images
        Folder the indexed images lie in now; None takes the one they were built from.
    max_pixels
        Pictures of more pixels are not read, neither queries' nor indexed images'.
    detail
        2 shows every query to the network once more at twice the side and joins both maps: finer,
        for about four more embeddings. Search and trust stay those of the first pass.

    Raises
    ------
    NetworkMismatch, IndexFormatError, InputError
        Another network, no index or a broken one, or an argument that cannot be used.
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
        self.n_neighbors = whole("n_neighbors", n_neighbors, 1)
        self.detail = whole("detail", detail, 1, 2)
        self.max_pixels, self.fallback = max_pixels, fallback
        coefficients(np.ones(1), np.ones(1), transfer)
        self.transfer, self.trusted_from = transfer, number("trusted_from", trusted_from, 0, 1)
        if onnx is not None and network is not None:
            raise InputError("give the network, or onnx, the same as a file; not both")
        if onnx is not None:
            from ..onnx import OnnxNetwork

            network = onnx if isinstance(onnx, OnnxNetwork) else OnnxNetwork(onnx)
        self.store: RowSource | None = None
        self._lock = ProcessLock()
        self._snapshot = Snapshot.open(index, network, images)

    @classmethod
    def from_model(
        cls,
        model: str | Path,
        network: Network | None = None,
        *,
        store: RowSource | None = None,
        **options: Any,
    ) -> Self:
        """Return an explainer without an index: images are rows that a database returns.

        Parameters
        ----------
        model
            The file that `embedcam model` wrote, of the rows' generation.
        network
            As for an `Explainer`.
        store
            Searched for each query, see `embedcam.stores.open_store`; stays the caller's to close.
            None where every call is given its `rows`.
        options
            Those of an `Explainer`; no `fallback`, which needs more images than come back.

        Raises
        ------
        NetworkMismatch, IndexFormatError, InputError
            Another network, no model or a broken one, or an option that cannot be used.
        """
        if not Path(model).is_file():
            raise IndexFormatError(
                f"{model}: is no file of a model; `embedcam model INDEX -o model.embedcam` writes "
                "one, and Explainer(index) opens an index"
            )
        if options.get("fallback") is not None:
            raise InputError(
                "fallback tells a query from other images of the index, and a model has none; "
                "leave it out"
            )
        explainer = cls(model, network, **options)
        explainer.store = store
        return explainer

    def with_rows(self, rows: Rows, wanted: int | None = None) -> Self:
        """Return an explainer of exactly these rows, as `explain_rows` takes them.

        Its searches, comparisons and receipts know no other images. Of the same files and network,
        which stay this explainer's to close; it serves as long as the rows are asked about. Where
        fewer came than were `wanted`, they are all that the store has, which match may rely on.
        """
        explainer = object.__new__(type(self))
        vars(explainer).update(vars(self))
        explainer.store, explainer._snapshot = None, self._now().with_rows(rows, wanted)
        return explainer

    def of_ids(self, ids: Sequence[str]) -> Self:
        """Return an explainer whose index holds these images: itself, or their rows of the store.

        Raises InputError where the store holds none of them.
        """
        if self.store is None or not ids:
            return self
        if not (rows := listed(self.store.fetch(ids))):
            raise InputError(f"the store holds no row of {short(ids[0])}; check the id")
        return self.with_rows(rows)

    def explain_rows(
        self,
        embedding: Vector | Sequence[float],
        activations: Features,
        rows: Rows,
        **options: Unpack[_Options],
    ) -> Explanation:
        """Explain a query by rows that a database returned: NumPy in, NumPy out, no torch.

        Parameters
        ----------
        embedding, activations, options
            Of one query, as for `explain_features`; the `n_neighbors` nearest rows explain it.
        rows
            Mappings with `id`, `codes`, `scale`, `generation`, and where there are any `embedding`,
            `label`, `path`, see docs/stores; or an Arrow table. Without embeddings their `distance`
            (squared Euclidean) or `similarity` (inner product) is taken. Match needs ten of them.

        Raises
        ------
        InputError
            Rows of another generation, broken ones, or features as `explain_features` refuses.
        """
        return self.with_rows(rows).explain_features(embedding, activations, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
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

    @property
    def root(self) -> Root:
        """Folder, or address, that the indexed images' paths are joined to."""
        return self._now().root

    @property
    def only_below(self) -> bool:
        """Whether absolute paths, too, are followed only below `root`: the caller named it."""
        return self._now().only_below

    def reload(self, *, verify: bool = False) -> bool:
        """Serve the version of the index that lies there now; return whether it is another one.

        A request in flight ends with the version it began with. What cannot be served raises, and
        the old version is served on. `fallback` stays. An open index that the explainer was handed
        is left alone, and the new version is the explainer's own.

        Parameters
        ----------
        verify
            Check every file of the new version first; reads all of it.
        """
        with self._lock:
            before = self._now()
            after = before.next(verify=verify)
            if after is None:
                return False
            self._snapshot = after
        versions = (
            f"generation {one.index.manifest.generation} with {len(one.index)} images"
            for one in (after, before)
        )
        _LOG.info("%s: serving %s, after %s", after.place, *versions)
        return True

    def close(self) -> None:
        """Let go of the index, unless it was handed in; nothing can be asked any more."""
        with self._lock:
            if self._snapshot.owned:
                self._snapshot.index.close()

    def explain(
        self,
        image: QueryLike,
        *,
        n_neighbors: int | None = None,
        result: str | None = None,
        above: str | None = None,
        neighbors: Sequence[str] | None = None,
        exclude_query: bool = False,
        detail: int | None = None,
        rows: Rows | None = None,
    ) -> Explanation:
        """Explain one query.

        Parameters
        ----------
        image
            A path, bytes, a PIL image or a `uint8` array `[H W 3]`: a picture, preprocessed as the
            index says; or a float array or tensor `[3 H W]`: the network's input.
        n_neighbors
            Images returned; None takes the explainer's.
        result
            Id of one image of the index: *what in my query matched this one*. Its weights alone are
            transferred, and pictures show it first. By the default target they are mostly its
            label's.
        above
            Id of a rival of `result`: *what in my query speaks for the result rather than the
            rival*, drawn with the difference of both stored weights, each brought to length 1. Its
            trust is None, and `fallback` is not called.
        neighbors
            Ids that another search engine found, instead of searching.
        exclude_query
            Leave the file that `image` names, by whatever path, out of the results, not its copies.
        detail
            1 or 2, see `Explainer`; None takes the explainer's.
        rows
            What a database returned for this query, instead of searching; see `explain_rows`.

        Raises
        ------
        ImageError, NetworkError
            A picture that cannot be read, or of which the network makes unusable numbers.
        InputError
            An unknown or removed id, or an argument that cannot be used.
        """
        explainer = self if rows is None else self.with_rows(rows)
        return explainer.explain_batch(
            [image],
            n_neighbors=n_neighbors,
            result=result,
            above=above,
            neighbors=None if neighbors is None else [neighbors],
            exclude_query=exclude_query,
            detail=detail,
        )[0]

    def explain_batch(
        self,
        images: Sequence[QueryLike],
        *,
        n_neighbors: int | None = None,
        result: str | None = None,
        above: str | None = None,
        neighbors: Sequence[Sequence[str]] | None = None,
        exclude_query: bool = False,
        files: Sequence[str | Path | None] | None = None,
        detail: int | None = None,
        larger: Sequence[Inputs] | None = None,
    ) -> list[Explanation]:
        """Explain several queries with one forward pass.

        Parameters
        ----------
        images
            The queries.
        n_neighbors, result, above, neighbors, exclude_query, detail
            As for `explain`.
        files
            Where the queries' pictures lie, for `exclude_query` where they are not given as paths;
            None for those that lie nowhere.
        larger
            With detail 2, the network's inputs at twice the side, `[3 2H 2W]` each; None makes them
            of the pictures, and resizes inputs that came without one.
        """
        snapshot = self._now()
        if isinstance(images, str | bytes):
            raise InputError("expected a list of queries, got one; use explain()")
        wanted = self.n_neighbors
        if n_neighbors is not None or neighbors is not None:
            wanted = check_wanted(n_neighbors, neighbors, len(images), wanted)
        if above is not None:
            check_rival(result, above)
        if len(images) == 0:
            return []
        detail = self.detail if detail is None else whole("detail", detail, 1, 2)
        queries = embed(snapshot, images, self.max_pixels, detail, larger)
        if not exclude_query:
            files = None
        elif files is None:
            files = [one if isinstance(one, str | Path) else None for one in images]
        return answers(self, snapshot, queries, wanted, neighbors, result, above, files)

    def embedded(
        self,
        images: Sequence[QueryLike],
        *,
        detail: int | None = None,
        larger: Sequence[Inputs] | None = None,
    ) -> list[Query]:
        """Return what one forward pass makes of queries, as `explain_batch` takes them.

        The first half of explaining, for a service that asks a store in another thread.
        """
        detail = self.detail if detail is None else whole("detail", detail, 1, 2)
        return embed(self._now(), images, self.max_pixels, detail, larger)

    def count_searched(self, n_neighbors: int) -> int:
        """Return how many neighbors a query is explained by, of which so many are shown."""
        return count_searched(self._now(), n_neighbors)

    def explain_embedded(
        self, query: Query, n_neighbors: int, result: str | None = None, above: str | None = None
    ) -> Explanation:
        """Explain what `embedded` returned; arguments as for `explain`."""
        return answers(self, self._now(), [query], n_neighbors, None, result, above)[0]

    @overload
    def explain_text(self, text: str, **options: Unpack[_TextOptions]) -> TextExplanation: ...

    @overload
    def explain_text(
        self, text: list[str] | tuple[str, ...], **options: Unpack[_TextOptions]
    ) -> list[TextExplanation]: ...

    def explain_text(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        texts: Texts | None = None,
        n_neighbors: int | None = None,
        above: str | None = None,
        image: QueryLike | None = None,
    ) -> TextExplanation | list[TextExplanation]:
        """Explain words: which pictures are nearest to them, and where each answers them.

        Behind average pooling and an affine head maps need no gradient; behind another head each
        is one derivative of the head. Pictures that cannot be read come without a map.

        Parameters
        ----------
        text
            Words, or several to be explained each.
        texts
            Embeds them where the network has no tower for texts: a function of a list of texts, or
            their embeddings `[n D]` (of one `[D]`), that of `above` last.
        n_neighbors
            Pictures returned; None takes the explainer's.
        above
            Words that they are held against: *which places speak for the one and which for the
            other*, on the pictures nearest to `text`.
        image
            Explain this picture, as `explain` takes it, in place of those that a search finds.

        Raises
        ------
        InputError
            Words or embeddings that cannot be used, or an explainer without a network.
        NetworkError
            A network without a tower for texts, or numbers that cannot be used.
        """
        if n_neighbors is not None and image is not None:
            raise InputError("n_neighbors is of a search; leave it out, or image")
        wanted = check_wanted(n_neighbors, None, 1, self.n_neighbors)
        single = not isinstance(text, list | tuple)
        asked = list(text) if isinstance(text, list | tuple) else [text]
        if not asked:
            return []
        found = explain_texts(self, self._now(), asked, texts, wanted, above, image)
        return found[0] if single else found

    @overload
    def explain_features(
        self,
        embedding: Vector | Sequence[float],
        activations: Features,
        *,
        neighbors: Sequence[str] | None = None,
        **options: Unpack[_Options],
    ) -> Explanation: ...

    @overload
    def explain_features(
        self,
        embedding: Vectors | Sequence[Vector] | Sequence[Sequence[float]],
        activations: Features,
        *,
        neighbors: Sequence[Sequence[str]] | None = None,
        **options: Unpack[_Options],
    ) -> list[Explanation]: ...

    def explain_features(
        self,
        embedding: Any,
        activations: Features,
        *,
        size: tuple[int, int] | None = None,
        neighbors: Any = None,
        grid: tuple[int, int] | None = None,
        n_neighbors: int | None = None,
        result: str | None = None,
        above: str | None = None,
        detail_activations: Features | None = None,
    ) -> Explanation | list[Explanation]:
        """Explain queries whose features a service already has: NumPy in, NumPy out, no torch.

        Parameters
        ----------
        embedding
            `[D]` or `[B D]`; of unit length where the index is normalised.
        activations
            `[K H W]` or `[B K H W]`; tokens `[T K]` or `[B T K]` with `grid`. For an index of
            several layers a list of them, in the manifest's order.
        size
            (height, width) of the maps; None leaves them on the layer's grid.
        neighbors
            Ids another search engine found (a list of lists for a batch).
        grid
            (H, W) of token activations, class and register tokens already dropped.
        n_neighbors, result, above
            As for `explain`.
        detail_activations
            Of the same queries shown larger, on a finer grid, as `activations` but never tokens:
            both maps are joined, see `ops.joined`.

        Returns
        -------
        Explanation or list of Explanation
            A list for a batch.

        Raises
        ------
        InputError
            A wrong shape, a NaN, a number beyond 1e15, or a vector that is not of unit length.
        """
        snapshot = self._now()
        queries, single = of_features(
            snapshot, embedding, activations, detail_activations, grid, size
        )
        if size is not None and size[0] * size[1] > self.max_pixels:
            raise InputError(
                f"size = {size}: maps of more than {self.max_pixels} pixels are not drawn; give a "
                "smaller one, or Explainer(..., max_pixels=)"
            )
        named = [neighbors] if single and neighbors is not None else neighbors
        wanted = check_wanted(n_neighbors, named, len(queries), self.n_neighbors)
        check_rival(result, above)
        found = answers(self, snapshot, queries, wanted, named, result, above)
        return found[0] if single else found

    def prepared(self, image: QueryLike) -> tuple[Image.Image | None, Inputs]:
        """Return a query's picture, None of the network's own input, and the input `[3 H W]`."""
        return prepare(image, self._now().preprocess, self.max_pixels)

    def picture_file(self, id: str) -> Path | None:
        """Return the file of an indexed image's picture; None where its path is not followed.

        None, too, of a picture without a file of its own on this machine; see `picture_place`.
        """
        place = self.picture_place(id)
        return None if place is None or PLACE.match(place) else Path(place)

    def picture_place(self, id: str) -> str | None:
        """Return where an indexed image's picture lies; None where its path is not followed.

        It may be in a shard or a table, or at an address: see `embedcam.images.places`.
        """
        now = self._now()
        (path,) = picture_paths(now, now.index.select([now.index.position(id)]).paths)
        return path if now.follows(path) else None

    def file_state(self, id: str) -> FileState | None:
        """Return "same", "changed" or "missing" of an indexed image's file; None where unknown."""
        path, index = self.picture_place(id), self._now().index
        if path is None:
            return None
        return place_state(path, index.select([index.position(id)]).marks[0])

    def picture(self, id: str) -> Image.Image:
        """Return the picture of an indexed image, upright, or raise ImageError."""
        path = self.picture_place(id)
        if path is None or not is_there(path):
            missing = "the index names no picture of it below the folder of its images"
            raise ImageError(
                (f"{path}: does not exist" if path else f"{id}: {missing}")
                + "; give images= (--images), the folder the indexed images lie in now"
            )
        return open_place(path, max_pixels=self.max_pixels)

    @property
    def snapshot(self) -> Snapshot:
        """What is served now, for what asks several things of one version."""
        return self._now()

    def _now(self) -> Snapshot:
        """Return what is served now, to be asked once a request; a forked child opens it anew."""
        snapshot = self._snapshot
        if snapshot.process == os.getpid():
            return snapshot
        with self._lock:
            if self._snapshot.process != os.getpid():
                self._snapshot = self._snapshot.in_child()
            return self._snapshot
