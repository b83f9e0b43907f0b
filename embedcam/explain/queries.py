"""Queries: from pictures, or from features that a caller has, to what maps are drawn of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .._checks import as_array, check_features, check_outputs, check_sides, stacked
from ..errors import EmbedcamError, EmbeddingError, InputError, ran_out
from ..images import ImageLike, read_image
from ..ops import resize
from ..preprocess import AnyPreprocess, Preprocess

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from .snapshot import Snapshot

    Inputs = np.ndarray | Tensor
    """The network's input, `[3 H W]`."""
    QueryLike = ImageLike | Tensor
    """A picture as `read_image` takes it, or the network's input."""
    Features = np.ndarray | Sequence[np.ndarray]
    """Activations of one layer, or of each."""


class Query(NamedTuple):
    """One query with its features; `activations` are of each layer, deepest first."""

    embedding: np.ndarray  # [D]
    activations: Sequence[np.ndarray]  # [K H W] each
    finer: Sequence[np.ndarray] | None = None  # of the query shown larger
    size: tuple[int, int] | None = None  # (height, width) of its map; None for the layer's grid
    picture: Image.Image | None = None
    inputs: Inputs | None = None  # [3 H W]


def embed(
    snapshot: Snapshot,
    images: Sequence[QueryLike],
    max_pixels: int,
    detail: int = 1,
    larger: Sequence[Inputs] | None = None,
) -> list[Query]:
    """Return queries by one forward pass; `larger` are inputs at twice the side for detail 2."""
    prepared = [prepare(image, snapshot.preprocess, max_pixels) for image in images]
    alone = len(prepared) == 1
    batch = prepared[0][1][None] if alone else stacked([inputs for _, inputs in prepared])
    if detail > 1:
        snapshot.refuse_by_position()
    if larger is not None:
        if detail == 1:
            raise InputError("larger is of a finer map; give detail=2 with it, or leave it out")
        shapes, (count, channels, height, width) = [np.shape(one) for one in larger], batch.shape
        if shapes != [(channels, 2 * height, 2 * width)] * count:
            raise InputError(
                f"larger has the shapes {shapes[:3]}; expected {count} of "
                f"{[channels, 2 * height, 2 * width]}, the network's inputs at twice the side"
            )
    try:
        embeddings, activations = _forward(snapshot, batch)
        finer = None
        if detail > 1:
            if larger is None:
                larger = [larger_input(*one, snapshot.preprocess) for one in prepared]
            finer = finer_activations(snapshot, stacked(larger))
    except EmbeddingError as error:
        raise error.named([query_name(one, row) for row, one in enumerate(images)]) from None
    check_outputs(embeddings, *activations, *(finer or ()))
    size = (int(batch.shape[-2]), int(batch.shape[-1]))
    return _each(embeddings, activations, finer, size, prepared)


def _each(
    embeddings: np.ndarray,
    activations: list[np.ndarray],
    finer: list[np.ndarray] | None,
    size: tuple[int, int] | None,
    shown: Sequence[tuple[Image.Image | None, Inputs]] | None = None,
) -> list[Query]:
    """Return the queries whose features these are, `[B ...]` each."""
    queries = []
    for row, embedding in enumerate(embeddings):
        picture, inputs = (None, None) if shown is None else shown[row]
        fine = None if finer is None else [maps[row] for maps in finer]
        maps = [maps[row] for maps in activations]
        queries.append(Query(embedding, maps, fine, size, picture, inputs))
    return queries


