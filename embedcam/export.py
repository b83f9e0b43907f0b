"""The ONNX file of an index's network: traced, written, held against torch, put in place."""

import importlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__
from ._files import fresh
from ._files import replace as replace_durably
from .errors import InputError, NetworkError, reason
from .images.progress import progress_of
from .index import Index
from .network import EmbeddingNetwork
from .network.module import full_float32
from .onnx import Described, Head, OnnxNetwork
from .onnx.network import EMBEDDING, MOST_NUMBERS, NORM, output_name
from .ops import resize

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-4
"""Largest relative difference between ONNX Runtime's outputs and torch's; usual is 1e-6."""
_LARGEST = (1 << 31) - (1 << 24)  # bytes of parameters; the rest of a protobuf is for the graph
_ONE_FILE = "one ONNX file holds at most 2 GB; export a smaller network"
_RANDOM_PICTURES = 3


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    layers: whose activations it gives, the network's own first; head: "identity", "affine",
    "normed" (affine but for a norm) or "other"; difference: the largest relative one from torch's
    outputs, on the probe and on random pictures; free: whether it takes pictures of any size.
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
    any, which `detail=2` makes use of; its outputs are `activations` `[B K H W]`, `activations_1`
    and so on for an index of several layers, and `embedding` `[B D]`, of length 1 where the index
    is normalized, and then `norm` `[B]`, its length before that. It is held against torch before it
    is put in place.

    Parameters
    ----------
    index
        An open index or its folder.
    network
        The network it was built with.
    path
        Of the file; one that is there is replaced at the end.
    progress
        False says nothing; else the logger `embedcam.progress` has a line every half minute.

    Raises
    ------
    NetworkMismatch
        The network is not the index's.
    NetworkError
        It cannot be exported, or the file computes something else.
    InputError
        The index does not know its network, or the path cannot be written.
    IndexFormatError
        No index, or a broken one.
    """
    target = check_target(path)
    with (
        nullcontext(index)
        if isinstance(index, Index)
        else Index.open(index, with_faiss=False) as opened
    ):
        stored, names = opened.identity, opened.manifest.layer_names
    if stored is None:
        raise InputError(
            "this index was built from features alone and does not know its network, so none can "
            "be exported for it; build it again naming the network"
        )
    network = network.for_index(stored)
    layers = (network.layer, *(name for name in names if name != network.layer))
    return _write(network, layers, target, progress)


def through_onnx(
    network: EmbeddingNetwork,
    path: str | Path,
    *,
    threads: int | None = 1,
    progress: bool | None = None,
) -> EmbeddingNetwork:
    """Write a network's file, and return the network with its forward passes run from it.

    The file stays the caller's; it is held against torch as `export_onnx` does. Derivatives are
    torch's as before: see `EmbeddingNetwork.with_session`. Raises as `export_onnx`.
    """
    _write(network, (network.layer,), check_target(path), progress)
    return opened_for(network, path, threads)


def opened_for(
    network: EmbeddingNetwork, path: str | Path, threads: int | None = 1
) -> EmbeddingNetwork:
    """Return a network run by an ONNX file that was exported of it.

    On one thread, since a build runs several passes side by side; None takes as many as torch.
    """
    threads = torch.get_num_threads() if threads is None else threads
    return network.with_session(OnnxNetwork(path, preprocess=network.preprocess, threads=threads))


def _write(
    network: EmbeddingNetwork, layers: tuple[str, ...], target: Path, progress: bool | None
) -> ExportReport:
    """Write a network's file, hold it against torch, and put it in place."""
    began = time.perf_counter()
    _refuse_unexportable(network)
    identity = network.identity()
    # Half-precision autocast is not exported, and the file does not claim it.
    plain = network.without_autocast()
    settings = replace(identity, precision="float32").to_dict()
    described = Described(__version__, settings, layers, _head_of(plain), network.spec)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for free in (True, False):
            try:
                with progress_of("tracing", shown=progress):
                    data = _model_bytes(plain, described, free)
                with progress_of("checking", shown=progress):
                    with fresh(unfinished) as file:
                        file.write(data)
                    difference = _compared(plain, unfinished, layers)
                break
            except NetworkError:
                # A network of one input size; what else fails, fails again.
                if not free:
                    raise
        replace_durably(unfinished, target)
    except OSError as error:
        raise InputError(f"{target.parent}: cannot be written to ({error.strerror})") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    head = described.head.kind if described.head.normed is None else "normed"
    return ExportReport(target, len(data), layers, head, difference, seconds, free)


# What is asked for, refused before any work


def check_packages() -> None:
    """Refuse to begin without the packages that exporting takes."""
    install = 'run pip install "embedcam[onnx]"'
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise NetworkError(
            f"exporting takes torch 2.6 or newer, and this is {torch.__version__}; {install}"
        )
    try:
        for name in ("onnx", "onnxruntime", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise NetworkError(
            f"exporting takes {error.name}, which is not installed; {install}"
        ) from error


def check_target(path: str | Path) -> Path:
    """Return the path of a file that can be written."""
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target} is a folder; give a file, such as {target / 'network.onnx'}")
    if not target.parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}; make it first")
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: is not a regular file; give another name")
    return target


