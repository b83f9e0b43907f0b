"""What a map is held against: ways of drawing that know nothing of why the results came back.

    mean activation     every channel counts the same: what is salient, whatever was asked
    random weights      Gaussian, other ones for each image
    wrong images        the weights that the index stores for images of other labels
    shuffled index      the index's weights permuted among all of its images
    shuffled network    the same steps with every parameter of the network shuffled

A way of explaining that does as well without the network's parameters, or with another image's
weights, explains neither (Adebayo et al., NeurIPS 2018).
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import EmbedcamError, ran_out
from ..network import EmbeddingNetwork
from .gallery import Gallery
from .maps import Mapper, Maps, Questions, Seen
from .queries import generator

MEAN, RANDOM, WRONG, SHUFFLED_INDEX, SHUFFLED = (
    "mean activation", "random weights", "wrong images", "shuffled index", "shuffled network",
)  # fmt: skip
CONTROLS = (MEAN, RANDOM, WRONG, SHUFFLED_INDEX, SHUFFLED)
STAGES = 5


def control_maps(mapper: Mapper, gallery: Gallery, seed: int, asked: Questions) -> dict[str, Maps]:
    """The map of each question by every control but those that need another network.

    The weights of wrong images are left out where the index holds no others.
    """
    drawn = [random_weights(mapper.channels, seed, name) for name in asked.names]
    noise = [np.concatenate(layer) for layer in zip(*drawn, strict=True)]
    maps = {MEAN: mean_activation(mapper, asked.seen), RANDOM: mapper.drawn(asked.seen, noise)}
    each = zip(asked.near, asked.left_out, asked.labels, asked.names, strict=True)
    wrong = [
        wrong_rows(gallery, label, near, left_out, seed, name)
        for near, left_out, label, name in each
    ]
    others = [rows for rows in wrong if rows is not None]
    if len(others) == len(wrong):
        maps[WRONG] = Maps.of(mapper.transferred(asked.seen, others))
    moved = [
        permuted_rows(gallery, near, left_out)
        for near, left_out in zip(asked.near, asked.left_out, strict=True)
    ]
    maps[SHUFFLED_INDEX] = Maps.of(mapper.transferred(asked.seen, moved))
    return maps


def mean_activation(mapper: Mapper, seen: Seen) -> Maps:
    """What all channels draw together, of b inputs."""
    ones = [np.ones((len(seen.embeddings), k), np.float32) for k in mapper.channels]
    return mapper.drawn(seen, ones)


def random_weights(channels: Sequence[int], seed: int, name: str) -> list[np.ndarray]:
    """Gaussian weights of one image, `[1 K]` of each layer; they hang on the seed and its name."""
    drawn = generator(seed, "weights", name)
    return [drawn.standard_normal((1, k)).astype(np.float32) for k in channels]


def wrong_rows(
    gallery: Gallery,
    label: str | None,
    near: np.ndarray,
    left_out: Sequence[int],
    seed: int,
    name: str,
) -> np.ndarray | None:
    """Random rows of the index of other labels than the query's, as many as it has neighbours.

    Without labels, or where there is only one, rows that are no neighbours.

    Args:
        gallery: the index.
        label: the query's.
        near: its neighbours' rows.
        left_out: rows that show the query itself.
        seed: with the name, of the drawing.
        name: the query's id.

    Returns:
        None where the index holds no other image.
    """
    taken = ~np.isin(gallery.positions, [*near.tolist(), *left_out])
    other = taken & (gallery.codes != gallery.code(label)) if label is not None else taken
    rows = gallery.positions[other if other.any() else taken]
    if not len(rows):
        return None
    count = min(len(near), len(rows))
    return generator(seed, "wrong", name).choice(rows, count, replace=False)


def permuted_rows(gallery: Gallery, near: np.ndarray, left_out: Sequence[int]) -> np.ndarray:
    """Rows whose weights stand in the neighbours' place once the index's are permuted.

    The permutation is one cycle through all images, so that none keeps its own; a row that shows
    the query itself is passed over.
    """
    moved: np.ndarray = gallery.cycle[near]
    for _ in left_out:
        moved = np.where(np.isin(moved, left_out), gallery.cycle[moved], moved)
    return moved


class ShuffledNetwork:
    """A copy of a network whose parameters are shuffled from the head down, step by step.

    Each parameter's own numbers are put in another order, so that their scale stays. What batch
    norms know of their inputs is measured anew on some images: with the old statistics a deep
    network computes nearly the same for every image, and a control that draws nothing is easily
    beaten. `stages` names how many of the modules with parameters, counted from the output, are
    shuffled at each step; the last shuffles all.

    Args:
        network: to be copied; it stays as it is.
        seed: of the shuffling.
        images: inputs `[n C H W]` to measure batch norms' statistics on; of fewer than two the
            statistics stay.

    Raises:
        EmbedcamError: it was given as two functions, or its module cannot be copied.
    """

    def __init__(self, network: EmbeddingNetwork, seed: int, images: np.ndarray) -> None:
        if not network.hooked:
            raise EmbedcamError("the network was given as a trunk and a head, which are not copied")
        try:
            module = copy.deepcopy(network.module)
        except Exception as error:
            if ran_out(error):
                raise
            raise EmbedcamError(f"its module cannot be copied ({error})") from error
        layout, grid, prefix = network.layout_options
        self.network = EmbeddingNetwork(
            module,
            network.layer,
            normalize=network.normalize,
            output=network.output,
            layout=layout,
            grid=grid,
            prefix_tokens=prefix,
            preprocess=network.preprocess,
            autocast=network.autocast,
            channels_last=network.channels_last,
        )
        # From the output down, in the order in which modules were registered.
        groups = [
            [one for one in part.parameters(recurse=False) if one.numel() > 1]
            for part in module.modules()
        ]
        self._groups = [group for group in groups if group][::-1]
        count = len(self._groups)
        if not count:
            raise EmbedcamError("it has no parameters")
        self.stages = sorted(
            {max(1, round(count * step / STAGES)) for step in range(1, STAGES + 1)} | {1}
        )
        self.count = count
        self._kept = [[one.detach().clone() for one in group] for group in self._groups]
        drawn = torch.Generator().manual_seed(seed % (1 << 63))
        self._other = [[_shuffled(one, drawn) for one in group] for group in self._kept]
        self._images = torch.from_numpy(images).to(self.network.device, self.network.dtype)
        self._norms: list[Any] = [
            part for part in module.modules()
            if isinstance(part, _BatchNorm) and part.running_mean is not None
        ]  # fmt: skip
        self._statistics = {0: self._read_statistics()}

    def shuffle(self, modules: int) -> None:
        """Shuffle the first so many modules, counted from the output; the others are as they were.

        Args:
            modules: 0 to `count`.
        """
        with torch.no_grad():
            for place, group in enumerate(self._groups):
                values = self._other[place] if place < modules else self._kept[place]
                for parameter, value in zip(group, values, strict=True):
                    parameter.copy_(value)
            if modules not in self._statistics:
                self._statistics[modules] = self._measure_statistics()
            for norm, (mean, var) in zip(self._norms, self._statistics[modules], strict=True):
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)

    def _read_statistics(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in self._norms]

    def _measure_statistics(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of the images, through the parameters as they are now."""
        if not self._norms or len(self._images) < 2:
            return self._statistics[0]
        momenta = [norm.momentum for norm in self._norms]
        try:
            for norm in self._norms:
                norm.train()
                norm.momentum = 1.0
            self.network.module(self._images)
        except (RuntimeError, ValueError) as error:
            if ran_out(error):
                raise
            return self._statistics[0]
        finally:
            for norm, momentum in zip(self._norms, momenta, strict=True):
                norm.eval()
                norm.momentum = momentum
        return self._read_statistics()

    def see(self, mapper: Mapper, inputs: Any) -> Seen | None:
        """A forward pass as it is shuffled now; None where nothing finite comes out."""
        try:
            return mapper.see(inputs, self.network)
        except EmbedcamError:
            return None


def _shuffled(values: torch.Tensor, drawn: torch.Generator) -> torch.Tensor:
    order = torch.randperm(values.numel(), generator=drawn)
    return values.flatten()[order.to(values.device)].reshape(values.shape)
