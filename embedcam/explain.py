"""ONLINE: why did these images come back? From one forward pass, without back-propagation.

This file reaches neither torch nor the floors that differentiate: a network is handed in as an
object, and a service that already has embeddings and activations needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .calibration import Calibration, evidence
from .cam import cam, resize, sharpen
from .errors import ImageError, IndexFormatError, InputError
from .explanation import Explanation, may_follow
from .images import read_image
from .index import Index, Neighbors, Selection
from .preprocess import AnyPreprocess, preprocess_from_dict
from .queries import check_count, check_features, check_sides, stacked
from .transfer import coefficients

if TYPE_CHECKING:
    from PIL import Image

    from .network import EmbeddingNetwork

__all__ = ["Explainer", "Explanation", "Fallback"]

TRUSTED_FROM = 0.5
"""Expected correlation with the directly computed map from which a transfer counts as trusted."""
N_NEGATIVES = 50


class Fallback(Protocol):
    """Computes weights on a query itself, where transferred ones are not trusted."""

    def weights(
        self, inputs: Any, positives: np.ndarray, negatives: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Weights `[K]` of each layer, deepest first.

        Args:
            inputs: the network's input, `[3 H W]`.
            positives: embeddings of the neighbours, `[P D]`.
            negatives: of other images, `[Q D]`.
        """


@dataclass(frozen=True)
class _Transfer:
    """Weights `[K]` by layer; of the first one the neighbours' norms, shares and fields."""

    weights: list[np.ndarray]
    norms: np.ndarray
    shares: np.ndarray
    fields: Mapping[str, np.ndarray]