def _refuse_unexportable(network: EmbeddingNetwork) -> None:
    """Refuse what no ONNX file of one piece can hold."""
    check_packages()
    if network.layout == "bkl":
        raise NetworkError("a network over positions takes no pictures and cannot be exported")
    if network.dtype != torch.float32:
        kind = str(network.dtype).removeprefix("torch.")
        raise NetworkError(
            f"the network computes in {kind}, and ONNX files are written in float32; give it "
            "before the conversion: an index built in half precision admits it"
        )
    tensors = [one for one in network.module.state_dict().values() if isinstance(one, Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > _LARGEST:
        raise NetworkError(f"the network holds {size / 1e9:.1f} GB of parameters; {_ONE_FILE}")


def _head_of(network: EmbeddingNetwork) -> Head:
    """Return what the head is, with its constant term: z at activations of zero."""
    kind = network.head_kind
    known = network.affine_head(lambda: np.empty(0))
    if known is None or kind.normed is not None:
        small = known is not None and known.matrix is not None and known.matrix.size <= MOST_NUMBERS
        return Head("other", normed=known if small else None)
    image = network.probe_images()
    zeros = torch.zeros_like(network.forward(image).activations)
    bias = network.head_outputs(image, zeros)[0].float().cpu().numpy()
    return Head("identity" if kind.identity else "affine", bias)


# Tracing


class Traced(nn.Module):
    """The network as a module of tensor operations: images -> activations and embedding."""

    def __init__(self, network: EmbeddingNetwork, layers: Sequence[str]) -> None:
        super().__init__()
        self.training = False
        self.module, self._normalize = network.module, network.normalize
        self._run = network.traceable(layers)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return of `[B 3 H W]` each layer's `[B K H W]`, then embedding `[B D]`, norm `[B]`."""
        z, maps = self._run(images)
        if not self._normalize:
            return (*maps, z)
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return (*maps, z / norm, norm[:, 0])


def onnx_model(network: EmbeddingNetwork, layers: Sequence[str], free: bool) -> "ModelProto":
    """Return an `onnx.ModelProto` with the outputs of `Traced`; `free`: H and W of any size."""
    names = [*(output_name(place) for place in range(len(layers))), EMBEDDING]
    names += [NORM] if network.normalize else []
    # A batch of one would be taken for a constant.
    example = torch.from_numpy(network.probe_images(2)).to(network.device)
    sides = ("batch", None, "height", "width") if free else ("batch",)
    shapes = {place: torch.export.Dim(name) for place, name in enumerate(sides) if name}
    # In float32, in which it is run.
    precision = torch.autocast(network.device.type, enabled=False)
    try:
        with torch.inference_mode(False), torch.no_grad(), _silence(), precision:
            program = torch.onnx.export(
                Traced(network, layers),
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["images"],
                output_names=names,
                dynamic_shapes=(shapes,),
            )
        assert program is not None
        graph = program.model.graph
        made = chain.from_iterable(node.outputs for node in graph)
        # What is within the graph may be called so, too, such as an embedding of positions.
        for value in [*graph.initializers.values(), *made]:
            if value.name in names and value not in graph.outputs:
                value.name = f"{value.name}_within"
        return program.model_proto
    except NetworkError:
        raise
    except Exception as error:
        bottom: BaseException = error
        while bottom.__cause__ is not None:
            bottom = bottom.__cause__
        raise NetworkError(
            f"torch cannot follow the network into ONNX ({reason(bottom)}); give a module of "
            "tensor operations that takes batches of any size (x.shape[0] where it says len(x))"
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Run without what the exporter tells its developers."""
    # The last two tell whole tracebacks of what is then done another way.
    shapes = "torch.fx.experimental.symbolic_shapes", "torch.utils._sympy.interp"
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", *shapes)]
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


# Writing


def _model_bytes(network: EmbeddingNetwork, described: Described, free: bool) -> bytes:
    model = onnx_model(network, described.layers, free)
    for key, value in described.to_props().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    try:
        return bytes(model.SerializeToString())
    except Exception as error:
        raise NetworkError(f"the network is too large ({error}); {_ONE_FILE}") from error


def _compared(network: EmbeddingNetwork, path: Path, layers: Sequence[str]) -> float:
    """Return the largest relative difference of the file's outputs from torch's, or refuse it."""
    written = OnnxNetwork(path, preprocess=network.preprocess, threads=torch.get_num_threads())
    if written.batch is not None:
        raise NetworkError(
            "the network's code fixes the number of pictures in a batch; say x.shape[0] where it "
            "says len(x), and -1 where it names the batch"
        )
    probe = network.probe_images(2)
    noise = np.random.default_rng(0).standard_normal((_RANDOM_PICTURES, *probe.shape[1:]))
    pictures = np.concatenate([probe, noise.astype(np.float32)])
    names = [*(output_name(place) for place in range(len(layers))), EMBEDDING, NORM]
    worst = 0.0
    # Of one picture, of a batch of another size than the one that was traced, and larger.
    larger = resize(pictures[:1], (2 * pictures.shape[2], 2 * pictures.shape[3]))
    for batch in (pictures[:1], pictures, *([larger] if written.sides is None else [])):
        with full_float32(network.device):
            expected = network.embed(batch, layers)
        outputs = written.embed(batch, layers)
        ours, torchs = (
            [*one.activations, one.embedding, *([] if one.norm is None else [one.norm])]
            for one in (outputs, expected)
        )
        for name, one, other in zip(names, ours, torchs, strict=True):
            off = _relative(one, other)
            if not off <= TOLERANCE:
                raise NetworkError(
                    f"the file that was written computes something else: ONNX Runtime's {name} is "
                    f"off from torch's by {off:.2g} (allowed: {TOLERANCE:g}), so it was removed; "
                    "the network depends on the batch or on chance, or torch exports it wrongly"
                )
            worst = max(worst, off)
    return worst


def _relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return |actual - expected| / |expected|, infinite for arrays of different shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    exact = expected.astype(np.float64)
    off = float(np.linalg.norm(actual - exact))
    return off and off / (float(np.linalg.norm(exact)) or 1e-300)
