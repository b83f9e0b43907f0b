"""`OnnxNetwork`: a network in an ONNX file, as an `Explainer` takes it.

What the file says of itself is in its `metadata_props`:

    embedcam.version   of the embedcam that wrote it
    embedcam.network   JSON: the network's identity, as an index's manifest has it
    embedcam.layers    JSON: names of the layers behind `activations`, `activations_1`, ...
    embedcam.head      JSON: {"kind": "identity" | "affine" | "other", "bias": base64 or null}
    embedcam.loading   JSON: how torch loads the network, as a manifest has it; may be missing

A head that is pooled and affine is z = W p + b, p the mean of the activations over positions and z
the embedding before any normalization. W is the identity where the kind says so; else the basis
of an index whose encoding has the origin "head", times the number of positions of its `grid` (the
basis is dz/dA). b is float32, little-endian, base64.

Around a norm over channels the kind is "other", so that earlier versions read it, and the head has
an entry "normed": {"matrix": W, "bias": b, "epsilon", "centered", "pooled"}, W written as b is; see
`HeldNorm`.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np

from .._checks import is_usable
from ..errors import (
    EmbeddingError,
    IndexFormatError,
    InputError,
    NetworkError,
    NetworkMismatch,
    reason,
    short,
)
from ..index.identity import Identity, compare
from ..index.manifest import RunEntry, loading_of
from ..index.records import Wrong
from ..preprocess import (
    AnyPreprocess,
    Array,
    Embedded,
    HeadMatrix,
    HeldNorm,
    Transform,
    from_transform,
    preprocess_from_dict,
    usual_passes,
)
from ..preprocess.probe import probe_inputs
from .session import AGAIN, PROBE_SECONDS, PROVIDERS, Session

_ANY_SIDE = 224
ACTIVATIONS, EMBEDDING, NORM = "activations", "embedding", "norm"
HEAD_KINDS = ("identity", "affine", "other")
PREFIX = "embedcam."
_KEYS = ("version", "network", "layers", "head")
_MAX_CHARACTERS = 16 << 20
MOST_NUMBERS = 11 << 18
"""In one array of what the file says of its head."""


@dataclass(frozen=True, eq=False)
class Head:
    """What follows the layer: one of `HEAD_KINDS`, and b, float32 `[D]`, None for "other".

    `normed` is one that is affine but for a norm, whose kind is "other".
    """

    kind: str
    bias: np.ndarray | None = None
    normed: HeadMatrix | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        told: dict[str, Any] = {"kind": self.kind, "bias": _text_of(self.bias)}
        if self.normed is not None and self.normed.held is not None:
            arrays = {"matrix": _text_of(self.normed.matrix), "bias": _text_of(self.normed.bias)}
            told["normed"] = arrays | asdict(self.normed.held)
        return told

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` described; a ValueError for anything else."""
        try:
            kind, bias, normed = values["kind"], _array_of(values["bias"]), values.get("normed")
            normed = None if normed is None else _normed_of(**normed)
        except (TypeError, KeyError, ValueError, AttributeError):
            kind = bias = normed = None
        if kind not in HEAD_KINDS or (kind == "other") != (bias is None):
            raise ValueError(
                f"the head is {short(values)}, none of {', '.join(HEAD_KINDS)} with its bias"
            )
        return cls(kind, bias, normed if kind == "other" else None)


def _normed_of(matrix: str, bias: str, epsilon: float, centered: bool, pooled: bool) -> HeadMatrix:
    shift, flat = _array_of(bias), _array_of(matrix)
    if shift is None or flat is None or not (isinstance(epsilon, float) and 0 < epsilon < math.inf):
        raise ValueError("no arrays, or no epsilon")
    held = HeldNorm(epsilon, centered is True, pooled is True)
    return HeadMatrix(flat.reshape(len(shift), -1), shift, held)


def _text_of(array: np.ndarray | None) -> str | None:
    if array is None:
        return None
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode("ascii")


