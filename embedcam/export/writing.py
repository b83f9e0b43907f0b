"""The ONNX file of an index's network: written, held against torch, put in place."""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from .._files import fresh
from .._files import replace as replace_durably
from ..errors import InputError, NetworkError
from ..images.progress import progress_of
from ..index import Index
from ..index.identity import Identity, compare
from ..network import EmbeddingNetwork
from ..network.steady import full_float32
from ..onnx import Described, Head, OnnxNetwork
from ..onnx.network import output_name
from ..ops import resize
from .tracing import onnx_model, refuse_unexportable

TOLERANCE = 1e-4
"""Largest relative difference between ONNX Runtime's outputs and torch's; usual is 1e-6."""
_RANDOM = 3


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    path; bytes: of the file; layers: whose activations it gives, the network's own first; head:
    "identity", "affine" or "other"; difference: the largest relative one from torch's outputs, on
    the probe and on random pictures; seconds: it took; free: whether it takes pictures of any
    height and width.
    """

    path: Path
    bytes: int
    layers: tuple[str, ...]
    head: str
    difference: float
    seconds: float
    free: bool


def export_onnx(
    index: Index | str | Path,
    network: EmbeddingNetwork,
    path: str | Path,
    *,
    progress: bool | None = None,
) -> ExportReport:
    """Write an index's network as one ONNX file, to be run without torch.

    Its input is `images` float32 `[B 3 H W]`, B of any size, H and W too where the network takes
    any, which `detail=2` makes use of; its outputs are `activations`
    `[B K H W]`, whatever the layer's own layout, `activations_1` and so on for an index of several
    layers, and `embedding` `[B D]`, of length 1 where the index is normalised. It is written in
    float32, run by ONNX Runtime on the CPU and held against torch before it is put in place.

    Args:
        index: an open index or its folder.
        network: the network it was built with.
        path: of the file; one that is there is replaced at the end.
        progress: False says nothing; else the logger `embedcam.progress` has a line every half
            minute.

    Raises:
        NetworkMismatch: the network is not the index's.
        NetworkError: it cannot be exported, or the file computes something else.
        InputError: the index does not know its network, or the path cannot be written.
        IndexFormatError: no index, or a broken one.
    """
    began = time.perf_counter()
    target = check_target(path)
    stored, layers = _asked_of(index)
    given = network.identity()
    compare(stored, given)
    refuse_unexportable(network)
    given_layers = (network.layer, *(name for name in layers if name != network.layer))
    # Half-precision autocast is not exported, and the file does not claim it.
    plain = copy.copy(network)
    plain.autocast = None
    settings = replace(given, precision="float32").to_dict()
    described = Described(__version__, settings, given_layers, head_of(plain))
    with _beside(target) as unfinished:
        for free in (True, False):
            try:
                with progress_of("tracing", shown=progress):
                    data = _model_bytes(plain, described, free)
                with progress_of("checking", shown=progress):
                    _write(unfinished, data)
                    difference = _held_against(plain, unfinished, given_layers)
                break
            except NetworkError:
                # A network of one input size; what else fails, fails again.
                if not free:
                    raise
        size = unfinished.stat().st_size
        _put_in_place(unfinished, target)
    seconds = time.perf_counter() - began
    kind = described.head.kind
    return ExportReport(target, size, given_layers, kind, difference, seconds, free)


def head_of(network: EmbeddingNetwork) -> Head:
    """What the head is, with its constant term: z at activations of zero."""
    kind = network.head_kind
    if not kind.affine:
        return Head("other")
    image = network.probe_images()
    zeros = torch.zeros_like(network.forward(image).activations)
    bias = network.head_outputs(image, zeros)[0].float().cpu().numpy()
    return Head("identity" if kind.identity else "affine", bias)


def _model_bytes(network: EmbeddingNetwork, described: Described, free: bool) -> bytes:
    model = onnx_model(network, described.layers, free)
    for key, value in described.to_props().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    try:
        data: bytes = model.SerializeToString()
    except Exception as error:
        raise NetworkError(
            f"the network does not fit into one ONNX file, which holds at most 2 GB ({error})"
        ) from error
    return data


def _asked_of(index: Index | str | Path) -> tuple[Identity, list[str]]:
    """The index's identity of its network, and its layers' names."""
    opened = index if isinstance(index, Index) else Index.open(index, with_faiss=False)
    try:
        stored = opened.identity
        if stored is None:
            raise InputError(
                "this index was built from features alone and does not know its network, so none "
                "can be exported for it; build it again naming the network"
            )
        return stored, opened.manifest.layer_names
    finally:
        if opened is not index:
            opened.close()


def check_target(path: str | Path) -> Path:
    """The path of a file that can be written, before any work is done for it.

    Raises:
        InputError: a folder, something that is no file, or in a folder that is not there.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target} is a folder; give a file, such as {target / 'network.onnx'}")
    if not target.parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}; make it first")
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: is not a regular file; give another name")
    return target


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name for the unfinished file in the target's folder; what is left of it is removed."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield unfinished
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    try:
        with fresh(path) as file:
            file.write(data)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written to ({error.strerror})") from error


