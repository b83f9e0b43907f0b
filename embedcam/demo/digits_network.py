"""A small embedding network for scenes of digits: six convolutions, a mean, a matrix.

The head is what most retrieval networks have, a global average pool and a linear layer without
bias, so that the weights of all channels follow from D numbers an image.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..preprocess import Preprocess

#: The layer to explain: its output is `[B K 12 12]` for an input of 96 x 96.
LAYER = "trunk"
MEAN, STD = 0.4, 0.25


class DigitsNetwork(nn.Module):
    """`[B 3 H W]` -> embedding `[B D]`, not normalised; the trunk shrinks H and W eightfold."""

    def __init__(self, channels: int = 160, embedding_size: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _block(3, 24, stride=2, kernel=5),
            _block(24, 48, stride=2),
            _block(48, 64),
            _block(64, 96, stride=2),
            _block(96, 128),
            _block(128, channels),
        )
        self.head = nn.Linear(channels, embedding_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embedding `[B D]` of normalised images `[B 3 H W]`."""
        embedding: Tensor = self.head(self.trunk(images).mean(dim=(2, 3)))
        return embedding


def _block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def digits_preprocess(size: int = 96) -> Preprocess:
    """What the network expects: the whole picture, `size` x `size`."""
    return Preprocess(
        size=(size, size),
        resize="squash",
        resize_to=None,
        interpolation="bilinear",
        mean=(MEAN, MEAN, MEAN),
        std=(STD, STD, STD),
    )


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write the network's weights as safetensors, under their final name only when complete."""
    from safetensors.torch import save_file

    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, unfinished)
    unfinished.replace(path)


def load_weights(path: str | Path) -> DigitsNetwork:
    """The network whose weights `save_weights` wrote, in eval mode; its sizes are the file's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        embedding_size, channels = state["head.weight"].shape
        network = DigitsNetwork(channels, embedding_size)
        network.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise NetworkError(
            f"{path}: not the weights of the demo's network ({reason}); run the demo again"
        ) from error
    return network.eval()


def initialise(channels: int, embedding_size: int, seed: int) -> DigitsNetwork:
    """A network with seeded random weights; the caller's random state stays untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsNetwork(channels, embedding_size)