def _array_of(text: str | None) -> np.ndarray | None:
    """Return finite numbers, at least one; a ValueError for anything else."""
    if text is None:
        return None
    array = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    if not 0 < array.size <= MOST_NUMBERS or not np.isfinite(array).all():
        raise ValueError("no numbers, too many, or not finite")
    return array


@dataclass(frozen=True, eq=False)
class Described:
    """An ONNX file's own description; `network` is the identity's settings, without the probe."""

    version: str
    network: dict[str, Any]
    layers: tuple[str, ...]
    head: Head
    loading: dict[str, Any] | None = None

    def to_props(self) -> dict[str, str]:
        """Return texts for `metadata_props`."""
        known = {} if self.loading is None else {f"{PREFIX}loading": json.dumps(self.loading)}
        return {
            **known,
            f"{PREFIX}version": self.version,
            f"{PREFIX}network": json.dumps(self.network, sort_keys=True, allow_nan=False),
            f"{PREFIX}layers": json.dumps(list(self.layers)),
            f"{PREFIX}head": json.dumps(self.head.to_dict()),
        }

    @classmethod
    def from_props(cls, props: Mapping[str, str], path: object) -> Self | None:
        """Return what `to_props` wrote, or a `NetworkError`; None of another program's file."""
        known = (*_KEYS, "loading")
        texts = {key: props[PREFIX + key] for key in known if PREFIX + key in props}
        if not texts:
            return None
        try:
            if missing := [f"{PREFIX}{key}" for key in _KEYS if key not in texts]:
                raise ValueError(f"{missing[0]} is missing")
            if sum(map(len, texts.values())) > _MAX_CHARACTERS:
                raise ValueError(f"it has more than {_MAX_CHARACTERS:,} characters")
            network, layers = json.loads(texts["network"]), json.loads(texts["layers"])
            if not isinstance(network, dict):
                raise ValueError("the network is no object")
            # One number stands for the probe, which is the file's to compute.
            probe = np.zeros(1, np.float32)
            Identity.from_dict(network, {"probe_embedding": probe, "probe_pooled": probe})
            names = layers if isinstance(layers, list) else []
            texts_only = all(isinstance(name, str) for name in names)
            if not texts_only or len(set(names)) < len(names) or names[:1] != [network["layer"]]:
                raise ValueError(f"the layers {short(layers)} do not begin with the network's own")
            head = Head.from_dict(json.loads(texts["head"]))
            loading = json.loads(texts.get("loading", "null"))
            loading = None if loading is None else loading_of(loading)
        except (ValueError, RecursionError, IndexFormatError, Wrong) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise NetworkError(
                f"{path}: what it says of its network cannot be believed ({said}); {AGAIN}"
            ) from error
        return cls(texts["version"], network, tuple(layers), head, loading)


