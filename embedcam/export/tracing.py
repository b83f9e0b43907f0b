"""A network followed through one run: from torch to an ONNX model in memory."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..network import EmbeddingNetwork
from ..onnx.network import EMBEDDING, output_name

INPUT = "images"
_LARGEST = (1 << 31) - (1 << 24)
"""Bytes of parameters; the rest of a protobuf's two gigabytes is left to the graph."""


class Traced(nn.Module):
    """The network as a module of tensor operations: images -> activations and embedding."""

    def __init__(self, network: EmbeddingNetwork, layers: Sequence[str]) -> None:
        super().__init__()
        self.training = False
        self.module, self._normalize = network.module, network.normalize
        self._run = network.traceable(layers)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Of `[B 3 H W]` each layer's `[B K H W]`, then the embedding `[B D]`."""
        z, maps = self._run(images)
        if self._normalize:
            z = z / torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return (*maps, z)


def refuse_unexportable(network: EmbeddingNetwork) -> None:
    """Refuse what no ONNX file of one piece can hold, before anything is traced.

    Raises:
        NetworkError: the packages for it are missing; a network over positions, in another
            precision than float32, or of more than two gigabytes.
    """
    check_packages()
    if network.layout == "bkl":
        raise NetworkError("a network over positions takes no pictures and cannot be exported")
    if network.dtype != torch.float32:
        kind = str(network.dtype).removeprefix("torch.")
        raise NetworkError(
            f"the network computes in {kind}, and ONNX files are written in float32; give it "
            "before the conversion: an index built in half precision admits it"
        )
    size = sum(
        tensor.numel() * tensor.element_size()
        for tensor in network.module.state_dict().values()
        if isinstance(tensor, Tensor)
    )
    if size > _LARGEST:
        raise NetworkError(
            f"the network holds {size / 1e9:.1f} GB of parameters; one ONNX file holds at most 2 "
            "GB, and the files beside it that more would need are not written"
        )


def check_packages() -> None:
    """Refuse to begin without what exporting takes.

    Raises:
        NetworkError: naming the package, and how to install it.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise NetworkError(
            f"exporting takes torch 2.6 or newer, and this is {torch.__version__}; run "
            'pip install "embedcam[onnx]"'
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise NetworkError(
            f"exporting takes {error.name}, which is not installed; run pip install "
            '"embedcam[onnx]"'
        ) from error


def onnx_model(network: EmbeddingNetwork, layers: Sequence[str], free: bool) -> Any:
    """An `onnx.ModelProto`: input `images` `[batch 3 H W]`, outputs as `Traced` gives them.

    Args:
        network, layers: what is written.
        free: H and W of any size; else those of the network's input.

    Raises:
        NetworkError: torch cannot follow the network, with its reason.
    """
    names = [output_name(place) for place in range(len(layers))]
    # A batch of one would be taken for a constant.
    example = torch.from_numpy(network.probe_images(2)).to(network.device)
    sides = ("batch", None, "height", "width") if free else ("batch",)
    shapes = {place: torch.export.Dim(name) for place, name in enumerate(sides) if name}
    try:
        with torch.inference_mode(False), torch.no_grad(), _silence(), _no_autocast(network):
            program = torch.onnx.export(
                Traced(network, layers),
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=[INPUT],
                output_names=[*names, EMBEDDING],
                dynamic_shapes=(shapes,),
            )
        assert program is not None
        return program.model_proto
    except Exception as error:
        if isinstance(error, NetworkError):
            raise
        raise NetworkError(
            f"torch cannot follow the network into ONNX ({_said(error)}); give a module of tensor "
            "operations that takes batches of any size (x.shape[0] where it says len(x))"
        ) from error


@contextmanager
def _no_autocast(network: EmbeddingNetwork) -> Iterator[None]:
    """Traced in float32, in which it is run."""
    with torch.autocast(network.device.type, enabled=False):
        yield


@contextmanager
def _silence() -> Iterator[None]:
    """Without what the exporter tells its developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _said(error: BaseException) -> str:
    """The first line of the reason at the bottom of a chain of errors, without decorations."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
