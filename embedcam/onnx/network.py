"""`OnnxNetwork`: a network in an ONNX file, as an `Explainer` takes it."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from ..errors import EmbeddingError, InputError, NetworkError, NetworkMismatch
from ..index.identity import Identity, compare
from ..preprocess import (
    AnyPreprocess,
    Embedded,
    HeadMatrix,
    from_transform,
    preprocess_from_dict,
)
from ..preprocess.probe import probe_inputs
from .described import Described, Head
from .session import PROBE_SECONDS, PROVIDERS, Session

_ANY_SIDE = 224
ACTIVATIONS, EMBEDDING = "activations", "embedding"


class OnnxNetwork:
    """A network that `embedcam export` wrote, or any ONNX file with activations and an embedding.

    Concurrent calls are safe. A child made by fork opens the file again, on one thread.

    `described` is what the file says of itself, None in another program's; `layer`, `normalize`,
    `name` and `head` follow from it; `layers` are those whose activations it gives, the network's
    own first.

    Parameters
    ----------
    path
        Of the ONNX file. Its outputs are `activations` `[B K H W]` and `embedding` `[B D]`; in
        another program's file the only ones of four and of two dimensions are taken.
    preprocess
        Picture -> input `[3 H W]`, where the file does not say or names a transform of the caller's
        own; an index's is taken for another program's file without one.
    threads
        That one run computes on; None leaves it to ONNX Runtime, which takes every core.
    providers
        Of ONNX Runtime, the preferred one first.

    Raises
    ------
    InputError
        A preprocess, threads or providers that cannot be used.
    NetworkError
        onnxruntime is missing, or the file cannot be used.
    """

    differentiable: ClassVar[bool] = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        preprocess: Any = None,
        threads: int | None = None,
        providers: Sequence[str] = PROVIDERS,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"expected the path of an ONNX file, given {type(path).__name__}")
        self._session = Session(path, threads, providers)
        self.path, self.threads = self._session.path, self._session.threads
        self.described = Described.from_props(self._session.props, self.path)
        said = {} if self.described is None else self.described.network
        self.layer: str | None = said.get("layer")
        self.normalize: bool | None = said.get("normalize")
        self.name: str | None = said.get("name")
        self.head: Head | None = None if self.described is None else self.described.head
        self.layers = () if self.described is None else self.described.layers
        self.preprocess: AnyPreprocess | None = None
        if preprocess is not None:
            self.preprocess = from_transform(preprocess)
        elif said.get("preprocess") is not None:
            self.preprocess = preprocess_from_dict(said["preprocess"])
        self._maps, self._embedding = self._named_outputs()

    @property
    def batch(self) -> int | None:
        """How many pictures a run takes; None: any number."""
        return self._session.shape[0]

    @property
    def sides(self) -> tuple[int, int] | None:
        """(H, W) that a picture must have; None: any."""
        height, width = self._session.shape[2:]
        return None if height is None or width is None else (height, width)

    def describe(self) -> dict[str, Any]:
        """Return what the file says of its network, ready for JSON; empty for others' files."""
        return {} if self.described is None else dict(self.described.network)

    def probe_images(self, count: int = 1) -> np.ndarray:
        """Return the synthetic pictures as this network's input, float32 `[count C H W]`."""
        size = self.sides or (_ANY_SIDE, _ANY_SIDE)
        return probe_inputs(count, self.preprocess, size, self._session.shape[1] or 3)

    def embed(self, images: Any, layers: Sequence[str] | None = None) -> Embedded:
        """Embed preprocessed images `[B 3 H W]`, an array or CPU tensor.

        Activations are those of the network's own layer, or of several in the order given.

        Raises
        ------
        InputError
            Images of a wrong shape, or with NaN; no layer, or one the file does not give.
        NetworkError
            Outputs of a wrong shape, or an embedding that is not finite, or zero.
        """
        if layers is None:
            return self._run(images, self._maps[:1])
        missing = [name for name in layers if name not in self.layers]
        if missing or isinstance(layers, str) or not layers:
            raise InputError(
                f"{self.path} gives the activations of {', '.join(self.layers) or 'one layer'}; "
                f"asked for {layers!r}"
            )
        return self._run(images, [self._maps[self.layers.index(name)] for name in layers])

    def affine_head(self, stored_matrix: Callable[[], np.ndarray]) -> HeadMatrix:
        """Return the head, its matrix from an index where it is not the identity.

        Raises `InputError` where it is not average pooling and affine.
        """
        if self.head is None or self.head.kind == "other":
            raise InputError(
                f"receipts need the head by itself, and {self.path} has none that is average "
                "pooling and affine; give the network instead of its ONNX file"
            )
        matrix = None if self.head.kind == "identity" else stored_matrix()
        return HeadMatrix(matrix, self.head.bias)

    # The index

    def identity(self) -> Identity:
        """Return what tells this network from another, its probe run through ONNX Runtime."""
        if self.described is None:
            raise NetworkError(f"{self.path}: was not written by `embedcam export`")
        return self._identity(self.described.network)

    def for_index(self, stored: Identity, layers: Sequence[str]) -> Self:
        """Return this network as the one of an index, or raise `NetworkMismatch`.

        Another program's file says neither its layer nor its settings: it is given the index's, and
        the probe decides, with a warning, as for any network of other parameters.
        """
        network = self
        if self.described is not None:
            compare(stored, self.identity())
        else:
            network = copy.copy(self)
            network.layer, network.normalize = stored.layer, stored.normalize
            network.layers = (layers[0],)
            if self.preprocess is None and stored.preprocess is not None:
                network.preprocess = preprocess_from_dict(stored.preprocess)
            settings = {
                **stored.to_dict(),
                "parameters_sha256": _sha256(self.path),
                "structure_sha256": "an ONNX file's is not known",
                "precision": "ONNX",
            }
            compare(stored, network._identity(settings))
        missing = [name for name in layers if name not in network.layers]
        if missing:
            raise NetworkMismatch(
                f"this is not the network of the index: {self.path} gives the activations of "
                f"{', '.join(network.layers)}, and the index draws with {', '.join(layers)}; write "
                "it again with `embedcam export`"
            )
        return network

    def _identity(self, settings: dict[str, Any]) -> Identity:
        embedded = self._run(self.probe_images(), self._maps[:1], PROBE_SECONDS)
        pooled = embedded.activations[0][0].mean((1, 2), dtype=np.float64)
        probe = {
            "probe_embedding": embedded.embedding[0],
            "probe_pooled": pooled.astype(np.float32),
        }
        if self.preprocess is not None:
            settings = {**settings, "preprocess": self.preprocess.to_dict()}
        return Identity.from_dict(settings, probe)

    # One run

    def _named_outputs(self) -> tuple[list[str], str]:
        """Return the names of the layers' outputs, and of the embedding's."""
        outputs = self._session.outputs
        maps = [output_name(place) for place in range(max(1, len(self.layers)))]
        if {*maps, EMBEDDING} <= outputs.keys():
            return maps, EMBEDDING
        four, two = ([name for name, n in outputs.items() if n == sides] for sides in (4, 2))
        if self.described is None and len(four) == len(two) == 1:
            return four, two[0]
        listed = ", ".join(f"{name} ({n} dimensions)" for name, n in outputs.items()) or "none"
        raise NetworkError(
            f"{self.path}: its outputs are {listed}; expected {', '.join(maps)} [B K H W] and "
            f"{EMBEDDING} [B D], as `embedcam export` writes them"
        )

    def _run(self, images: Any, names: Sequence[str], seconds: float | None = None) -> Embedded:
        batch = self._checked(images)
        # A file whose batch is fixed at one picture takes them one at a time.
        single = self.batch == 1 and len(batch) > 1
        pieces = [batch[row : row + 1] for row in range(len(batch))] if single else [batch]
        runs = [self._session.run([*names, self._embedding], piece, seconds) for piece in pieces]
        outputs = [np.concatenate(one) for one in zip(*runs, strict=True)] if single else runs[0]
        *maps, embedding = outputs
        fine = embedding.ndim == 2 and len(embedding) == len(batch) and embedding.shape[1] > 0
        for one in maps:
            fine = fine and one.ndim == 4 and len(one) == len(batch) and 0 not in one.shape
        if not fine:
            shown = ", ".join(str(list(one.shape)) for one in outputs)
            raise NetworkError(
                f"{self.path}: gives {shown} for {len(batch)} images; expected activations "
                "[B K H W] and an embedding [B D]"
            )
        deepest = maps[names.index(self._maps[0])] if self._maps[0] in names else None
        embedding, norm = self._lengths(batch, deepest, embedding)
        return Embedded(embedding, norm, maps)

    def _lengths(
        self, batch: np.ndarray, maps: np.ndarray | None, embedding: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the embedding `[B D]` and its length `[B]` before normalization, if known.

        `maps` are the network's own layer's, if they were asked for.
        """
        lengths = np.sqrt(np.einsum("bd,bd->b", embedding, embedding, dtype=np.float64))
        if not np.isfinite(lengths).all() or (self.normalize and not lengths.all()):
            if not np.isfinite(batch).all():
                raise InputError("the images hold NaN or infinity; check their preprocessing")
            bad = ~np.isfinite(lengths) | ((lengths == 0) & bool(self.normalize))
            raise self._unusable("the embedding is zero or not finite and cannot be used", bad)
        if maps is not None and not math.isfinite(float(maps.sum())):
            bad = ~np.isfinite(maps.reshape(len(maps), -1)).all(1)
            if bad.any():
                raise self._unusable("the layer's activations hold NaN or infinity", bad)
        if self.normalize is False:
            return embedding, lengths.astype(np.float32)
        if self.normalize and self.described is None:
            # Another program may leave it to whoever searches.
            return (embedding / lengths[:, None]).astype(np.float32), None
        if maps is None or self.head is None or self.head.kind != "identity":
            return embedding, None
        z = maps.mean((2, 3), dtype=np.float64) + self.head.bias
        return embedding, np.linalg.norm(z, axis=1).astype(np.float32)

    def _unusable(self, what: str, bad: np.ndarray) -> EmbeddingError:
        advice = f"leave the picture out, or check the weights in {self.path}"
        return EmbeddingError(what, advice, np.flatnonzero(bad).tolist(), len(bad))

    def _checked(self, images: Any) -> np.ndarray:
        try:
            batch = np.asarray(images)
        except (TypeError, ValueError, RuntimeError) as error:
            message = str(error).partition("\n")[0]
            raise InputError(f"the images cannot be read as an array ({message})") from error
        if batch.ndim != 4 or 0 in batch.shape or batch.dtype.kind != "f":
            raise InputError(
                f"images are {list(batch.shape)} of {batch.dtype}; expected preprocessed floats "
                "[B 3 H W], at least one"
            )
        _, *wanted = self._session.shape
        if any(n not in (None, m) for n, m in zip(wanted, batch.shape[1:], strict=True)):
            shown = " ".join("any" if n is None else str(n) for n in wanted)
            raise InputError(
                f"images are {list(batch.shape)}; {self.path} takes [B {shown}]: prepare them as "
                "the index says"
            )
        return np.ascontiguousarray(batch, np.float32)


def output_name(place: int) -> str:
    """Return the name of a layer's output: `activations`, then `activations_1`, ..."""
    return ACTIVATIONS if place == 0 else f"{ACTIVATIONS}_{place}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
