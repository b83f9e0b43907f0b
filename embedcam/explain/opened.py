"""One version of an index as requests see it: read once by each request, never changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .._files import compute_on_one_thread
from ..errors import EmbedcamError, InputError
from ..images import read_image
from ..index import Index
from ..index.calibration import Calibration, MatchCalibration
from ..index.encoding import Encoding
from ..preprocess import AnyPreprocess, Network

if TYPE_CHECKING:
    from PIL import Image

    from ..onnx import OnnxNetwork

_LOG = logging.getLogger("embedcam")


@dataclass(frozen=True)
class Given:
    """What an explainer was given beside the index, the same for every version of it."""

    network: Network | None
    images: Path | None


@dataclass(frozen=True, eq=False)
class Opened:
    """An open index and what a request needs of its manifest.

    Attributes:
        index: open.
        network: that it was built with, or None.
        layers, channels, encodings: of each layer, deepest first.
        calibrations: of trust, "one" and "several"; empty where the index holds none.
        matches: calibrations of match, likewise.
        preprocess: of the network, or as the index describes it; None where neither is known.
        root: folder of the indexed images, or None.
        place: absolute path where the next version is looked for; links are followed then.
        process: id of the process that opened it.
        owned: whether the index is to be closed by the explainer.
    """

    index: Index
    network: Network | None
    layers: tuple[str, ...]
    channels: tuple[int, ...]
    encodings: tuple[Encoding, ...]
    calibrations: Mapping[str, Calibration]
    matches: Mapping[str, MatchCalibration]
    preprocess: AnyPreprocess | None
    root: Path | None
    place: Path
    process: int
    owned: bool

    @classmethod
    def first(cls, index: Index | str | Path, given: Given) -> Self:
        """The version an explainer begins with.

        Raises:
            IndexFormatError, NetworkMismatch, InputError: it cannot serve; what was opened for it
                is closed.
        """
        if isinstance(index, Index):
            return cls._of(index, given, Path(os.path.abspath(index.path)), owned=False)
        return cls._opened(Path(os.path.abspath(index)), index, given)

    def next(self, given: Given, *, verify: bool = False) -> Self | None:
        """The version that lies at the same place now; None where it is this one.

        Its FAISS file is loaded, so that a broken one is refused and no request waits for it.

        Raises: as `first`, which leaves this one as it is.
        """
        found = self._again(given, self.index.n_threads)
        try:
            if found.version == self.version:
                found.index.close()
                return None
            found.index.load()
            if verify:
                found.index.verify()
        except BaseException:
            found.index.close()
            raise
        return found

    def in_child(self, given: Given) -> Self:
        """For a forked child: the files opened again, and one thread for torch and FAISS.

        What cannot be opened again is served as it was: its files are still mapped.
        """
        compute_on_one_thread()
        try:
            return self._again(given, 1)
        except EmbedcamError as error:
            _LOG.warning("in a forked child the version of the parent is served on: %s", error)
            return replace(self, process=os.getpid())

    @property
    def by_position(self) -> bool:
        """Whether weights belong to positions, so that no larger view of a query takes them."""
        return any(encoding.grid is not None for encoding in self.encodings)

    @property
    def version(self) -> str:
        """SHA-256 of the manifest, which holds those of all files."""
        return self.index.manifest.manifest_sha256

    def describe(self) -> str:
        """For a log."""
        return f"generation {self.index.manifest.generation} with {len(self.index)} images"

    def close(self) -> None:
        """Close the index, unless it is the caller's."""
        if self.owned:
            self.index.close()

    # Inside

    def _again(self, given: Given, n_threads: int | None) -> Self:
        options = {"with_faiss": self.index.with_faiss, "n_threads": n_threads}
        return self._opened(self.place, self.place, given, self, **options)

    @classmethod
    def _opened(
        cls,
        place: Path,
        path: str | Path,
        given: Given,
        before: Opened | None = None,
        **options: Any,
    ) -> Self:
        index = Index.open(path, **options)
        try:
            return cls._of(index, given, place, before, owned=True)
        except BaseException:
            index.close()
            raise

    @classmethod
    def _of(
        cls, index: Index, given: Given, place: Path, before: Opened | None = None, *, owned: bool
    ) -> Self:
        manifest = index.manifest
        network = given.network
        if before is not None and _same_network(index, before.index):
            network = before.network
        elif network is not None:
            network = admitted(index, network)
        root: Path | str | None = given.images
        if root is None:
            root = manifest.images_root
        if before is None or before.index.marked:
            _say_unmarked(index)
        if before is None:
            _say_uncalibrated(index)
        return cls(
            index=index,
            network=network,
            layers=tuple(manifest.layer_names),
            channels=tuple(layer.channels for layer in manifest.layers),
            encodings=tuple(index.encoding(number) for number in range(len(index.layers))),
            calibrations=manifest.trust_calibration or {},
            matches=manifest.match_calibration or {},
            preprocess=_preprocess(index, network),
            root=None if root is None else Path(root),
            place=place,
            process=os.getpid(),
            owned=owned,
        )