def _put_in_place(unfinished: Path, target: Path) -> None:
    try:
        replace_durably(unfinished, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror})") from error


def _held_against(network: EmbeddingNetwork, path: Path, layers: Sequence[str]) -> float:
    """The largest relative difference of the file's outputs from torch's.

    Raises:
        NetworkError: it is larger than `TOLERANCE`.
    """
    written = OnnxNetwork(path, preprocess=network.preprocess, threads=torch.get_num_threads())
    if written.batch is not None:
        raise NetworkError(
            "the network's code fixes the number of pictures in a batch, so it cannot be exported "
            "for batches of any size; say x.shape[0] where it says len(x), and -1 where it names "
            "the batch"
        )
    probe = network.probe_images(2)
    noise = np.random.default_rng(0).standard_normal((_RANDOM, *probe.shape[1:]))
    pictures = np.concatenate([probe, noise.astype(np.float32)])
    worst = 0.0
    # Of one picture, of a batch of another size than the one that was traced, and larger.
    larger = resize(pictures[:1], (2 * pictures.shape[2], 2 * pictures.shape[3]))
    for batch in (pictures[:1], pictures, *([larger] if written.sides is None else [])):
        expected = _by_torch(network, batch, layers)
        features, maps = written.forward_layers(batch, layers)
        for name, found in zip(expected, [*maps, features.embedding], strict=True):
            off = _relative(found, expected[name])
            if not off <= TOLERANCE:
                raise _other(name, off)
            worst = max(worst, off)
    return worst


def _other(output: str, off: float) -> NetworkError:
    return NetworkError(
        f"the file that was written computes something else: ONNX Runtime's {output} is off from "
        f"torch's by {off:.2g} (allowed: {TOLERANCE:g}), so it was removed; part of the network "
        "depends on the batch or is not deterministic, or torch exports it wrongly"
    )


def _by_torch(
    network: EmbeddingNetwork, batch: np.ndarray, layers: Sequence[str]
) -> dict[str, np.ndarray]:
    """Each output by its name, as torch computes it in full float32."""
    with full_float32(network.device):
        if len(layers) == 1:
            features = network.forward(batch)
            maps = [features.activations]
        else:
            features, maps = network.forward_layers(batch, layers)
    named: dict[str, Any] = {output_name(place): one for place, one in enumerate(maps)}
    named["embedding"] = features.embedding
    return {name: tensor.float().cpu().numpy() for name, tensor in named.items()}


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, infinite for arrays of different shapes."""
    if found.shape != expected.shape:
        return float("inf")
    exact = expected.astype(np.float64)
    size, off = float(np.linalg.norm(exact)), float(np.linalg.norm(found - exact))
    return off / size if size > 0 else (0.0 if off == 0 else float("inf"))