def of_features(
    snapshot: Snapshot,
    embedding: ArrayLike,
    activations: Features,
    detail_activations: Features | None = None,
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[list[Query], bool]:
    """Return the queries of features, and whether it was one alone."""
    vectors, maps, single = _checked(snapshot, embedding, activations, grid)
    finer = None
    if detail_activations is not None:
        snapshot.refuse_by_position()
        _, finer, _ = _checked(snapshot, embedding, detail_activations, None)
        for fine, coarse in zip(finer, maps, strict=True):
            if min(np.subtract(fine.shape[2:], coarse.shape[2:])) < 0:
                raise InputError(
                    f"detail_activations lie on a grid of {list(finer[0].shape[2:])}, coarser than "
                    f"the activations' {list(maps[0].shape[2:])}; give those of the query shown "
                    "larger"
                )
    size = None if size is None else check_sides("size", size)
    return _each(vectors, maps, finer, size), single


def prepare(
    image: Any, preprocess: AnyPreprocess | None, max_pixels: int
) -> tuple[Image.Image | None, Inputs]:
    """Return the picture (None of the network's own input) and the network's input `[3 H W]`."""
    shape, kind = tuple(getattr(image, "shape", ())), getattr(image, "dtype", "")
    # NumPy takes long to put a type into words.
    floats = kind.kind == "f" if isinstance(kind, np.dtype) else "float" in str(kind)
    if floats and len(shape) == 3 and shape[2] != 3:
        return None, image
    if len(shape) > 3 or (shape and not isinstance(image, np.ndarray)):
        raise InputError(
            f"a query of shape {list(shape)} and type {kind}; give the network's input as "
            "floats [3 H W], or a picture as an array uint8 [H W 3] (several: explain_batch)"
        )
    if preprocess is None:
        raise InputError(
            "the index does not know how pictures were prepared; give the network's input as a "
            "float array [3 H W]"
        )
    picture = read_image(image, max_pixels=max_pixels)
    return picture, preprocess(picture)


def query_name(image: QueryLike, row: int) -> str:
    """Return what messages call a query: its path, else its place among the queries."""
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", "")
    return os.fspath(path) if path else f"query {row}"


def larger_input(
    picture: Image.Image | None, inputs: Inputs, preprocess: AnyPreprocess | None
) -> np.ndarray:
    """Return a query's input at twice the side, float32 `[3 2H 2W]`; resized where need be."""
    if picture is not None and isinstance(preprocess, Preprocess):
        height, width = preprocess.size
        return preprocess.sized((2 * height, 2 * width))(picture)
    height, width = inputs.shape[-2:]
    return resize(as_array(inputs).astype(np.float32, copy=False), (2 * height, 2 * width))


def finer_activations(snapshot: Snapshot, batch: Inputs) -> list[np.ndarray]:
    """Return each layer's activations `[B K 2h 2w]` of inputs at twice the side `[B 3 2H 2W]`.

    A network of one input size sees the four quarters of each; the size it refused is remembered.
    """
    height, width = batch.shape[2:]
    if (height, width) not in snapshot.refused_sizes:
        try:
            return _forward(snapshot, batch)[1]
        except EmbedcamError as error:
            # Neither is about the size: quarters would hide the picture at fault, or fail too.
            if ran_out(error) or isinstance(error, EmbeddingError):
                raise
    halves = [[slice(0, side // 2), slice(side // 2, side)] for side in (height, width)]
    quarters = [
        [_forward(snapshot, np.ascontiguousarray(batch[:, :, y, x]))[1] for x in halves[1]]
        for y in halves[0]
    ]
    snapshot.refused_sizes.add((height, width))
    return [
        np.concatenate([np.concatenate([part[layer] for part in row], 3) for row in quarters], 2)
        for layer in range(len(snapshot.layers))
    ]


def _forward(snapshot: Snapshot, batch: Inputs) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the embeddings `[B D]` and the activations `[B K H W]` of each layer, float32."""
    if snapshot.network is None:
        raise InputError(
            "this Explainer has no network, so it cannot embed a picture; give it one, or call "
            "explain_features with the embedding and the activations"
        )
    embedding, _, maps = snapshot.network.embed(batch, snapshot.layers)
    single = [one.astype(np.float32, copy=False) for one in (embedding, *maps)]
    return single[0], single[1:]


def _checked(
    snapshot: Snapshot, embedding: ArrayLike, activations: Features, grid: tuple[int, int] | None
) -> tuple[np.ndarray, list[np.ndarray], bool]:
    """Return embeddings `[B D]`, activations `[B K H W]` by layer, and whether it was one query."""
    index, layers = snapshot.index, snapshot.layers
    by_layer = [activations] if len(layers) == 1 else activations
    if not isinstance(by_layer, list | tuple) or len(by_layer) != len(layers):
        raise InputError(
            f"this index draws with the layers {', '.join(layers)}; give their "
            "activations as a list, in this order"
        )
    checked = [
        check_features(embedding, maps, index.width, channels, index.normalized, grid)
        for maps, channels in zip(by_layer, snapshot.channels, strict=True)
    ]
    return checked[0][0], [maps for _, maps, _ in checked], checked[0][2]