class Explainer:
    """Explains queries against an index.

    Args:
        index: an open index or its folder.
        network: the network the index was built with; None for `explain_features` only. Another
            network, layer or preprocessing is refused.
        n_neighbors: images returned for a query, all of them in a smaller index.
        transfer: "mean" or "distance", see `transfer.coefficients`.
        trusted_from: trust from which an explanation counts as trusted, 0 to 1.
        fallback: computes the weights of a query whose transfer is not trusted, see
            `fallback.DirectWeights`; None leaves them as they were transferred.
        images: folder the indexed images lie in now; None takes the one they were built from.

    Raises:
        NetworkMismatch: the network is not the index's.
        IndexFormatError: no index, or a broken one.
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        index: Index | str | Path,
        network: EmbeddingNetwork | None = None,
        *,
        n_neighbors: int = 5,
        transfer: str = "mean",
        trusted_from: float = TRUSTED_FROM,
        fallback: Fallback | None = None,
        images: str | Path | None = None,
    ) -> None:
        self.n_neighbors = check_count(n_neighbors)
        coefficients(np.ones(1), np.ones(1), transfer)
        self.transfer = transfer
        if isinstance(trusted_from, bool) or not 0 <= trusted_from <= 1:
            raise InputError(f"trusted_from = {trusted_from!r}; give a number from 0 to 1")
        self.trusted_from, self.fallback = float(trusted_from), fallback
        self.network = network
        self.index = index if isinstance(index, Index) else Index.open(index)
        try:
            manifest = self.index.manifest
            self._layers = [str(layer["name"]) for layer in manifest["layers"]]
            self._channels = [int(layer["channels"]) for layer in manifest["layers"]]
            self._encodings = [self.index.encoding(number) for number in range(len(self._layers))]
            self._calibrations = {
                name: Calibration.from_dict(values)
                for name, values in (manifest.get("trust") or {}).items()
            }
            root = images if images is not None else (manifest.get("images") or {}).get("root")
            self._root = None if root is None else Path(root)
            self._only_below = images is not None
            if network is not None:
                self._check(network)
            self.preprocess = self._preprocess()
        except BaseException:
            if self.index is not index:
                self.index.close()
            raise

    def explain(
        self,
        image: Any,
        *,
        n_neighbors: int | None = None,
        result: str | None = None,
        neighbors: Sequence[str] | None = None,
    ) -> Explanation:
        """Explain one query.

        Args:
            image: a path, bytes, a PIL image or a `uint8` array `[H W 3]`: a picture, preprocessed
                as the index says; or a float array or tensor `[3 H W]`: the network's input.
            n_neighbors: images returned; None takes the explainer's.
            result: id of one image of the index: *what in my query matched this one*. Its weights
                alone are transferred.
            neighbors: ids that another search engine found, instead of searching.

        Raises:
            ImageError: a picture that cannot be read.
            InputError: an unknown or removed id, or an argument that cannot be used.
        """
        given = None if neighbors is None else [neighbors]
        found = self.explain_batch([image], n_neighbors=n_neighbors, result=result, neighbors=given)
        return found[0]

    def explain_batch(
        self,
        images: Sequence[Any],
        *,
        n_neighbors: int | None = None,
        result: str | None = None,
        neighbors: Sequence[Sequence[str]] | None = None,
    ) -> list[Explanation]:
        """Explain several queries with one forward pass; arguments as for `explain`."""
        if self.network is None:
            raise InputError(
                "this Explainer has no network, so it cannot embed a picture; give it one, or call "
                "explain_features with the embedding and the activations"
            )
        if isinstance(images, str | bytes):
            raise InputError("expected a list of queries, got one; use explain()")
        wanted = self._wanted(n_neighbors, neighbors, len(images))
        if len(images) == 0:
            return []
        pictures, inputs = zip(*(self.prepared(image) for image in images), strict=True)
        batch = stacked(inputs)
        if len(self._layers) == 1:
            features = self.network.forward(batch)
            activations = [_numpy(features.activations)]
        else:
            features, tapped = self.network.forward_layers(batch, self._layers)
            activations = [_numpy(maps) for maps in tapped]
        height, width = inputs[0].shape[-2:]
        embeddings = _numpy(features.embedding)
        near = self._neighbors(embeddings, wanted, neighbors)
        size = (int(height), int(width))
        return [
            self._one(
                embeddings[row],
                [maps[row] for maps in activations],
                near[row],
                size,
                result,
                picture,
                inputs[row],
            )
            for row, picture in enumerate(pictures)
        ]

    def explain_features(
        self,
        embedding: np.ndarray,
        activations: np.ndarray | Sequence[np.ndarray],
        *,
        size: tuple[int, int] | None = None,
        neighbors: Sequence[str] | Sequence[Sequence[str]] | None = None,
        grid: tuple[int, int] | None = None,
        n_neighbors: int | None = None,
        result: str | None = None,
    ) -> Any:
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

        Returns:
            An `Explanation`, or a list of them for a batch.

        Raises:
            InputError: a wrong shape, a NaN, or a vector that is not of unit length.
        """
        index = self.index
        given = [activations] if len(self._layers) == 1 else activations
        if not isinstance(given, list | tuple) or len(given) != len(self._layers):
            raise InputError(
                f"this index draws with the layers {', '.join(self._layers)}; give their "
                "activations as a list, in this order"
            )
        maps = []
        for one, channels in zip(given, self._channels, strict=True):
            vectors, checked, single = check_features(
                embedding, one, index.width, channels, index.normalized, grid
            )
            maps.append(checked)
        size = None if size is None else check_sides("size", size)
        named: Any = [neighbors] if single and neighbors is not None else neighbors
        wanted = self._wanted(n_neighbors, named, len(vectors))
        near = self._neighbors(vectors, wanted, named)
        found = [
            self._one(vectors[row], [one[row] for one in maps], near[row], size, result, None)
            for row in range(len(vectors))
        ]
        return found[0] if single else found

    # Neighbours

    def _wanted(
        self, n_neighbors: int | None, neighbors: Sequence[Sequence[str]] | None, n_queries: int
    ) -> int:
        if neighbors is not None:
            if n_neighbors is not None:
                raise InputError("give n_neighbors to search, or neighbors to name them, not both")
            if isinstance(neighbors, str) or len(neighbors) != n_queries:
                raise InputError(
                    f"neighbors holds {len(neighbors)} lists of ids for {n_queries} queries; give "
                    "one list for each"
                )
        return self.n_neighbors if n_neighbors is None else check_count(n_neighbors)

    def _neighbors(
        self,
        embeddings: np.ndarray,
        n_neighbors: int,
        named: Sequence[Sequence[str]] | None,
    ) -> list[Neighbors]:
        """For each query `[B D]` its neighbours: searched, or those that were named."""
        if named is None:
            found = self.index.search(embeddings, n_neighbors)
            return [
                Neighbors(*one)
                for one in zip(found.positions, found.distances, found.similarities, strict=True)
            ]
        return [
            self._named(embedding, ids) for embedding, ids in zip(embeddings, named, strict=True)
        ]

    def _named(self, embedding: np.ndarray, ids: Sequence[str]) -> Neighbors:
        if isinstance(ids, str):
            raise InputError(f"expected a list of ids as neighbours, got the string {ids!r}")
        if len(ids) == 0:
            raise InputError("no neighbour was given; name at least one id")
        if not all(isinstance(name, str) for name in ids):
            kinds = ", ".join(sorted({type(name).__name__ for name in ids}))
            raise InputError(f"ids are strings, as in `index.ids`; given {kinds}")
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if list(ids).count(name) > 1)
            raise InputError(f"the neighbour {twice!r} was given twice; name each id once")
        positions = self.index.positions(ids)
        stored = self.index.embeddings(positions).astype(np.float64)
        difference = stored - embedding
        return Neighbors(
            positions,
            np.einsum("nd,nd->n", difference, difference).astype(np.float32),
            (stored @ embedding).astype(np.float32),
        )

    # One query

    def _one(
        self,
        embedding: np.ndarray,
        activations: Sequence[np.ndarray],
        near: Neighbors,
        size: tuple[int, int] | None,
        result: str | None,
        picture: Image.Image | None,
        inputs: Any = None,
    ) -> Explanation:
        rows = self.index.select(near.positions)
        made = self._transferred(rows, near.distances)
        norms, used, chosen = made.norms, rows, near
        if result is not None:
            chosen = self._named(embedding, [result])
            used = self.index.select(chosen.positions)
            made = self._transferred(used, chosen.distances)
        weights = made.weights
        trust = self._trust(made, chosen.distances, activations[0])
        direct = trust is not None and trust < self.trusted_from and inputs is not None
        if direct and self.fallback is not None:
            weights = list(self.fallback.weights(inputs, used.embeddings, self._others(rows)))
        direct &= self.fallback is not None
        drawn = cam(weights[0], activations[0])
        for own, finer in zip(weights[1:], activations[1:], strict=True):
            drawn = sharpen(cam(own, finer), drawn)
        if size is not None:
            drawn = resize(drawn, size)
        ids = rows.ids
        extent = None
        if picture is not None and self.preprocess is not None:
            extent = self.preprocess.extent(*picture.size)
        return Explanation(
            cam=drawn,
            weights=weights[0],
            ids=ids,
            labels=rows.labels,
            paths=[self._path(path) for path in rows.paths],
            distances=near.distances,
            similarities=near.similarities,
            neighbor_cams=rows.coarse(),
            explained=list(ids) if result is None else [result],
            transfer=self.transfer,
            extent=extent,
            image=picture,
            preprocess=self.preprocess,
            root=self._root or Path(),
            only_below=self._only_below,
            neighbor_norms=norms,
            layer_weights=dict(zip(self._layers, weights, strict=True)),
            trust=trust,
            trusted_from=self.trusted_from,
            direct=direct,
        )

    def _transferred(self, rows: Selection, distances: np.ndarray) -> _Transfer:
        """The query's weights of each layer from its neighbours'."""
        weights, lengths, shares = [], [], []
        first: Mapping[str, np.ndarray] = {}
        for number, encoding in enumerate(self._encodings):
            fields = rows.fields(number)
            first = first or fields
            unpacked = encoding.unpack(fields)
            norms = encoding.norms(unpacked)
            if not all(map(math.isfinite, norms.tolist())):
                raise self._damaged()
            share = coefficients(norms, distances, self.transfer)
            weights.append(encoding.combine(unpacked, share))
            lengths.append(norms)
            shares.append(share)
        return _Transfer(weights, lengths[0], shares[0], first)

    def _trust(
        self, made: _Transfer, distances: np.ndarray, activations: np.ndarray
    ) -> float | None:
        """Expected correlation with the directly computed map; None where nothing was calibrated.

        Args:
            made: what was transferred.
            distances: squared, of the images it was transferred from.
            activations: of the first layer, `[K H W]`.
        """
        calibration = self._calibrations.get("one" if len(distances) == 1 else "several")
        if calibration is None:
            return None
        decoded = self._encodings[0].decode(made.fields)
        raw = np.tensordot(decoded, activations, 1)
        norm = float(np.linalg.norm(made.weights[0]))
        seen = evidence(raw, made.shares, norm, distances)
        return float(calibration.trust(seen, np.min(distances)))

    def _others(self, rows: Selection) -> np.ndarray:
        """Embeddings of seeded random images that are no neighbours, nor labelled as they are."""
        live = self.index.live_positions()
        live = live[~np.isin(live, rows.positions)]
        if len(live) == 0:
            raise InputError(
                "the index holds no image but the neighbours, so nothing is left to tell the query "
                "from; ask for fewer neighbours, or leave out fallback"
            )
        drawn = np.random.default_rng(0).choice(live, min(8 * N_NEGATIVES, len(live)), False)
        near = {label for label in rows.labels if label is not None}
        apart = np.array([label not in near for label in self.index.select(drawn).labels])
        return self.index.embeddings((drawn[apart] if apart.any() else drawn)[:N_NEGATIVES])

    def _damaged(self) -> IndexFormatError:
        return IndexFormatError(
            f"{self.index.path}: stored weights hold a NaN or an infinity; `embedcam verify` says "
            "which file is damaged"
        )

    def _path(self, path: str) -> str:
        return str(self._root / path) if path and self._root is not None else path

    # What is given

    def picture(self, id: str) -> Image.Image:
        """The picture of an indexed image, upright.

        Raises:
            InputError: an unknown or removed id.
            ImageError: it has no picture, or one that cannot be read or lies outside the folder of
                the images.
        """
        file = self.picture_file(id)
        if file is None:
            raise ImageError(
                f"{id}: the index names no picture of it below the folder of its images; give "
                "images=, the folder they lie in now"
            )
        return read_image(file)

    def picture_file(self, id: str) -> Path | None:
        """Where it lies; None where the index's path is not to be followed (`may_follow`).

        Raises:
            InputError: an unknown or removed id.
        """
        (path,) = self.index.select([self.index.position(id)]).paths
        joined = self._path(path)
        followed = may_follow(joined, self._root or Path(), self._only_below)
        return Path(joined) if followed else None

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
        shape = tuple(getattr(image, "shape", ()))
        kind = str(getattr(image, "dtype", ""))
        if "float" in kind and len(shape) == 3 and shape[0] == 3 and shape[2] != 3:
            return None, image
        if len(shape) > 3 or (shape and not isinstance(image, np.ndarray)):
            raise InputError(
                f"a query of shape {list(shape)} and type {kind}; give the network's input as "
                "floats [3 H W], or a picture as an array uint8 [H W 3] (several: explain_batch)"
            )
        if self.preprocess is None:
            raise InputError(
                "the index does not know how pictures were prepared; give the network's input as a "
                "float array [3 H W]"
            )
        picture = read_image(image)
        return picture, self.preprocess(picture)

    # The network

    def _preprocess(self) -> AnyPreprocess | None:
        """The network's own, which `_check` held against the index's; else the one described."""
        if self.network is not None and self.network.preprocess is not None:
            return self.network.preprocess
        described = (self.index.manifest["network"] or {}).get("preprocess")
        return preprocess_from_dict(described) if described else None

    def _check(self, network: EmbeddingNetwork) -> None:
        if not hasattr(network, "probe_images"):
            raise InputError(
                f"network is a {type(network).__name__}; expected an EmbeddingNetwork: wrap it as "
                "EmbeddingNetwork(module, layer, preprocess=...)"
            )
        from . import identity

        stored = self.index.manifest.get("network")
        if stored is None:
            raise InputError(
                "this index was built from features alone and does not know its network, so a "
                "network cannot be checked against it; use explain_features, or build it again "
                "naming the network"
            )
        identity.check(identity.Identity.from_dict(stored, self.index.probe()), network)


def _numpy(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.cpu().numpy()
    return found.astype(np.float32, copy=False)
