"""ONLINE: why did these images come back? From one forward pass, without back-propagation.

This file reaches neither torch nor the floors that differentiate: a network is handed in as an
object, and a service that already has embeddings and activations needs none.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .cam import cam, resize
from .errors import EmbedcamError, InputError
from .images import read_image
from .index import Index
from .preprocess import CustomPreprocess, Preprocess, preprocess_from_dict
from .transfer import coefficients

if TYPE_CHECKING:
    from PIL import Image

    from .network import EmbeddingNetwork

UNIT_TOLERANCE = 1e-3
"""How far from 1 the length of a normalised embedding may be."""


@dataclass(frozen=True)
class Explanation:
    """A query, its nearest images, and where each of them shows why.

    Attributes:
        cam: the query's map, `[H W]` float32 >= 0, at the size asked for.
        weights: the transferred channel weights, `[K]`.
        ids, labels, paths: of the neighbours, nearest first.
        distances: squared Euclidean, `[n]`; smaller is nearer.
        similarities: inner products, `[n]`; larger is nearer.
        neighbor_cams: each neighbour's own map, `[n h w]`, or None where the index keeps none.
        explained: ids of the neighbours whose weights were transferred.
        transfer: "mean" or "distance".
        extent: the rectangle of the query picture that the map covers, (x0, y0, x1, y1) in pixels
            of the upright picture, or None where the picture is unknown.
        image: the query picture, or None.
    """

    cam: np.ndarray
    weights: np.ndarray
    ids: list[str]
    labels: list[str | None]
    paths: list[str]
    distances: np.ndarray
    similarities: np.ndarray
    neighbor_cams: np.ndarray | None
    explained: list[str]
    transfer: str
    extent: tuple[float, float, float, float] | None = None
    image: Image.Image | None = field(default=None, repr=False)
    preprocess: Preprocess | CustomPreprocess | None = field(default=None, repr=False)

    def plot(
        self, *, scale: Literal["joint", "each"] = "joint", title: str | None = None
    ) -> Image.Image:
        """The query and its results, each with its map, as one picture.

        Args:
            scale: "joint" draws all results on one colour scale, so that weak evidence does not
                look strong; "each" gives every result its own.
            title: heading.
        """
        from . import render

        query, results = self.tiles()
        return render.panel(query, results, scale=scale, title=title)

    def save(
        self,
        path: str | Path,
        *,
        scale: Literal["joint", "each"] = "joint",
        title: str | None = None,
    ) -> Path:
        """Write the picture of `plot`; the file's ending chooses the format."""
        path = Path(path)
        try:
            self.plot(scale=scale, title=title).save(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: the picture cannot be written ({error})") from error
        return path

    def tiles(self) -> tuple[Any, list[Any]]:
        """The query's and the results' tiles for `render.panel` and `render.page`."""
        from . import render

        query = render.Tile(self.image, self.cam, self.extent, "query", self._transfer_note())
        results = []
        for place, name in enumerate(self.ids):
            picture = self._neighbor_image(place)
            own = None if self.neighbor_cams is None else self.neighbor_cams[place]
            extent = None
            if picture is not None and self.preprocess is not None:
                extent = self.preprocess.extent(*picture.size)
            label = self.labels[place]
            distance = f"distance {self.distances[place]:.3f}"
            below = distance if label is None else f"{label}\n{distance}"
            results.append(render.Tile(picture, own, extent, name, below))
        return query, results

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        neighbors = []
        for place, name in enumerate(self.ids):
            own = None if self.neighbor_cams is None else self.neighbor_cams[place].tolist()
            neighbors.append(
                {
                    "id": name,
                    "label": self.labels[place],
                    "path": self.paths[place],
                    "distance": float(self.distances[place]),
                    "similarity": float(self.similarities[place]),
                    "cam": own,
                }
            )
        return {
            "cam": self.cam.tolist(),
            "extent": None if self.extent is None else list(self.extent),
            "transfer": self.transfer,
            "explained": self.explained,
            "neighbors": neighbors,
        }

    def _repr_html_(self) -> str:
        import base64

        held = io.BytesIO()
        self.plot().save(held, "PNG")
        data = base64.b64encode(held.getvalue()).decode()
        names = ", ".join(self.ids)
        alt = f'alt="query and its nearest images: {_escaped(names)}"'
        return f'<img {alt} src="data:image/png;base64,{data}">'

    def _transfer_note(self) -> str:
        if len(self.explained) == 1:
            return f"what here matched {self.explained[0]}"
        return f"weights of {len(self.explained)} neighbours, {self.transfer}"

    def _neighbor_image(self, place: int) -> Image.Image | None:
        if not self.paths[place]:
            return None
        try:
            return read_image(self.paths[place])
        except EmbedcamError:
            return None


class Explainer:
    """Explains queries against an index.

    Args:
        index: an open index or its folder.
        network: the network the index was built with; None for `explain_features` only. Another
            network, layer or preprocessing is refused.
        n_neighbors: images returned for a query.
        transfer: "mean" or "distance", see `transfer.coefficients`.
        images: folder the indexed images lie in now; None takes the one they were built from.

    Raises:
        NetworkMismatch: the network is not the index's.
    """

    def __init__(
        self,
        index: Index | str | Path,
        network: EmbeddingNetwork | None = None,
        *,
        n_neighbors: int = 5,
        transfer: str = "mean",
        images: str | Path | None = None,
    ) -> None:
        self.index = index if isinstance(index, Index) else Index.open(index)
        self.network = network
        self.n_neighbors = _count(n_neighbors)
        coefficients(np.ones(1), np.ones(1), transfer)
        self.transfer = transfer
        manifest = self.index.manifest
        self._normalized = bool(manifest["embedding"]["normalized"])
        self._width = int(manifest["embedding"]["width"])
        self._channels = int(manifest["layers"][0]["channels"])
        self._encoding = self.index.encoding()
        root = images if images is not None else (manifest.get("images") or {}).get("root")
        self._root = None if root is None else Path(root)
        self.preprocess = self._preprocess()
        if network is not None:
            self._check(network)

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
            result: id of one result: *what in my query matched this one*.
            neighbors: ids that another search engine found, instead of searching.
        """
        given = None if neighbors is None else [neighbors]
        return self.explain_batch([image], n_neighbors=n_neighbors, result=result, neighbors=given)[
            0
        ]

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
        if len(images) == 0:
            return []
        pictures, inputs = zip(*(self._prepared(image) for image in images), strict=True)
        if len({tuple(one.shape) for one in inputs}) > 1:
            shapes = sorted({str(list(one.shape)) for one in inputs})
            raise InputError(f"inputs of one batch must have one shape, got {', '.join(shapes)}")
        features = self.network.forward(_stacked(inputs))
        size = tuple(inputs[0].shape[-2:])
        return self._explained(
            _numpy(features.embedding),
            _numpy(features.activations),
            (int(size[0]), int(size[1])),
            n_neighbors,
            result,
            neighbors,
            list(pictures),
        )

    def explain_features(
        self,
        embedding: np.ndarray,
        activations: np.ndarray,
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
            activations: `[K H W]` or `[B K H W]`; tokens `[T K]` or `[B T K]` with `grid`.
            size: (height, width) of the maps; None leaves them on the layer's grid.
            neighbors: ids another search engine found (a list of lists for a batch).
            grid: (H, W) of token activations, class and register tokens already dropped.
            n_neighbors: images returned; None takes the explainer's.
            result: id of the one result to explain.

        Returns:
            An `Explanation`, or a list of them for a batch.

        Raises:
            InputError: a wrong shape, a NaN, or a vector that is not of unit length.
        """
        single = np.ndim(embedding) == 1
        vectors, maps = self._checked(embedding, activations, grid, single)
        if neighbors is not None and single:
            neighbors = [neighbors]  # type: ignore[list-item]
        found = self._explained(vectors, maps, size, n_neighbors, result, neighbors, None)
        return found[0] if single else found

    def _explained(
        self,
        embeddings: np.ndarray,
        activations: np.ndarray,
        size: tuple[int, int] | None,
        n_neighbors: int | None,
        result: str | None,
        neighbors: Any,
        pictures: list[Any] | None,
    ) -> list[Explanation]:
        wanted = self.n_neighbors if n_neighbors is None else _count(n_neighbors)
        if neighbors is None:
            found = self.index.search(embeddings, wanted)
            places, distances, similarities = found.positions, found.distances, found.similarities
        explanations = []
        for row, embedding in enumerate(embeddings):
            if neighbors is not None:
                mine = self.index.positions(neighbors[row])
                near, inner = self._measured(embedding, mine)
            else:
                mine, near, inner = places[row], distances[row], similarities[row]
            picture = None if pictures is None else pictures[row]
            explanations.append(
                self._one(embedding, activations[row], mine, near, inner, size, result, picture)
            )
        return explanations

    def _one(
        self,
        embedding: np.ndarray,
        activations: np.ndarray,
        positions: np.ndarray,
        distances: np.ndarray,
        similarities: np.ndarray,
        size: tuple[int, int] | None,
        result: str | None,
        picture: Image.Image | None,
    ) -> Explanation:
        if len(positions) == 0:
            raise InputError("no neighbour was given; name at least one id")
        sources, away = positions, distances
        if result is not None:
            sources = self.index.positions([result])
            away, _ = self._measured(embedding, sources)
        rows = self.index.rows(sources)
        # One neighbour is taken unscaled: its norm is not asked for.
        alone = len(sources) == 1
        norms = np.ones(1) if alone else self._encoding.norms(rows)
        weights = self._encoding.combine(rows, coefficients(norms, away, self.transfer))
        drawn = cam(weights, activations)
        if size is not None:
            drawn = resize(drawn, size)
        extent = None
        if picture is not None and self.preprocess is not None:
            extent = self.preprocess.extent(*picture.size)
        return Explanation(
            cam=drawn,
            weights=weights,
            ids=self.index.ids[positions],
            labels=self.index.labels[positions],
            paths=[self._path(path) for path in self.index.paths[positions]],
            distances=distances,
            similarities=similarities,
            neighbor_cams=self.index.coarse(positions),
            explained=self.index.ids[sources],
            transfer=self.transfer,
            extent=extent,
            image=picture,
            preprocess=self.preprocess,
        )

    def _preprocess(self) -> Preprocess | CustomPreprocess | None:
        """The network's own, which `_check` holds against the index's; else the one described."""
        if self.network is not None and self.network.preprocess is not None:
            return self.network.preprocess
        described = (self.index.manifest["network"] or {}).get("preprocess")
        return preprocess_from_dict(described) if described else None

    def _measured(
        self, embedding: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances and inner products of one query to the images at positions `[n]`."""
        stored = self.index.embeddings(positions)
        difference = stored - embedding
        return np.einsum("nd,nd->n", difference, difference), stored @ embedding

    def _path(self, path: str) -> str:
        if not path or self._root is None:
            return path
        return str(self._root / path)

    def _prepared(self, image: Any) -> tuple[Image.Image | None, Any]:
        """The picture (None where the network's own input was given) and the input `[3 H W]`."""
        shape = tuple(getattr(image, "shape", ()))
        floating = "float" in str(getattr(image, "dtype", ""))
        if floating and len(shape) == 3 and shape[0] == 3 and shape[2] != 3:
            return None, image
        if self.preprocess is None:
            raise InputError(
                "the index does not know how pictures were prepared; give the network's input as a "
                "float array [3 H W]"
            )
        picture = read_image(image)
        return picture, self.preprocess(picture)

    def _checked(
        self, embedding: Any, activations: Any, grid: tuple[int, int] | None, single: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        vectors = np.asarray(embedding, np.float32)
        maps = np.asarray(activations, np.float32)
        if single:
            vectors, maps = vectors[None], maps[None]
        if vectors.ndim != 2 or vectors.shape[1] != self._width:
            raise InputError(
                f"the embedding has shape {list(np.shape(embedding))}; this index holds "
                f"{self._width} numbers an image, so give [{self._width}] or [B {self._width}]"
            )
        maps = self._on_grid(maps, grid)
        if len(maps) != len(vectors):
            raise InputError(f"{len(vectors)} embeddings came with {len(maps)} activations")
        for name, values in (("embedding", vectors), ("activations", maps)):
            if not np.isfinite(values).all():
                bad = int(np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))[0])
                raise InputError(f"the {name} of query {bad} holds a NaN or an infinity")
        if self._normalized:
            lengths = np.linalg.norm(vectors, axis=1)
            worst = int(np.abs(lengths - 1).argmax()) if len(lengths) else 0
            if len(lengths) and abs(lengths[worst] - 1) > UNIT_TOLERANCE:
                raise InputError(
                    f"the embedding of query {worst} has length {lengths[worst]:.4g}; this index "
                    "holds vectors of length 1: divide it by its L2 norm first"
                )
        return vectors, maps

    def _on_grid(self, maps: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray:
        if grid is not None and maps.ndim == 3:
            n, tokens, channels = maps.shape
            if tokens != grid[0] * grid[1]:
                raise InputError(
                    f"{tokens} tokens do not fill a grid of {grid[0]} x {grid[1]}; drop class and "
                    "register tokens first"
                )
            maps = maps.reshape(n, *grid, channels).transpose(0, 3, 1, 2)
        if maps.ndim != 4 or maps.shape[1] != self._channels:
            raise InputError(
                f"the activations have shape {list(maps.shape[1:])} an image; this index needs "
                f"[{self._channels} H W], or tokens [T {self._channels}] with grid=(H, W)"
            )
        return maps

    def _check(self, network: EmbeddingNetwork) -> None:
        from . import identity

        stored = self.index.manifest.get("network")
        if stored is None:
            raise InputError(
                "this index was built from features alone and does not know its network, so a "
                "network cannot be checked against it; use explain_features, or build it again "
                "naming the network"
            )
        identity.check(identity.Identity.from_dict(stored, self.index.probe()), network)


def _count(n_neighbors: int) -> int:
    if int(n_neighbors) != n_neighbors or n_neighbors < 1:
        raise InputError(f"n_neighbors = {n_neighbors}; give a whole number of at least 1")
    return int(n_neighbors)


def _numpy(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def _stacked(inputs: Sequence[Any]) -> Any:
    """Inputs `[3 H W]` as one batch in their own library; a batch of one is not copied."""
    if len(inputs) == 1:
        return inputs[0][None]
    return np.stack([_numpy(one) for one in inputs])


def _escaped(text: str) -> str:
    import html

    return html.escape(text, quote=True)
