"""Baselines: ways of drawing that know nothing of why the results came back.

    mean activation     every channel counts the same: what is salient, whatever was asked
    random weights      Gaussian, other ones for each image
    wrong images        the weights that the index stores for images of other labels
    shuffled index      the index's weights permuted among all of its images
    shuffled network    the same steps with every parameter of the network shuffled

A method that does as well without the network's parameters, or with another image's weights,
explains neither (Adebayo et al., NeurIPS 2018).
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import EmbedcamError, ran_out
from ..network import EmbeddingNetwork
from .gallery import Gallery, generator
from .maps import Mapper, Maps, Questions, Seen
from .measures import MEAN

RANDOM, WRONG, SHUFFLED_INDEX = "random weights", "wrong images", "shuffled index"
SHUFFLED = "shuffled network"
BASELINES = (MEAN, RANDOM, WRONG, SHUFFLED_INDEX, SHUFFLED)
STAGES = 5


def baseline_maps(mapper: Mapper, gallery: Gallery, seed: int, asked: Questions) -> dict[str, Maps]:
    """Draw each question by every baseline of this network; wrong images only where others are."""
    weights = [random_weights(mapper.channels, seed, name) for name in asked.names]
    noise = [np.concatenate(layer) for layer in zip(*weights, strict=True)]
    maps = {MEAN: mean_activation(mapper, asked.seen), RANDOM: mapper.draw(asked.seen, noise)}
    each = list(zip(asked.labels, asked.near, asked.left_out, asked.names, strict=True))
    wrong = [wrong_rows(gallery, *query[:3], seed, query[3]) for query in each]
    if all(len(rows) for rows in wrong):
        maps[WRONG] = mapper.maps(asked.seen, wrong)
    moved = [permuted_rows(gallery, near, left_out) for _, near, left_out, _ in each]
    return maps | {SHUFFLED_INDEX: mapper.maps(asked.seen, moved)}


def mean_activation(mapper: Mapper, seen: Seen) -> Maps:
    """Draw what all channels draw together."""
    ones = [np.ones((len(seen.embeddings), k), np.float32) for k in mapper.channels]
    return mapper.draw(seen, ones)


def random_weights(channels: Sequence[int], seed: int, name: str) -> list[np.ndarray]:
    """Return Gaussian weights `[1 K]` of each layer; they hang on the seed and the image's name."""
    numbers = generator(seed, "weights", name)
    return [numbers.standard_normal((1, k)).astype(np.float32) for k in channels]


def wrong_rows(
    gallery: Gallery,
    label: str | None,
    near: np.ndarray,
    left_out: Sequence[int],
    seed: int,
    name: str,
) -> np.ndarray:
    """Return random rows of other labels than the query's, else no neighbors; `[0]` without any."""
    free = ~np.isin(gallery.positions, [*near.tolist(), *left_out])
    other = free & (gallery.codes != gallery.code(label)) if label is not None else free
    rows = gallery.positions[other if other.any() else free]
    return generator(seed, "wrong", name).choice(rows, min(len(near), len(rows)), replace=False)


def permuted_rows(gallery: Gallery, near: np.ndarray, left_out: Sequence[int]) -> np.ndarray:
    """Return the rows after the neighbors in one cycle through all images; never the query's."""
    moved: np.ndarray = gallery.cycle[near]
    for _ in left_out:
        moved = np.where(np.isin(moved, left_out), gallery.cycle[moved], moved)
    return moved


class ShuffledNetwork:
    """A copy of a network, each parameter's numbers put in another order, from the head down.

    Batch norms are measured anew on `images [n C H W]`: with the old statistics a deep network
    computes nearly the same for every image. `stages`: how many modules are shuffled together.
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
            module, network.layer, normalize=network.normalize, output=network.output,
            layout=layout, grid=grid, prefix_tokens=prefix, preprocess=network.preprocess,
            autocast=network.autocast, channels_last=network.channels_last,
        )  # fmt: skip
        # From the output down, in the order in which modules were registered.
        groups = (
            [one for one in part.parameters(recurse=False) if one.numel() > 1]
            for part in module.modules()
        )
        self._groups = [group for group in groups if group][::-1]
        self.count = count = len(self._groups)
        if not count:
            raise EmbedcamError("it has no parameters")
        self.stages = sorted(
            {1, *(max(1, round(count * n / STAGES)) for n in range(1, STAGES + 1))}
        )
        self._kept = [[one.detach().clone() for one in group] for group in self._groups]
        order = torch.Generator().manual_seed(seed % (1 << 63))
        self._other = [[_shuffled(one, order) for one in group] for group in self._kept]
        self._images = torch.from_numpy(images).to(network.device, network.dtype)
        parts = (part for part in module.modules() if isinstance(part, _BatchNorm))
        self._norms = [part for part in parts if part.running_mean is not None]
        buffers = (one for norm in self._norms for one in (norm.running_mean, norm.running_var))
        self._buffers = [one for one in buffers if one is not None]
        self._statistics = {0: [one.clone() for one in self._buffers]}

    def shuffle(self, modules: int) -> None:
        """Shuffle the first modules from the output, 0 to `count`; others are as they were."""
        with torch.no_grad():
            values = self._other[:modules] + self._kept[modules:]
            for group, some in zip(self._groups, values, strict=True):
                for parameter, value in zip(group, some, strict=True):
                    parameter.copy_(value)
            if modules not in self._statistics:
                self._statistics[modules] = self._measure_statistics()
            for buffer, value in zip(self._buffers, self._statistics[modules], strict=True):
                buffer.copy_(value)

    def see(self, mapper: Mapper, inputs: np.ndarray) -> Seen | None:
        """Run inputs as it is shuffled now; None where nothing finite comes out."""
        try:
            return mapper.see(inputs, self.network)
        except EmbedcamError:
            return None

    def _measure_statistics(self) -> list[Tensor]:
        if not self._norms or len(self._images) < 2:
            return self._statistics[0]
        momenta = [norm.momentum for norm in self._norms]
        try:
            for norm in self._norms:
                norm.train().momentum = 1.0
            self.network.module(self._images)
        except (RuntimeError, ValueError) as error:
            if ran_out(error):
                raise
            return self._statistics[0]
        finally:
            for norm, momentum in zip(self._norms, momenta, strict=True):
                norm.eval().momentum = momentum
        return [one.clone() for one in self._buffers]


def _shuffled(values: Tensor, order: torch.Generator) -> Tensor:
    places = torch.randperm(values.numel(), generator=order)
    return values.flatten()[places.to(values.device)].reshape(values.shape)