class OnnxNetwork:
    """A network that `embedcam export` wrote, or any ONNX file with activations and an embedding.

    Concurrent calls are safe. A child made by fork opens the file again, on one thread.

    `described` is what the file says of itself, None in another program's; `layer`, `normalize`,
    `name`, `head` and `layers`, the network's own first, follow from it.

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
    autocast: ClassVar[None] = None
    texts: ClassVar[None] = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        preprocess: Transform | None = None,
        threads: int | None = None,
        providers: Sequence[str] = PROVIDERS,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"expected the path of an ONNX file, given {type(path).__name__}")
        self._session = Session(path, threads, providers)
        self.path, self.threads = self._session.path, self._session.threads
        self.described = Described.from_props(self._session.props, self.path)
        said = self.describe()
        self.layer: str | None = said.get("layer")
        self.normalize: bool | None = said.get("normalize")
        self.name: str | None = said.get("name")
        self.head = self.described.head if self.described else None
        self.layers = self.described.layers if self.described else ()
        self.preprocess: AnyPreprocess | None = None
        if preprocess is not None:
            self.preprocess = from_transform(preprocess)
        elif said.get("preprocess") is not None:
            self.preprocess = preprocess_from_dict(said["preprocess"])
        self._maps, self._embedding = self._named_outputs()
        # Files of embedcam before 1.0 do not tell it.
        told = self.described is not None and self._session.outputs.get(NORM) == 1
        self._norm = [NORM] if told else []

    @property
    def batch(self) -> int | None:
        """How many pictures a run takes; None: any number."""
        return self._session.shape[0]

    @property
    def sides(self) -> tuple[int, int] | None:
        """(H, W) that a picture must have; None: any."""
        height, width = self._session.shape[2:]
        return None if height is None or width is None else (height, width)

    @property
    def usual_run(self) -> RunEntry:
        """How its forward passes are run where nobody says otherwise."""
        batch_size, channels_last = usual_passes("onnx", "cpu")
        return RunEntry("onnx", "cpu", self.batch or batch_size, channels_last)

    def describe(self) -> dict[str, Any]:
        """Return what the file says of its network, ready for JSON; empty for others' files."""
        return {} if self.described is None else dict(self.described.network)

    def probe_images(self, count: int = 1) -> np.ndarray:
        """Return the synthetic pictures as this network's input, float32 `[count C H W]`."""
        size = self.sides or (_ANY_SIDE, _ANY_SIDE)
        return probe_inputs(count, self.preprocess, size, self._session.shape[1] or 3)

    def embed(self, images: Array, layers: Sequence[str] | None = None) -> Embedded:
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
        if isinstance(layers, str) or not layers or not set(layers) <= set(self.layers):
            raise InputError(
                f"{self.path} gives the activations of {', '.join(self.layers) or 'one layer'}; "
                f"asked for {layers!r}"
            )
        return self._run(images, [self._maps[self.layers.index(name)] for name in layers])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Refuse: a file holds the tower for pictures alone."""
        raise NetworkError(
            f"{self.path} embeds pictures alone; give texts=, a function of a list of texts or "
            "their embeddings (--text-embedding), or the network instead of its ONNX file"
        )

    def warm_up(self) -> None:
        """Do nothing: the file says what its head is."""

    def affine_head(self, stored_matrix: Callable[[], np.ndarray]) -> HeadMatrix:
        """Return the head, its matrix from an index; `InputError` where it is not pooled affine."""
        if self.head is not None and self.head.normed is not None:
            return self.head.normed
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
        """Return this network as that of an index; one without a description takes its settings."""
        network = self
        if self.described is not None:
            compare(stored, self.identity())
        else:
            network = copy.copy(self)
            network.layer, network.normalize = stored.layer, stored.normalize
            network.layers = (layers[0],)
            if self.preprocess is None and stored.preprocess is not None:
                network.preprocess = preprocess_from_dict(stored.preprocess)
            with open(self.path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            settings = {
                **stored.to_dict(),
                "parameters_sha256": digest,
                "structure_sha256": "an ONNX file's is not known",
                "precision": "ONNX",
            }
            compare(stored, network._identity(settings))
        if not set(layers) <= set(network.layers):
            raise NetworkMismatch(
                f"this is not the network of the index: {self.path} gives the activations of "
                f"{', '.join(network.layers)}, and the index draws with {', '.join(layers)}; "
                f"{AGAIN}"
            )
        return network

    def _identity(self, settings: dict[str, Any]) -> Identity:
        embedded = self._run(self.probe_images(), self._maps[:1], PROBE_SECONDS)
        pooled = embedded.activations[0][0].mean((1, 2), dtype=np.float64).astype(np.float32)
        probe = {"probe_embedding": embedded.embedding[0], "probe_pooled": pooled}
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

    def _run(self, images: Array, names: Sequence[str], seconds: float | None = None) -> Embedded:
        batch = self._checked(images)
        # A file whose batch is fixed at one picture takes them one at a time.
        pieces = np.split(batch, len(batch)) if self.batch == 1 else [batch]
        asked = [*names, self._embedding, *self._norm]
        runs = [self._session.run(asked, piece, seconds) for piece in pieces]
        outputs = list(map(np.concatenate, zip(*runs, strict=True))) if runs[1:] else runs[0]
        *maps, embedding = outputs[: len(names) + 1]
        shapes = [one.shape for one in (*maps, embedding)]
        if [len(one) for one in shapes] != [4] * len(maps) + [2] or any(
            one[0] != len(batch) or 0 in one for one in shapes
        ):
            raise NetworkError(
                f"{self.path}: gives {', '.join(str(list(one)) for one in shapes)} for "
                f"{len(batch)} images; expected activations [B K H W] and an embedding [B D]"
            )
        deepest = maps[names.index(self._maps[0])] if self._maps[0] in names else None
        told = outputs[-1] if self._norm and outputs[-1].shape == (len(batch),) else None
        return Embedded(*self._lengths(batch, deepest, embedding, told), maps)

    def _lengths(
        self,
        batch: np.ndarray,
        maps: np.ndarray | None,
        embedding: np.ndarray,
        told: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the embedding `[B D]` and its length `[B]` before normalization, if known.

        The file's own word for the length, `told`, goes before what follows from the activations.
        """
        # Of usable numbers nothing is to be found out.
        known = [embedding] if maps is None else [embedding, maps]
        if told is not None and all(map(is_usable, known)) and embedding.any(axis=1).all():
            return embedding, told
        lengths = np.sqrt(np.einsum("bd,bd->b", embedding, embedding, dtype=np.float64))
        bad = ~np.isfinite(lengths) | ((lengths == 0) & bool(self.normalize))
        what = "the embedding is zero or not finite and cannot be used"
        if bad.any() and not np.isfinite(batch).all():
            raise InputError("the images hold NaN or infinity; check their preprocessing")
        sums = np.empty(0)
        if not bad.any() and maps is not None:
            # A product with ones takes a tenth of the time of a mean, and tells of what is no
            # number; it may also overflow where every number is finite.
            at_positions = maps.reshape(*maps.shape[:2], -1)
            with np.errstate(over="ignore", invalid="ignore"):
                sums = at_positions @ np.ones(at_positions.shape[2], np.float32)
            if not np.isfinite(sums).all():
                bad = ~np.isfinite(at_positions).all((1, 2))
                what = "the layer's activations hold NaN or infinity"
                sums = at_positions.sum(2, dtype=np.float64)
        if bad.any():
            advice = f"leave the picture out, or check the weights in {self.path}"
            raise EmbeddingError(what, advice, np.flatnonzero(bad).tolist(), len(bad))
        if told is not None:
            return embedding, told
        if self.normalize is False:
            return embedding, lengths.astype(np.float32)
        if self.normalize and self.described is None:
            # Another program may leave it to whoever searches.
            return (embedding / lengths[:, None]).astype(np.float32), None
        bias = None if self.head is None or self.head.kind != "identity" else self.head.bias
        if maps is None or bias is None:
            return embedding, None
        z = sums.astype(np.float64) / math.prod(maps.shape[2:]) + bias
        return embedding, np.linalg.norm(z, axis=1).astype(np.float32)

    def _checked(self, images: Array) -> np.ndarray:
        try:
            batch = np.asarray(images)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"the images cannot be read as an array ({reason(error)})") from error
        wanted = self._session.shape[1:]
        if batch.ndim != 4 or 0 in batch.shape or batch.dtype.kind != "f":
            expected = "expected preprocessed floats [B 3 H W], at least one"
        elif any(n not in (None, m) for n, m in zip(wanted, batch.shape[1:], strict=True)):
            shown = " ".join("any" if n is None else str(n) for n in wanted)
            expected = f"{self.path} takes [B {shown}]: prepare them as the index says"
        else:
            return np.ascontiguousarray(batch, np.float32)
        raise InputError(f"images are {list(batch.shape)} of {batch.dtype}; {expected}")


def output_name(place: int) -> str:
    """Return the name of a layer's output: `activations`, then `activations_1`, ..."""
    return ACTIVATIONS if place == 0 else f"{ACTIVATIONS}_{place}"