def _say_unmarked(index: Index) -> None:
    """Say, once, that an index of pictures cannot tell whether they were replaced."""
    first = index.select(index.live_positions()[:1])
    if not index.marked and any(first.paths):
        _LOG.warning(
            "%s keeps no marks of its images' files, so whether a picture was replaced since the "
            "build cannot be told; `embedcam build --refit` adds them",
            index.path,
        )


def _say_uncalibrated(index: Index) -> None:
    """Say, once, that trust was calibrated by a version that meant something else by it."""
    if index.manifest.has_earlier_trust:
        _LOG.warning(
            "%s holds a calibration of trust by an earlier definition, which is not read; "
            "`embedcam calibrate %s` makes it again, without building the index",
            index.path,
            index.path,
        )


def from_onnx(onnx: str | Path | OnnxNetwork) -> OnnxNetwork:
    """The network of an ONNX file; one that is opened already is taken as it is."""
    from ..onnx import OnnxNetwork

    return onnx if isinstance(onnx, OnnxNetwork) else OnnxNetwork(onnx)


def admitted(index: Index, network: Network) -> Network:
    """The network as the one of the index, or a refusal.

    Raises:
        NetworkMismatch: another network, layer or preprocessing.
        InputError: no network, or an index that does not know its own.
    """
    if not isinstance(network, Network):
        raise InputError(
            f"network is a {type(network).__name__}; expected an EmbeddingNetwork: wrap it as "
            "EmbeddingNetwork(module, layer, preprocess=...)"
        )
    stored = index.identity
    if stored is None:
        raise InputError(
            "this index was built from features alone and does not know its network, so a "
            "network cannot be checked against it; use explain_features, or build it again "
            "naming the network"
        )
    return network.for_index(stored, index.manifest.layer_names)


def _same_network(index: Index, before: Index) -> bool:
    """Whether two versions name one network, which was checked against the one before."""
    ours, theirs = index.probe(), before.probe()
    return (
        index.manifest.network == before.manifest.network
        and ours.keys() == theirs.keys()
        and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    )


def _preprocess(index: Index, network: Network | None) -> AnyPreprocess | None:
    """The network's own, which was held against the index's; else the one described."""
    if network is not None and network.preprocess is not None:
        return network.preprocess
    stored = index.manifest.network
    return None if stored is None else stored.preprocess


def prepared(
    image: Any, preprocess: AnyPreprocess | None, max_pixels: int
) -> tuple[Image.Image | None, Any]:
    """The picture (None where the network's own input was given) and the input `[3 H W]`."""
    shape = tuple(getattr(image, "shape", ()))
    kind = str(getattr(image, "dtype", ""))
    if "float" in kind and len(shape) == 3 and shape[2] != 3:
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


def query_name(image: Any, row: int) -> str:
    """What messages call a query: its path where it has one, else its place among the queries."""
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", "")
    return os.fspath(path) if path else f"query {row}"
