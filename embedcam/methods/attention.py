"""Maps of trained attention branches: LFI-CAM and ABN. They ignore the target.

The network explained must be one of `embedcam.methods.learned`, in an `EmbeddingNetwork`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..network import EmbeddingNetwork
from ..network.layers import find_layer
from .learned import ABNetwork, LFINetwork
from .subject import Found, Subject

Learned = TypeVar("Learned", LFINetwork, ABNetwork)


def lficam(subject: Subject) -> Found:
    """LFI-CAM: w = S, the importance the branch gives each channel (Lee et al. 2021).

    One forward; the branch alone is asked again. The map ReLU(sum_k S_k A_k) is the paper's M
    before its min-max normalisation N. S is `[B K]`, > 0, of sum 1; where every A_k is flat, so
    that FIN sees nothing, it is what FIN says of nothing.

    Raises:
        NetworkError: the network is no `LFINetwork`, or explains another layer than its trunk's.
    """
    network = subject.network
    learned = _learned(network, LFINetwork, "LFI-CAM")
    if not _is_output_of(network, learned.trunk):
        raise NetworkError(
            f"LFI-CAM weighs the channels of the trunk's output, and this network explains layer "
            f"{network.layer!r}; use EmbeddingNetwork(module, 'trunk')"
        )
    activations = subject.activations
    with _computing_as(network):
        importance = learned.importance(
            _as_input(network, subject.images), _as_input(network, activations)
        )
    return Found(importance.to(activations.dtype))


def abn(subject: Subject) -> Found:
    """ABN: the branch's own map M, `[B H W]` in (0, 1) (Fukui et al. 2019, section 3.2).

    Not normalised: a sigmoid is about 1/2 where the branch is undecided. One forward; the branch
    alone is asked again, behind the trunk where the layer explained is not the trunk's output.

    Raises:
        NetworkError: the network is no `ABNetwork`.
    """
    network = subject.network
    learned = _learned(network, ABNetwork, "ABN")
    activations = subject.activations  # first: it refuses training mode and unfit inputs
    with _computing_as(network):
        if _is_output_of(network, learned.trunk):
            attention, _ = learned.attention(_as_input(network, activations))
        else:
            subject.passes.forwards += len(subject)
            _, attention, _ = learned.attend(_as_input(network, subject.images))
    return Found(maps=attention.to(activations.dtype))


def _learned(network: EmbeddingNetwork, kind: type[Learned], title: str) -> Learned:
    """The network's module, out of wrappers that hand images on as they are."""
    module: nn.Module = network.module
    while not isinstance(module, kind):
        inner = getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    if isinstance(module, kind) and network.hooked:
        return module
    given = type(module).__name__ if network.hooked else "network given as trunk and head"
    raise NetworkError(
        f"{title} draws what a trained branch says, and this {given} has none; wrap trunk and head "
        f"in embedcam.methods.learned.{kind.__name__}, train it as examples/train_attention.py "
        "does, and explain EmbeddingNetwork(module, 'trunk')"
    )


def _is_output_of(network: EmbeddingNetwork, trunk: nn.Module) -> bool:
    """Whether the layer explained is the trunk, or the last part of one that is a sequence."""
    layer = find_layer(network.module, network.layer)[1]
    while layer is not trunk and isinstance(trunk, nn.Sequential) and len(trunk):
        trunk = trunk[-1]
    return layer is trunk


def _as_input(network: EmbeddingNetwork, tensor: Tensor) -> Tensor:
    return tensor.to(network.device, network.dtype)


@contextmanager
def _computing_as(network: EmbeddingNetwork) -> Iterator[None]:
    """No gradients, in the network's own precision, whatever surrounds the call."""
    kind, chosen = network.device.type, network.autocast
    with torch.inference_mode(False), torch.no_grad():
        if chosen is None and not torch.is_autocast_enabled(kind):
            yield
            return
        with torch.autocast(kind, dtype=chosen, enabled=chosen is not None, cache_enabled=False):
            yield
