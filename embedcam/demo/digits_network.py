"""A small embedding network for scenes of digits, and its training with a triplet loss.

Triplets of whole scenes teach nothing at first: the digit is a tenth of the picture. So the view
widens: training begins on windows just larger than the digit and ends on whole scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._files import write_whole
from ..errors import NetworkError
from ..images.progress import progress_of
from ..preprocess import Preprocess
from .scenes import SceneMaker
from .settings import DemoSettings

LAYER = "trunk"
"""The layer to explain: its output is `[B K 12 12]` for an input of 96 x 96."""
MEAN, STD = 0.4, 0.25
VIEWS = ((0.5, 0.5), (0.9, 0.67), (1.0, 1.0))
"""(share of the steps done, side of the window as a share of the scene's)"""


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
        """Return embeddings `[B D]` of normalised images `[B 3 H W]`."""
        embedding: Tensor = self.head(self.trunk(images).mean(dim=(2, 3)))
        return embedding


def _block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def digits_preprocess(size: int = 96) -> Preprocess:
    """Return what the network expects: the whole picture, `size` x `size`."""
    return Preprocess(
        size=(size, size), resize="squash", resize_to=None, interpolation="bilinear",
        mean=(MEAN,) * 3, std=(STD,) * 3,
    )  # fmt: skip


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write the network's weights as safetensors, whole or not at all."""
    from safetensors.torch import save

    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    write_whole(path, save(state))


def load_weights(path: str | Path) -> DigitsNetwork:
    """Return the network whose weights `save_weights` wrote, in eval mode."""
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
    """Return a network of seeded random weights; the caller's random state stays untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsNetwork(channels, embedding_size)


def train(settings: DemoSettings, progress: bool = True) -> DigitsNetwork:
    """Train on the training split, on one thread, so that the result is one; in eval mode."""
    batches = Batches(settings, progress)
    network = initialise(settings.channels, settings.embedding_size, settings.seed)
    # The layout of the batches too: an eighth faster.
    network.to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        descend(network.train(), batches, settings, lambda images: [network(images)], progress)
    finally:
        torch.set_num_threads(before)
    return network.eval()


def descend(
    network: nn.Module,
    batches: Batches,
    settings: DemoSettings,
    embed: Callable[[Tensor], Sequence[Tensor]],
    progress: bool,
) -> Tensor:
    """Train in place by the triplet losses of every embedding; return the loss of each step."""
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.2
    )
    labels = torch.arange(10).repeat_interleave(settings.batch_size // 10)
    shown = None if progress else False
    losses = []
    with progress_of("training", settings.steps, "steps", shown=shown) as advance:
        for step in range(settings.steps):
            view = next(shown for end, shown in VIEWS if step / settings.steps < end)
            each = (F.normalize(one, dim=1) for one in embed(batches.draw(view)))
            loss = torch.stack([triplet_loss(one, labels, settings.margin) for one in each]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            advance(1)
    return torch.stack(losses)


def triplet_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Compute the semi-hard triplet loss of unit embeddings `[B D]` (Schroff et al. 2015, 3.2)."""
    distances = (2 - 2 * embeddings @ embeddings.T).clamp(min=0)
    same = labels[:, None] == labels[None, :]
    fixed = distances.detach()
    # Axes: anchor, positive, negative.
    beyond = (fixed[:, None, :] > fixed[:, :, None]) & ~same[:, None, :]
    nearest = torch.where(beyond, fixed[:, None, :], torch.inf).argmin(dim=2)
    farthest = fixed.masked_fill(same, -torch.inf).argmax(dim=1)
    negatives = torch.where(beyond.any(dim=2), nearest, farthest[:, None])
    hinge = F.relu(distances - distances.gather(1, negatives) + margin)
    return hinge[same & ~torch.eye(len(labels), dtype=torch.bool)].mean()


class Batches:
    """Balanced batches of windows around the digits of scenes kept in memory."""

    def __init__(self, settings: DemoSettings, progress: bool) -> None:
        maker = SceneMaker(settings.seed, settings.input_size)
        self._pixels, self._boxes = [], []
        shown = None if progress else False
        with progress_of("drawing", settings.n_train, "scenes", shown=shown) as advance:
            for number in range(settings.n_train):
                scene = maker.scene("train", number)
                self._pixels.append(scene.pixels)
                self._boxes.append(scene.digits[0].box)
                advance(1)
        self._per_class = settings.batch_size // 10
        self._size = settings.input_size
        self._rng = np.random.default_rng([settings.seed, 7])

    def draw(self, view: float) -> Tensor:
        """Draw normalized images `[B 3 v v]`, class by class; v is `view` of the scene's side."""
        side, numbers = round(view * self._size), range(len(self._pixels))
        windows = [
            self._window(number, side)
            for digit in range(10)
            for number in self._rng.choice(numbers[digit::10], self._per_class, replace=False)
        ]
        images = torch.from_numpy(np.stack(windows)).permute(0, 3, 1, 2)
        return (images.float() / 255 - MEAN) / STD

    def _window(self, number: int, side: int) -> np.ndarray:
        """Cut a random window `[v v 3]` that holds the whole digit, its colours shuffled."""
        x0, y0, x1, y1 = self._boxes[number]
        left, top = self._start(x0, x1, side), self._start(y0, y1, side)
        window = self._pixels[number][top : top + side, left : left + side]
        return window[..., self._rng.permutation(3)]

    def _start(self, low: int, high: int, side: int) -> int:
        # A digit larger than the window is cut.
        first, last = sorted((max(high - side, 0), min(low, self._size - side)))
        return int(self._rng.integers(first, last + 1))
